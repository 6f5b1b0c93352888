"""The networks' view of the activation: written with it, in its own dtype and order; gradients come back the same way."""

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import slots
from fastrefine.samplers import Evaluation
from tests.support.step_machine import SAMPLERS, Options, bound, compare, device_of, drive

SHAPES = {0: (3, 11), 3: (3, 12), 40: (2, 2000)}  # by channels; the last has several tiles each way, cut off at the edges


def reordered(activation, channels):
    """(S, C P) -> (S, P C)."""
    return activation.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1) if channels else activation


VIEWS = [torch.float32, torch.float16, torch.bfloat16]
RULES = ["backtracking", "adam", "noise", "ddls", "mala", "hmc", "dot_adam"]
# Every rule meets every view and every order, every view meets every order.
MET = [(rule, VIEWS[(r + c) % 3], channels) for r, rule in enumerate(RULES) for c, channels in enumerate(SHAPES)]


@pytest.mark.parametrize(("rule", "view", "channels"), MET, ids=str)
def test_triton_equals_the_reference(rule, view, channels):
    options = Options(keep_best=True, max_grad_norm=1.0, view=view, view_channels=channels)
    args = (SAMPLERS[rule], SHAPES[channels], torch.float32, options, 6)
    compare(drive("triton", *args), drive("reference", *args))


def test_triton_equals_the_reference_in_float64():
    args = (SAMPLERS["momentum"], (2, 12), torch.float64, Options(view=torch.float64, view_channels=4))
    compare(drive("triton", *args), drive("reference", *args))


@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_view_is_the_rounded_activation_after_every_step(backend, view, channels):
    options = Options(view=view, view_channels=channels)
    records = drive(backend, SAMPLERS["sgd"], SHAPES[channels], torch.float32, options, steps=4)
    for index, record in enumerate(records):
        wanted = reordered(record["slots.activation"], channels).to(view)
        truncated = backend == "triton" and view == torch.bfloat16 and not torch.cuda.is_available()
        rtol = 2**-7 if truncated else 0  # the interpreter truncates to bfloat16
        torch.testing.assert_close(record["slots.view"], wanted, rtol=rtol, atol=0, msg=f"step {index}")


@pytest.mark.parametrize("rule", SAMPLERS)
def test_the_order_of_the_view_changes_no_bit_of_the_samples(rule):
    """The same gradients through a view in another order, and without a view; noise goes by the activation's order."""

    def run(channels):
        view = torch.float32 if channels else None
        sampler = bound(SAMPLERS[rule], 12, torch.float32, "cpu")
        rule_ = slots.Rule(sampler, seed=5)
        own, pool, outputs = slots.allocate(2, 12, 4, 4, rule_, torch.float32, torch.device("cpu"), None, view, channels)
        generator = torch.Generator().manual_seed(0)
        pool.activation.normal_(generator=generator)
        pool.last_step.fill_(3)
        pool.threshold.fill_(torch.inf)
        pool.counters[slots.END] = 4
        ops.refine_step(own, None, pool, outputs, rule_)
        while pool.counters[slots.LIVE] > 0:
            grad = torch.randn(2, 12, generator=generator)
            evaluation = Evaluation(torch.zeros(2), torch.zeros(2), reordered(grad, channels))
            ops.refine_step(own, evaluation, pool, outputs, rule_)
        return outputs.activation[:4]

    assert torch.equal(run(0), run(3))


def test_the_step_of_the_cpu_has_no_view():
    device_of("cpu")
    with pytest.raises(AssertionError, match="the networks read the activation itself"):
        drive("cpu", SAMPLERS["sgd"], (2, 4), torch.float32, Options(view=torch.float32), 1)
