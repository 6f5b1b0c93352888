"""What chains and optimal transport ask of the Triton step beyond parity: the last gradient, tables, numbers in results."""

import math
from dataclasses import replace

import pytest
import torch

from fastrefine import ops, slots
from fastrefine.samplers import Evaluation, Latent
from tests.step_machine import SAMPLERS, bound, device_of

S, F = 2, 5
BACKENDS = ["reference", "triton"]


def machine(backend, sampler, last_step, dtype=torch.float64):
    """Filled slots, the outputs, and a step with the same logit and gradient for both slots."""
    device = device_of(backend)
    rule = slots.Rule(bound(sampler, F, dtype, device), 3)
    own, pool, outputs = slots.allocate(S, F, S, S, rule, dtype, torch.device(device))
    pool.activation.copy_(torch.linspace(-0.9, 0.9, S * F).view(S, F))
    pool.last_step.fill_(last_step)
    pool.threshold.fill_(torch.inf)
    pool.counters[slots.END] = S

    def step(logit=0.0, grad=0.1):
        number = own.activation.new_full((S,), logit)
        gradient = None if grad is None else torch.full_like(own.activation, grad)
        ops.refine_step(own, Evaluation(number, -number, gradient), pool, outputs, rule, backend=backend)

    ops.refine_step(own, None, pool, outputs, rule, backend=backend)
    return own, outputs, step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["mala", "hmc", "ddls", "dot_adam", "dot_sgd"])
def test_a_last_gradient_that_is_not_finite_ends_chains_with_a_test_alone(rule, backend):
    _, outputs, step = machine(backend, SAMPLERS[rule], last_step=0)
    step(logit=1.0, grad=math.nan)
    wanted = slots.NONFINITE if rule in ("mala", "hmc") else slots.EXHAUSTED
    assert outputs.status[:S].tolist() == [wanted] * S and outputs.logit[:S].tolist() == [1.0] * S


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "steps"), [("mala", 1), ("hmc", 2)])
def test_the_test_of_the_last_trial_reads_its_gradient(rule, steps, backend):
    """A gradient far too steep for the way back is rejected, a level one is accepted."""

    def accepted(last):
        _, outputs, step = machine(backend, SAMPLERS[rule], last_step=steps)
        for _ in range(steps):
            step()
        step(logit=50.0, grad=last)
        names = ("energy", "step_size", "accepted")
        return outputs.scalars[names.index("accepted"), :S].tolist()

    assert accepted(0.1) == [1.0] * S and accepted(1e3) == [0.0] * S


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["dot_adam", "dot_sgd"])
def test_a_last_evaluation_without_gradient_reports_the_direction_of_none(rule, backend):
    """As with a gradient of 0 or one that is not finite, but not as with another."""

    def numbers(last):
        _, outputs, step = machine(backend, SAMPLERS[rule], last_step=1)
        step()
        step(grad=last)
        assert outputs.status[:S].tolist() == [slots.EXHAUSTED] * S
        return outputs.scalars[:, :S].tolist()

    assert numbers(None) == numbers(0.0) == numbers(math.inf) != numbers(0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_is_never_given_an_evaluation_without_gradient(backend):
    *_, step = machine(backend, SAMPLERS["mala"], last_step=0)
    with pytest.raises(AssertionError, match="MALA"):
        step(grad=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["ddls", "hmc", "dot_clip"])
def test_nothing_leaves_a_bounded_prior(rule, backend):
    """DDLS and HMC fold even what is thrown far outside, DOT clips."""
    own, _, step = machine(backend, SAMPLERS[rule], last_step=8)
    _, low, high = bound(SAMPLERS[rule], F, torch.float64, "cpu").latent.table
    for grad in (300.0, -1000.0, 40.0):
        step(grad=grad)
        trial = own.activation.cpu()
        assert (trial >= low).all() and (trial <= high).all()
    assert trial[:, 0].abs().max() > 2 or rule == "dot_clip"  # Adam's steps are short; the first element is free


def test_triton_refuses_a_prior_in_another_type():
    sampler = SAMPLERS["mala"]
    device = device_of("triton")
    table = bound(sampler, F, torch.float64, device).latent.table
    rule = slots.Rule(replace(sampler, latent=Latent(table)), 0)
    own, pool, outputs = slots.allocate(S, F, S, S, rule, torch.float32, torch.device(device))
    with pytest.raises(AssertionError, match="float64"):
        ops.refine_step(own, None, pool, outputs, rule, backend="triton")
