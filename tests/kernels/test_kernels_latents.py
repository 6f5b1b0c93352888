"""What chains and optimal transport ask of the Triton step beyond parity: the last gradient, tables, numbers in results."""

import math
from dataclasses import replace

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import slots
from fastrefine.samplers import DDLS, DOT, HMC, MALA, PCN, Evaluation, Latent
from tests.support.step_machine import SAMPLERS, bound, compare, device_of, record

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


SMOOTH = {
    "mala": MALA(0.5, adapt=4), "hmc": HMC(0.5, leapfrog=2, adapt=4, jitter=0.5),
    "mala_global": MALA(0.5, adapt=4, global_every=2), "pcn": PCN(0.5, adapt=4), "ddls": DDLS((0.3, 0.2), 0.8),
    "dot_adam": DOT(0.1, lipschitz=3.0), "dot_sgd": DOT(0.1, "sgd", lipschitz=3.0, projection="published"),
}  # fmt: skip
WIDE = 12  # features on the smooth target


def on_a_smooth_target(backend, rule, dtype=torch.float64, view=None, channels=0, max_grad_norm=None):
    """Records of six samples whose gradients are those of their logits, so that tests accept and reject."""
    device = torch.device(device_of(backend))
    rule_ = slots.Rule(bound(SMOOTH[rule], WIDE, dtype, device), 9, max_grad_norm=max_grad_norm)
    own, pool, outputs = slots.allocate(3, WIDE, 6, 6, rule_, dtype, device, None, view, channels)
    generator = torch.Generator().manual_seed(1)
    pool.activation.copy_(torch.randn(6, WIDE, generator=generator).clamp(-0.5, 0.5))
    weight, centre = (torch.randn(WIDE, generator=generator).to(device, dtype) for _ in range(2))
    pool.last_step.copy_(torch.tensor([4, 6, 2, 4, 6, 4]))
    pool.threshold.fill_(torch.inf)
    pool.counters[slots.END] = 6
    records = []
    ops.refine_step(own, None, pool, outputs, rule_, backend=backend)
    while pool.counters[slots.LIVE] > 0:
        away = own.activation - centre
        loss, grad = (weight.abs() * away**2).sum(1) / 2, weight.abs() * away
        grad = grad.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1) if channels else grad
        ops.refine_step(own, Evaluation(-loss, loss, grad.to(view or dtype)), pool, outputs, rule_, backend=backend)
        records.append(record(own, pool, outputs))
    return records


FORMS = [  # dtype, view, channels, norm
    (torch.float64, None, 0, None), (torch.float32, torch.bfloat16, 4, None), (torch.float64, torch.float64, 3, 2.0),
    (torch.float32, None, 0, 2.0),
]  # fmt: skip
# Chains with a test sum over the features in every form; the others meet both types, with a view and without.
SUMMED = [(rule, form) for r, rule in enumerate(SMOOTH) for form in (FORMS if r < 2 else FORMS[r % 2 * 2 :][:2])]


@pytest.mark.parametrize(("rule", "dtype", "view", "channels", "norm"), [(rule, *form) for rule, form in SUMMED], ids=str)
def test_chains_on_a_smooth_target_equal_the_reference(rule, dtype, view, channels, norm):
    runs = [on_a_smooth_target(backend, rule, dtype, view, channels, norm) for backend in ("triton", "reference")]
    compare(*runs)
    if SMOOTH[rule].traits.needs_last_gradient:
        accepted, steps = (runs[1][-1][f"outputs.{name}"] for name in ("scalars", "steps"))
        assert 0 < accepted[2].sum() < (steps // SMOOTH[rule].traits.transition_steps).sum()


@pytest.mark.parametrize("rule", ["mala", "hmc", "dot_sgd"])
def test_sums_that_take_the_view_for_the_activation_are_found(rule, monkeypatch):
    """Mutant: elements of the gradient meet those of other places."""
    expected = on_a_smooth_target("reference", rule, view=torch.float64, channels=3)
    launch = pytest.importorskip("fastrefine.kernels.launch")
    kernel = launch.refine_reduce

    class Unordered:
        def __getitem__(self, grid):
            return lambda *args, **constants: kernel[grid](*args, **{**constants, "REORDERED": False})

    monkeypatch.setattr(launch, "refine_reduce", Unordered())
    with pytest.raises(AssertionError, match="step"):
        compare(on_a_smooth_target("triton", rule, view=torch.float64, channels=3), expected)


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
@pytest.mark.parametrize("met", [(math.nan, 5.0), (0.0, math.inf)], ids=["logit", "gradient"])
def test_a_trajectory_crosses_a_point_that_is_not_finite_without_its_gradient(met, backend):
    def after(*numbers):
        own, _, step = machine(backend, HMC(0.3, leapfrog=3), last_step=3)
        step()
        step(*numbers)
        return own.activation.tolist()

    assert after(*met) == after(0.0, 0.0) != after(0.0, 5.0)


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
