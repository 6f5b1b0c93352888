"""DDLS and DGflow against the exact laws of their finite chains, and mutants that these tests must find."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import fastrefine as fr
from tests.support.closed_forms import ALPHA, BACKENDS, GRID, Line, N, Quadratic, Sigmoid, chains, flat, langevin_law, optimal

F = 100  # the targets factorise: elements are independent samples
D = optimal()


def ddls_law(sizes, scales, logit_scale=1.0):
    """Exact law from N(0, 1) with the optimal logit."""
    d = Quadratic(logit_scale * D.square, logit_scale * D.slope)
    return langevin_law([(0.5 * e, math.sqrt(e) * s) for e, s in zip(sizes, scales, strict=True)], d)


def sample(sampler, steps, *, d=D, prior=None, backend="reference", start=None, at="input"):
    prior = fr.Normal(F) if prior is None else prior
    return chains(sampler, d, prior, N // F, steps, backend=backend, start=start, seed=steps, at=at).activations


DDLS_RUNS = {
    "one step": (fr.DDLS(0.1), 1, [0.1], [1.0]),
    "five steps": (fr.DDLS(0.1), 5, [0.1] * 5, [1.0] * 5),
    "twenty steps": (fr.DDLS(0.1), 20, [0.1] * 20, [1.0] * 20),
    "large steps": (fr.DDLS(1.2), 5, [1.2] * 5, [1.0] * 5),
    "little noise": (fr.DDLS(0.1, 0.1), 5, [0.1] * 5, [0.1] * 5),
    "logit scale": (fr.DDLS(0.3, logit_scale=0.4), 5, [0.3] * 5, [1.0] * 5),
    "schedule": (fr.DDLS((0.4, 0.2, 0.1), (1.0, 0.5)), 6, [0.4, 0.2, 0.1, 0.1, 0.1, 0.1], [1.0] + [0.5] * 5),
    "noise that ends": (fr.DDLS(0.3, (1.0, 1.0, 0.0)), 4, [0.3] * 4, [1.0, 1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", DDLS_RUNS)
def test_ddls_has_the_exact_law_of_k_steps(run, backend):
    sampler, steps, sizes, scales = DDLS_RUNS[run]
    law = ddls_law(sizes, scales, sampler.logit_scale)
    assert law.p_value(sample(sampler, steps, backend=backend)) > ALPHA


class NoPriorScore(fr.DDLS):
    def observe(self, a, evaluation, state, step, noise):
        return super().observe(a, evaluation._replace(prior_score=torch.zeros_like(a)), state, step, noise)


class WholeDrift(fr.DDLS):
    """eps where eps / 2 is meant."""

    def over(self, latent):
        bound = super().over(latent)
        bound.schedule.table[0] *= 2
        return bound


class OneNoise(fr.DDLS):
    """The noise of the first step at every step."""

    def propose(self, state, step, noise):
        xi = noise.normal(ago=1000)
        a = state["position"] - self.schedule.at(step)[0] * state["grad"]
        return a + self.schedule.at(step)[1] * xi, state


DDLS_MUTANTS = {
    "5 % more noise": (fr.DDLS(0.1, 1.05), D),
    "2 % less noise": (fr.DDLS(0.1, 0.98), D),
    "noise of sqrt(2 eps)": (fr.DDLS(0.1, math.sqrt(2)), D),
    "no prior score": (NoPriorScore(0.1), D),
    "whole drift": (WholeDrift(0.1), D),
    "the same noise at every step": (OneNoise(0.1), D),
    "s(d) in place of d": (fr.DDLS(0.1), Sigmoid(D)),
    "logit scale forgotten": (fr.DDLS(0.1, logit_scale=0.95), D),
}


@pytest.mark.parametrize("mutant", DDLS_MUTANTS)
def test_mutants_of_ddls_are_found(mutant):
    sampler, d = DDLS_MUTANTS[mutant]
    assert ddls_law([0.1] * 5, [1.0] * 5).p_value(sample(sampler, 5, d=d)) < ALPHA


def test_one_step_too_few_is_found():
    assert ddls_law([0.1] * 5, [1.0] * 5).p_value(sample(fr.DDLS(0.1), 4)) < ALPHA


# On a box the exact law of K folded steps comes from quadrature.

BOX = {
    "flat on uniform": (fr.Uniform(F), flat(), 1.0),
    "linear on uniform": (fr.Uniform(F), Quadratic(0.0, 1.5), 1.0),
    "far from zero": (fr.Uniform(F, low=2.0, high=2.5), Quadratic(0.0, 1.5), 0.25),
    "quadratic on a truncated normal": (fr.TruncatedNormal(F, bound=1.0), D, 1.0),
}


def box_law(name, steps, eps):
    """(the interval, log target (GRID,), law after ``steps`` steps) of one of BOX."""
    prior, d, _ = BOX[name]
    precision, low, high = prior.table()[:, 0].tolist()
    line = Line(low, high)
    z = line.points
    log_target = d.square * z * z + d.slope * z - 0.5 * precision * z * z
    score = 2 * d.square * z + d.slope - precision * z
    start = line.density(lambda z: -0.5 * precision * z * z)
    return line, log_target, line.law(line.folded(start, score, [(0.5 * eps, math.sqrt(eps))] * steps))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOX)
def test_ddls_folds_a_bounded_prior_by_its_exact_law(name, backend):
    prior, d, eps = BOX[name]
    *_, law = box_law(name, 4, eps)
    found = sample(fr.DDLS(eps), 4, d=d, prior=prior, backend=backend)
    assert law.p_value(found) > ALPHA


def test_on_a_uniform_prior_a_flat_discriminator_changes_nothing():
    line, _, law = box_law("flat on uniform", 4, 1.0)
    uniform = line.law(np.full(GRID, 0.5))
    assert abs(law.variance - uniform.variance) < 1e-9
    assert uniform.p_value(sample(fr.DDLS(1.0), 4, d=flat(), prior=fr.Uniform(F))) > ALPHA


class Unfolded(fr.DDLS):
    def propose(self, state, step, noise):
        size, scale = self.schedule.at(step)
        return state["position"] - size * state["grad"] + scale * noise.normal(), state


class Clamped(Unfolded):
    def propose(self, state, step, noise):
        return super().propose(state, step, noise)[0].clamp(*self.latent.table[1:]), state


class Wrapped(Unfolded):
    """On a circle, not between walls."""

    def propose(self, state, step, noise):
        _, low, high = self.latent.table
        return low + torch.remainder(super().propose(state, step, noise)[0] - low, high - low), state


class NormalScore(fr.DDLS):
    """The score of a normal prior under a uniform one."""

    def observe(self, a, evaluation, state, step, noise):
        return super().observe(a, evaluation._replace(prior_score=-a), state, step, noise)


@pytest.mark.parametrize("mutant", [Unfolded, Clamped, Wrapped, NormalScore])
def test_mutants_of_the_fold_are_found(mutant):
    prior, d, eps = BOX["linear on uniform"]
    *_, law = box_law("linear on uniform", 4, eps)
    assert law.p_value(sample(mutant(eps), 4, d=d, prior=prior)) < ALPHA


def test_each_part_of_a_product_prior_has_its_own_law():
    prior = fr.Product(fr.Normal(F // 2), fr.Uniform(F // 2))
    found = sample(fr.DDLS(0.3), 4, prior=prior)
    assert ddls_law([0.3] * 4, [1.0] * 4).p_value(found[:, : F // 2]) > ALPHA
    line = Line(-1.0, 1.0)
    score = 2 * D.square * line.points + D.slope
    wanted = line.folded(np.full(GRID, 0.5), score, [(0.15, math.sqrt(0.3))] * 4)
    assert line.law(wanted).p_value(found[:, F // 2 :]) > ALPHA


def test_the_bias_of_small_steps_is_of_their_order_and_ddls_has_it():
    """Linear logit on a uniform prior: the target is a truncated exponential, from which K steps of eps lead away."""
    slope, steps = 1.5, 20
    line = Line(-1.0, 1.0)
    target = line.density(lambda z: slope * z)
    biases = {}
    for eps in (0.2, 0.1, 0.05):
        density = line.folded(target, np.full(GRID, slope), [(0.5 * eps, math.sqrt(eps))] * round(4 / eps))
        biases[eps] = abs(line.law(density).mean - line.law(target).mean)
    assert all(0.3 * eps < bias < 0.4 * eps for eps, bias in biases.items())  # the standard deviation is .5

    u = np.random.default_rng(0).random((N // F, F))
    exact = torch.from_numpy(np.log1p(u * math.expm1(2 * slope)) / slope - 1)  # inverse distribution function
    assert line.law(target).p_value(exact) > ALPHA
    found = sample(fr.DDLS(0.2), steps, d=Quadratic(0.0, slope), prior=fr.Uniform(F), start=exact)
    biased = line.folded(target, np.full(GRID, slope), [(0.1, math.sqrt(0.2))] * steps)
    assert line.law(biased).p_value(found) > ALPHA > line.law(target).p_value(found)
    found = sample(fr.DDLS(0.002), steps, d=Quadratic(0.0, slope), prior=fr.Uniform(F), start=exact)
    assert line.law(target).p_value(found) > ALPHA


# DGflow


def flow_law(steps, eta, gamma):
    return langevin_law([(eta, math.sqrt(2 * eta * gamma))] * steps, D, prior=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize(("steps", "eta", "gamma"), [(1, 0.1, 0.01), (10, 0.1, 0.01), (5, 0.2, 0.5), (3, 0.1, 0.0)])
def test_dgflow_kl_has_the_exact_law_of_k_steps(steps, eta, gamma, at, backend):
    found = sample(fr.DGflow(eta, "KL", gamma), steps, backend=backend, at=at)
    assert flow_law(steps, eta, gamma).p_value(found) > ALPHA


class WithPriorScore(fr.DGflow):
    @property
    def traits(self):
        return dataclasses.replace(super().traits, reads_prior=True)

    def observe(self, a, evaluation, state, step, noise):
        return {**super().observe(a, evaluation, state, step, noise), "grad": evaluation.grad + a}


FLOW_MUTANTS = {
    "noise of sqrt(eta gamma)": (fr.DGflow(0.2, "KL", 0.25), D),
    "5 % more noise": (fr.DGflow(0.2, "KL", 0.5 * 1.05**2), D),
    "2 % larger steps": (fr.DGflow(0.204, "KL", 0.5 / 1.02), D),
    "another divergence": (fr.DGflow(0.2, "JS", 0.5), D),
    "a prior score": (WithPriorScore(0.2, "KL", 0.5), D),
    "s(d) in place of d": (fr.DGflow(0.2, "KL", 0.5), Sigmoid(D)),
}


@pytest.mark.parametrize("mutant", FLOW_MUTANTS)
def test_mutants_of_dgflow_are_found(mutant):
    sampler, d = FLOW_MUTANTS[mutant]
    assert flow_law(5, 0.2, 0.5).p_value(sample(sampler, 5, d=d)) < ALPHA


def test_the_published_little_noise_is_told_from_half_of_it():
    assert flow_law(10, 0.1, 0.01).p_value(sample(fr.DGflow(0.1, "KL", 0.005), 10)) < ALPHA
