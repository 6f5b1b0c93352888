"""MALA, PCN and HMC keep their target's law for every step size, and mutants that these tests must find.

A chain that starts in the target's exact law stays in it, however large its steps and however few: what is tested is the
acceptance rule, not how fast chains mix. Where the law after K steps is known from elsewhere, chains start from the prior.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import fastrefine as fr
from tests.support.closed_forms import ALPHA, BACKENDS, Gaussians, Line, M, Mixture, N, Quadratic, S, chains, gaussian, optimal

F = 4
SLOPE, BOUND = 1.5, 1.0

TARGETS = {
    "gaussian": (fr.Normal, optimal()),
    "truncated exponential": (fr.Uniform, Quadratic(0.0, SLOPE)),
    "truncated normal": (lambda f: fr.TruncatedNormal(f, bound=BOUND), optimal()),
}


def line_of(name):
    """(interval, log target (800,), its score (800,), log prior (800,)) of a target on the line."""
    prior, d = TARGETS[name][0](1), TARGETS[name][1]
    precision, low, high = prior.table()[:, 0].tolist()
    line = Line(max(low, -6.0), min(high, 6.0))
    z = line.points
    log_prior = -0.5 * precision * z * z
    return line, log_prior + d.square * z * z + d.slope * z, 2 * d.square * z + d.slope - precision * z, log_prior


def target_law(name):
    line, log_target, *_ = line_of(name)
    return gaussian(M, S * S) if name == "gaussian" else line.law(line.density(lambda z: log_target))


def exact_draws(name, seed=1):
    """(N / F, F) independent draws of the target by its inverse distribution function."""
    u = np.random.default_rng(seed).random((N // F, F))
    if name == "truncated exponential":
        x = np.log1p(u * math.expm1(2 * SLOPE)) / SLOPE - 1
    else:
        bound = np.inf if name == "gaussian" else BOUND
        low, high = stats.norm.cdf((-bound - M) / S), stats.norm.cdf((bound - M) / S)
        x = M + S * stats.norm.ppf(low + u * (high - low))
    return torch.from_numpy(x)


def stationary(sampler, name, transitions=4, backend="reference"):
    """After some transitions from the exact law: (smallest p value, mean acceptance)."""
    prior, d = TARGETS[name]
    start = exact_draws(name)
    out = chains(sampler, d, prior(F), len(start), transitions * sampler.traits.transition_steps, backend=backend, start=start)
    return target_law(name).p_value(out.latents), float(out.acceptance.mean())


STEPS = {
    "gaussian": [
        *(fr.MALA(0.1), fr.MALA(1.3), fr.MALA(1.3, global_every=2), fr.PCN(0.3), fr.PCN(1.5), fr.PCN(4.0)),
        *(fr.HMC(0.2, 3), fr.HMC(1.1, 4), fr.HMC(0.9, 1), fr.HMC(0.8, 4, jitter=0.5)),
    ],
    "truncated exponential": [fr.MALA(0.02), fr.MALA(0.3), fr.HMC(0.3, 3), fr.HMC(1.0, 4), fr.HMC(0.8, 4, jitter=0.5)],
    "truncated normal": [fr.MALA(0.02), fr.MALA(0.4), fr.HMC(0.3, 3), fr.HMC(0.9, 4), fr.HMC(0.8, 4, jitter=0.5)],
}


def in_turn(cases):
    """Each case with a backend, one after the other."""
    return [(*case, BACKENDS[i % 2]) for i, case in enumerate(cases)]


# Fused rules propose from normal priors alone
ON_BOXES = [(name, fr.MALA(0.3, global_every=2), "reference") for name in list(TARGETS)[1:]]
CASES = ON_BOXES + in_turn((name, sampler) for name, samplers in STEPS.items() for sampler in samplers)


def label(value):
    return f"{type(value).__name__} {value.step_size}" if isinstance(value, fr.samplers.Sampler) else str(value)


@pytest.mark.parametrize(("name", "sampler", "backend"), CASES, ids=label)
def test_the_target_is_stationary_for_every_step_size(name, sampler, backend):
    p, acceptance = stationary(sampler, name, backend=backend)
    assert p > ALPHA
    assert acceptance > 0.05  # or nothing was tested


@pytest.mark.parametrize(("name", "eps", "backend"), in_turn([*((name, 0.5) for name in TARGETS), ("gaussian", 2.0)]))
def test_mala_from_the_prior_has_the_exact_law_of_k_transitions(name, eps, backend):
    prior, d = TARGETS[name]
    line, log_target, score, log_prior = line_of(name)
    wanted = line.law(line.mala(line.density(lambda z: log_prior), log_target, score, eps, 3))
    out = chains(fr.MALA(eps), d, prior(1), N, 3, backend=backend)
    assert wanted.p_value(out.latents) > ALPHA


@pytest.mark.parametrize(("name", "backend"), in_turn((name,) for name in TARGETS))
def test_hmc_from_the_prior_arrives_at_the_target(name, backend):
    prior, d = TARGETS[name]
    out = chains(fr.HMC(0.4, 3), d, prior(F), N // F, 3 * 8, backend=backend)
    assert target_law(name).p_value(out.latents) > ALPHA


@pytest.mark.parametrize("name", TARGETS)
def test_moves_to_fresh_draws_of_the_prior_alone_arrive_at_the_target(name):
    prior, d = TARGETS[name]  # at least a third of the proposals of one element is accepted, wherever the chain is
    out = chains(fr.MALA(0.1, global_every=1), d, prior(1), N // F, 40)
    assert target_law(name).p_value(out.latents) > ALPHA


class OfTheFirst(nn.Module):
    """A logit of the first four elements alone."""

    def __init__(self):
        super().__init__()
        self.d = optimal()

    def forward(self, z):
        return self.d(z[:, :4])


def test_pcn_accepts_as_often_with_500_times_as_many_elements_and_mala_does_not():
    of = {}
    for sampler in (fr.PCN(1.0), fr.MALA(1.0)):
        of[type(sampler)] = [float(chains(sampler, OfTheFirst(), fr.Normal(f), 200, 10).acceptance.mean()) for f in (4, 2000)]
    few, many = of[fr.PCN]
    assert few > 0.5 and abs(few - many) < 0.05  # 4.5 standard errors of 2,000 tests
    assert of[fr.MALA][1] < 0.1 < of[fr.MALA][0]


# Mutants


class NoReverse(fr.MALA):
    """The ratio of the target alone."""

    def test(self, a, evaluation, energy, correction, *rest):
        return super().test(a, evaluation, energy, torch.zeros_like(correction), *rest)

    def kernel(self):
        return None


class Upside:
    """U' - U where U - U' is meant."""

    def energy(self, evaluation):
        energy = super().energy(evaluation)
        return energy._replace(value=-energy.value)

    def kernel(self):
        return None


class UpsideMALA(Upside, fr.MALA):
    pass


class UpsideHMC(Upside, fr.HMC):
    pass


class OneUniform:
    """The same uniform in every test of a chain."""

    def observe(self, a, evaluation, state, step, noise):
        first = type(noise)(noise._seed, noise._id, torch.zeros_like(step), noise._numel, noise._dtype)
        noise.uniform = first.uniform
        return super().observe(a, evaluation, state, step, noise)

    def kernel(self):
        return None


class OneUniformMALA(OneUniform, fr.MALA):
    pass


class OneUniformHMC(OneUniform, fr.HMC):
    pass


class AlwaysMALA(fr.MALA):
    """No test: Langevin dynamics."""

    def test(self, a, evaluation, energy, correction, *rest):
        return super().test(a, evaluation, energy, torch.full_like(correction, torch.inf), *rest)

    def kernel(self):
        return None


class NoPriors(fr.MALA):
    """A fresh draw of the prior is accepted by the ratio of the target, as if it were drawn evenly."""

    def test(self, a, evaluation, energy, correction, state, step, *rest):
        anew = step % self.global_every == 0
        return super().test(a, evaluation, energy, torch.where(anew, 0.0, correction), state, step, *rest)

    def kernel(self):
        return None


class LocalRatio(fr.MALA):
    """A fresh draw of the prior is accepted as if it were a Langevin step."""

    def observe(self, *args):
        return fr.MALA.observe(dataclasses.replace(self, global_every=None), *args)

    def kernel(self):
        return None


class AlwaysAnew(fr.MALA):
    """A fresh draw of the prior is always taken."""

    def test(self, a, evaluation, energy, correction, state, step, *rest):
        anew = step % self.global_every == 0
        return super().test(a, evaluation, energy, torch.where(anew, torch.inf, correction), state, step, *rest)

    def kernel(self):
        return None


class OtherPrior(fr.MALA):
    """Fresh draws are half normals folded into the box."""

    def bind(self, networks):
        class Folding(fr.samplers.Latent):
            def draw(self, xi):
                return self.fold(0.5 * xi)[0]

        return dataclasses.replace(self, latent=Folding(networks.latent().table))

    def kernel(self):
        return None


class NoReversePCN(fr.PCN):
    """The ratio of V alone: that of the proposal without a gradient."""

    def test(self, a, evaluation, energy, correction, *rest):
        return super().test(a, evaluation, energy, torch.zeros_like(correction), *rest)

    def kernel(self):
        return None


class PriorTwice(fr.PCN):
    """The test counts the prior, which is in the proposal already."""

    def energy(self, evaluation):
        return super().energy(evaluation)._replace(value=evaluation.loss - evaluation.log_prior)

    def kernel(self):
        return None


class LangevinNoise(fr.PCN):
    """Noise of MALA's size with the Crank-Nicolson drift."""

    def propose(self, state, step, noise):
        a, _ = super().propose(state, step, noise)
        size = state["step_size"][:, None]
        return a + (torch.sqrt(size) - 4 * torch.sqrt(size) / (4 + size)) * noise.normal(), state

    def kernel(self):
        return None


class UpsidePCN(Upside, fr.PCN):
    pass


class FoldedMALA(fr.MALA):
    """Proposals are folded into the box, the test knows nothing of it."""

    def propose(self, state, step, noise):
        a, state = super().propose(state, step, noise)
        return self.latent.fold(a)[0], state

    def kernel(self):
        return None


class WholeFirstKick(fr.HMC):
    """The momentum's first half step is a whole one."""

    def propose(self, state, step, noise):
        return super().propose({**state, "grad": 2 * state["grad"]}, step, noise)

    def kernel(self):
        return None


class NoLastKick(fr.HMC):
    """The momentum's last half step is left out of H'."""

    def test(self, a, evaluation, energy, correction, state, step, noise):
        before, after = noise.normal(ago=self.leapfrog).double(), state["momentum"].double()
        return super().test(a, evaluation, energy, 0.5 * (before**2 - after**2).sum(1), state, step, noise)

    def kernel(self):
        return None


class NoKinetic(fr.HMC):
    """The ratio of the target alone."""

    def test(self, a, evaluation, energy, correction, *rest):
        return super().test(a, evaluation, energy, torch.zeros_like(correction), *rest)

    def kernel(self):
        return None


class EvenLastKick(fr.HMC):
    """H' is reckoned with the step size before the jitter."""

    def observe(self, *args):
        return dataclasses.replace(self, jitter=0.0)._observe(*args)

    def _observe(self, *args):
        return super().observe(*args)

    def kernel(self):
        return None


class SizeOfEachStep(fr.HMC):
    """Every step within a trajectory draws a size of its own."""

    def jittered(self, state, noise, ago):
        return super().jittered(state, noise, 0)

    def kernel(self):
        return None


class SizeOfTheState(fr.HMC):
    """The size depends on where the trajectory begins, which the way back does not know."""

    def jittered(self, state, noise, ago):
        return state["step_size"][:, None] * (1 + self.jitter * torch.tanh(state["position"].sum(1, keepdim=True)))

    def kernel(self):
        return None


class OneMomentum(fr.HMC):
    """Every trajectory starts from the momentum of the first."""

    def observe(self, a, evaluation, state, step, noise):
        return super().observe(a, evaluation, state, step, self._frozen(noise))

    def propose(self, state, step, noise):
        return super().propose(state, step, self._frozen(noise))

    def _frozen(self, noise):
        first = type(noise)(noise._seed, noise._id, torch.zeros_like(noise._step), noise._numel, noise._dtype)
        noise.normal = lambda stream=0, ago=0: first.normal()
        return noise

    def kernel(self):
        return None


class Slippery(fr.samplers.Latent):
    def fold(self, a):
        folded, odd = super().fold(a)
        return folded, torch.zeros_like(odd)


class NotTurned(fr.HMC):
    """At the walls the position is reflected, the momentum is not."""

    def bind(self, networks):
        return dataclasses.replace(self, latent=Slippery(networks.latent().table))

    def kernel(self):
        return None


MUTANTS = {
    "MALA without the reverse density": (NoReverse(1.3), "gaussian"),
    "MALA with the ratio upside down": (UpsideMALA(0.5), "gaussian"),
    "MALA with one uniform": (OneUniformMALA(1.3), "gaussian"),
    "MALA that accepts everything": (AlwaysMALA(0.1), "gaussian"),
    "fresh draws without the ratio of the priors": (NoPriors(0.1, global_every=1), "gaussian"),
    "fresh draws with MALA's ratio": (LocalRatio(0.5, global_every=2), "gaussian"),
    "fresh draws always taken": (AlwaysAnew(0.1, global_every=4), "gaussian"),
    "fresh draws of another prior": (OtherPrior(0.1, global_every=1), "truncated exponential"),
    "PCN without the reverse density": (NoReversePCN(1.5), "gaussian"),
    "PCN with the prior twice": (PriorTwice(0.5), "gaussian"),
    "PCN with MALA's noise": (LangevinNoise(1.5), "gaussian"),
    "PCN with the ratio upside down": (UpsidePCN(0.5), "gaussian"),
    "MALA that folds": (FoldedMALA(0.3), "truncated exponential"),
    "HMC with the ratio upside down": (UpsideHMC(0.5, 3), "gaussian"),
    "HMC with one uniform": (OneUniformHMC(1.1, 4), "gaussian"),
    "HMC with a whole first kick": (WholeFirstKick(0.5, 3), "gaussian"),
    "HMC without the last kick": (NoLastKick(0.5, 3), "gaussian"),
    "HMC without the kinetic energy": (NoKinetic(0.5, 3), "gaussian"),
    "HMC with a last kick of another size": (EvenLastKick(0.5, 3, jitter=0.5), "gaussian"),
    "HMC with a size for each step": (SizeOfEachStep(0.5, 3, jitter=0.5), "gaussian"),
    "HMC with a size by the state": (SizeOfTheState(0.5, 3, jitter=0.5), "gaussian"),
    "HMC with one momentum": (OneMomentum(0.8, 3), "gaussian"),
    "HMC that does not turn at walls": (NotTurned(0.5, 3), "truncated exponential"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_metropolis_samplers_are_found(mutant):
    assert stationary(*MUTANTS[mutant])[0] < ALPHA


@pytest.mark.parametrize("scale", [0.96, 1.04])
@pytest.mark.parametrize("sampler", [fr.MALA(0.5), fr.MALA(0.5, global_every=2), fr.PCN(0.5), fr.HMC(0.5, 3)], ids=label)
def test_a_logit_scale_4_percent_off_is_found(sampler, scale):
    assert stationary(dataclasses.replace(sampler, logit_scale=scale), "gaussian", 8)[0] < ALPHA


# 25 unequal Gaussians. Power: chains hop between neighbours, so a wrong rule of acceptance empties or fills components.

PLANE = 50_000


def hop(sampler, transitions=5, backend="reference"):
    mixture = Mixture()
    start = mixture.draw(PLANE, 3)
    out = chains(
        sampler,
        Gaussians(mixture),
        fr.Normal(2),
        PLANE,
        transitions * sampler.traits.transition_steps,
        backend=backend,
        start=start,
    )

    return mixture.p_value(out.latents.double()), np.mean(mixture.nearest(start) != mixture.nearest(out.latents))


HOPPING = [fr.HMC(0.17, 2), fr.MALA(0.08), fr.PCN(0.08), fr.MALA(0.08, global_every=2)]
LAME = [NoReverse(0.08), UpsideMALA(0.08), NoKinetic(0.17, 2), NoReversePCN(0.08), NoPriors(0.08, global_every=2)]


@pytest.mark.parametrize(("sampler", "backend"), in_turn((sampler,) for sampler in HOPPING), ids=label)
def test_a_mixture_of_25_unequal_gaussians_is_stationary(sampler, backend):
    p, hopped = hop(sampler, backend=backend)
    assert p > ALPHA
    assert hopped > 0.1


@pytest.mark.parametrize("mutant", LAME, ids=label)
def test_mutants_are_found_on_the_mixture(mutant):
    assert hop(mutant)[0] < ALPHA


def test_from_the_prior_moves_to_fresh_draws_bring_the_shares_of_modes_in_a_tenth_of_the_steps():
    """MALA alone is .016 away after 100 steps and .005 after 300; three standard errors of the largest share are .008."""
    mixture, away = Mixture(), []
    for sampler in (fr.MALA(0.02, global_every=2), fr.MALA(0.02)):
        out = chains(sampler, Gaussians(mixture), fr.Normal(2), 10_000, 30, backend="cpu")
        counts = np.bincount(mixture.nearest(out.latents), minlength=25)
        away.append(np.abs(counts / 10_000 - mixture.shares).max())
    assert away[0] < 0.01 < 0.02 < away[1]


def test_draws_of_the_mixture_pass_their_own_test_and_other_weights_do_not():
    mixture = Mixture()
    assert mixture.p_value(mixture.draw(PLANE, 4)) > ALPHA
    other = Mixture()
    other.weights = np.linspace(1, 2.4, 25) / np.linspace(1, 2.4, 25).sum()
    assert mixture.p_value(other.draw(PLANE, 4)) < ALPHA
    other = Mixture()
    other.sd = 1.03 * mixture.sd
    assert mixture.p_value(other.draw(PLANE, 4)) < ALPHA


# Acceptance


@pytest.mark.parametrize(("sampler", "name", "backend"), in_turn((s, name) for s in (fr.MALA, fr.HMC) for name in TARGETS))
def test_tiny_steps_are_accepted_and_huge_ones_rejected(name, sampler, backend):
    prior, d = TARGETS[name]
    tiny, huge = (chains(sampler(eps), d, prior(20), 200, 20, backend=backend) for eps in (1e-6, 200.0))
    assert tiny.acceptance.mean() > 0.99
    assert not torch.equal(tiny.latents, prior(20).sample(tiny.ids, 0))
    assert huge.acceptance.mean() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sampler", [fr.MALA(0.01), fr.MALA(5.0, target=0.8), fr.PCN(0.01), fr.HMC(4.0, 2, target=0.4)], ids=label
)
def test_adaptation_reaches_the_target_acceptance_and_ends(sampler, backend):
    unit = sampler.traits.transition_steps
    adapt, after = 120 * unit, 40 * unit
    sampler = dataclasses.replace(sampler, adapt=adapt)
    prior, d = TARGETS["gaussian"]
    learned, whole = (chains(sampler, d, prior(10), 100, steps, backend=backend) for steps in (adapt, adapt + after))
    accepted = (whole.acceptance * (adapt + after) - learned.acceptance * adapt) / after
    assert abs(float(accepted.mean()) - sampler.target) < 0.1
    assert torch.equal(learned.step_sizes, whole.step_sizes)
    assert len(whole.step_sizes.unique()) == 100  # each chain has its own
