"""Compiled kernels on a GPU against the float64 reference on the CPU, and what only a GPU can show."""

from dataclasses import replace

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import slots
from fastrefine.samplers import Evaluation
from tests.support.step_machine import SAMPLERS, Options, drive, needs_gpu

pytestmark = needs_gpu

RUNS = {
    "plain": Options(),
    "all options": Options(keep_best=True, lockstep=True, max_grad_norm=1.0),
    "bfloat16 view": Options(keep_best=True, view=torch.bfloat16, view_channels=24),
    "float16 view": Options(max_grad_norm=20.0, view=torch.float16),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.5)], ids=["free", "clamped"])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_compiled_kernels_equal_the_float64_reference(rule, clamp, run):
    """All integers and decisions exactly, float32 numbers to its rounding over a sample's few steps."""
    sampler = SAMPLERS[rule]
    if clamp is not None and not hasattr(sampler, "clamp"):
        pytest.skip("the sampler knows no clamp")
    sampler = replace(sampler, clamp=clamp) if clamp is not None else sampler
    ours = drive("triton", sampler, (37, 24 * 45), torch.float32, RUNS[run], 20)
    theirs = drive("reference", sampler, (37, 24 * 45), torch.float64, RUNS[run], 20)
    for index, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            rtol, atol = {True: (1e-5, 2e-5), False: (0, 0)}[tensor.is_floating_point()]
            if name == "slots.view":
                rtol, atol = torch.finfo(tensor.dtype).eps, 1e-4
            torch.testing.assert_close(
                tensor.double(), wanted[name].double(), rtol=rtol, atol=atol, equal_nan=True,
                msg=lambda text, at=f"step {index}, {name}: ": at + text,
            )  # fmt: skip


def machine(rule, num_slots=64, features=2048, view=None, channels=0):
    """A full machine on the GPU, and an evaluation for it."""
    device = torch.device("cuda")
    own, pool, outputs = slots.allocate(
        num_slots, features, 2 * num_slots, 2 * num_slots, rule, torch.float32, device, None, view, channels
    )
    generator = torch.Generator(device).manual_seed(0)
    pool.activation.normal_(generator=generator)
    pool.last_step.copy_(torch.arange(2 * num_slots) % 5)
    pool.threshold.fill_(torch.inf)
    pool.counters[slots.END] = 2 * num_slots
    grad = torch.randn(num_slots, features, device=device, generator=generator).to(view or torch.float32)
    logit = torch.randn(num_slots, device=device, generator=generator)
    return own, pool, outputs, Evaluation(logit, -logit, grad)


@pytest.fixture
def no_waiting():
    """Any wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def context():
    shapes = [((3, 5), torch.float32), ((7,), torch.uint8)]
    return tuple(tuple(torch.randint(100, (n, *shape), device="cuda").to(dtype) for shape, dtype in shapes) for n in (64, 128))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_neither_a_step_nor_other_numbers_nor_contexts_wait_for_the_device(backend, context, request):
    rule = slots.Rule(SAMPLERS["noise"], 1, max_grad_norm=3.0)
    other = replace(rule, seed=2, max_grad_norm=4.0)
    own, pool, outputs, evaluation = machine(rule)

    def steps(rule):
        for given in (None, evaluation, evaluation._replace(grad=None)):
            ops.refine_step(own, given, pool, outputs, rule, backend=backend)
            ops.copy_context(own, *context, backend=backend)

    steps(rule)  # compiles, and allocates what is kept
    request.getfixturevalue("no_waiting")
    steps(other)


def test_follow_in_a_graph_reads_the_sources_of_each_replay(context):
    own, *_ = machine(slots.Rule(SAMPLERS["sgd"], 0))
    mine, pool = context
    ops.copy_context(own, mine, pool, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_context(own, mine, pool, backend="triton")
    for shift in (0, 40):
        own.source.copy_(torch.arange(64, device="cuda") + shift)
        own.source[5] = -1
        wanted = [
            torch.where(own.source.view(-1, *[1] * (c.dim() - 1)) >= 0, p[own.source], c)
            for c, p in zip(mine, pool, strict=True)
        ]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_kernels_run_on_the_current_stream():
    """Kernels on another stream would not wait for what is queued on this one."""
    rule = slots.Rule(SAMPLERS["sgd"], 0)
    own, pool, outputs, evaluation = machine(rule)
    ops.refine_step(own, None, pool, outputs, rule, backend="triton")
    before = own.activation.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        evaluation.grad.fill_(1.0)
        ops.refine_step(own, evaluation, pool, outputs, rule, backend="triton")
    torch.cuda.synchronize()
    moved = own.step == 1
    assert moved.any()
    torch.testing.assert_close(own.activation[moved], before[moved] - 0.3)


def test_repeated_steps_give_the_same_bits():
    """A race inside a kernel would show here; blocks with a view and channels have the most of them."""
    rule = slots.Rule(SAMPLERS["backtracking"], 0, keep_best=True, max_grad_norm=10.0)

    def run():
        own, pool, outputs, evaluation = machine(rule, 256, 64 * 100, torch.bfloat16, 64)
        ops.refine_step(own, None, pool, outputs, rule, backend="triton")
        for _ in range(12):
            ops.refine_step(own, evaluation, pool, outputs, rule, backend="triton")
        return [outputs.activation[:-1], outputs.steps[:-1], own.view, pool.counters]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
