"""What a captured step has baked in: recorded launches, repeated as a CUDA graph repeats them, serve another rule."""

from dataclasses import replace

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import slots
from fastrefine.samplers import DDLS, DOT, HMC, MALA, PCN, DGflow, Evaluation, Latent
from tests.support.step_machine import SAMPLERS, Recorder, bound, device_of, needs_gpu, random_evaluation, record

S, F, P = 2, 5, 4


class Tape:
    """Launches with their kernels, addresses and numbers, all as they were when recorded."""

    def __init__(self, monkeypatch):
        self.launches = []
        launch = pytest.importorskip("fastrefine.kernels.launch")
        for name in ("refine_reduce", "refine_decide", "refine_apply"):
            monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), self.launches))

    def replay(self):
        for kernel, args, constants in self.launches:
            kernel(*args, **constants)


def filled(own, pool, outputs):
    """As new: every slot empty, the pool full."""
    generator = torch.Generator().manual_seed(3)
    pool.activation.copy_(torch.randn(P, F, generator=generator))
    pool.reference_logit.copy_(torch.randn(P, generator=generator))
    pool.last_step.fill_(3)
    pool.threshold.fill_(torch.inf)
    pool.counters.copy_(torch.tensor([0, P, 0, 0, 0, 0, 0, 0]))
    own.sample_id.fill_(-1)
    outputs.status.fill_(slots.PENDING)


def on_tape(step, monkeypatch):
    with monkeypatch.context() as patch:
        tape = Tape(patch)
        step()
    return tape.replay


def in_a_graph(step, monkeypatch):
    step()  # what a first call does cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def changed(sampler):
    """Another sampler of the same kind, with other numbers and tables everywhere, and it with the tables it had."""
    if isinstance(sampler, DGflow):
        return replace(sampler, step_size=0.07, gamma=0.1), None
    if sampler.latent is None:
        return replace(sampler, step_size=0.07, clamp=(-1.0, 0.75)), None
    numbers = {
        DDLS: dict(step_size=(0.2, 0.1), noise_scale=(0.3, 0.6, 0.5)), MALA: dict(step_size=0.07, adapt=2, target=0.2),
        PCN: dict(step_size=0.07, adapt=2, target=0.2),
        HMC: dict(step_size=0.07, adapt=3, leapfrog=3, jitter=0.9), DOT: dict(step_size=0.07, lipschitz=1.5),
    }  # fmt: skip
    other = replace(sampler, **numbers[type(sampler)])
    if getattr(sampler, "global_every", None):
        return replace(other, global_every=3), None
    if isinstance(sampler, PCN):  # of one table alone, which it does not read
        return other, None
    precision, low, high = sampler.latent.table
    latent = Latent(torch.stack([1.5 - precision, low.clamp(min=-2) * 0.5, high.clamp(max=3) * 0.5]))
    if isinstance(sampler, DDLS):
        return other.over(latent), other.over(sampler.latent)
    return replace(other, latent=latent), other


@pytest.mark.parametrize("recorded", [on_tape, pytest.param(in_a_graph, marks=needs_gpu)])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_recorded_launches_serve_another_rule_of_the_same_kind(rule, recorded, monkeypatch):
    device = device_of("triton")
    sampler = bound(SAMPLERS[rule], F, torch.float32, device)
    sampler = replace(sampler, clamp=(-2.0, 2.0)) if hasattr(sampler, "clamp") else sampler
    old = slots.Rule(sampler, 1, keep_best=True, max_grad_norm=9.0)
    other, half = changed(sampler)
    new = slots.Rule(other, 2**63 + 7, keep_best=True, max_grad_norm=1.5)
    assert ops.baked(old, "triton") == ops.baked(new, "triton")

    def machine(rule):
        return slots.allocate(S, F, P, P, rule, torch.float32, torch.device(device))

    generator = torch.Generator().manual_seed(4)
    script = [random_evaluation(S, F, torch.float32, generator) for _ in range(6)]  # a sample has four evaluations
    script = [e._replace(grad=torch.ones(S, F) if e.grad is None else e.grad) for e in script]

    def eagerly(rule, backend="triton"):
        eager, records = machine(rule), []
        filled(*eager)
        ops.refine_step(eager[0], None, *eager[1:], rule, backend=backend)
        for evaluation in script:
            given = Evaluation(*(t.to(device) for t in evaluation[:3]))
            ops.refine_step(eager[0], given, *eager[1:], rule, backend=backend)
            records.append(record(*eager))
        return records

    expected = eagerly(new)
    if half is not None:  # the tables matter
        runs = [eagerly(rule, "reference") for rule in (new, replace(new, sampler=half))]
        assert not torch.equal(*(torch.stack([r["slots.activation"] for r in run]) for run in runs))

    own = machine(old)
    filled(*own)
    ops.refine_step(own[0], None, *own[1:], old, backend="triton")
    given = Evaluation(*(torch.zeros_like(t, device=device) for t in script[0][:3]))
    replay = recorded(lambda: ops.refine_step(own[0], given, *own[1:], old, backend="triton"), monkeypatch)
    filled(*own)
    ops.refine_step(own[0], None, *own[1:], new, backend="triton")
    for index, evaluation in enumerate(script):
        for buffer, numbers in zip(given[:3], evaluation[:3], strict=True):
            buffer.copy_(numbers)
        replay()
        for name, tensor in record(*own).items():
            assert torch.equal(tensor.nan_to_num(9), expected[index][name].nan_to_num(9)), (index, name)


RULE = slots.Rule(SAMPLERS["momentum"], 0)
OTHER_KINDS = [
    replace(RULE, keep_best=True),
    replace(RULE, lockstep=True),
    replace(RULE, max_grad_norm=1.0),
    replace(RULE, sampler=replace(SAMPLERS["momentum"], clamp=(0.0, 1.0))),
    replace(RULE, sampler=SAMPLERS["sgd"]),
    replace(RULE, sampler=SAMPLERS["noise"]),
    replace(RULE, sampler=DGflow(0.3, gamma=0.0)),
]


def test_only_what_selects_the_code_is_baked_into_triton_kernels():
    kinds = [RULE, *OTHER_KINDS[:-1]]
    assert len({ops.baked(rule, "triton") for rule in kinds}) == len(kinds)
    assert ops.baked(OTHER_KINDS[-1], "triton") == ops.baked(OTHER_KINDS[4], "triton")  # flow without noise is sgd
    chains = [slots.Rule(bound(SAMPLERS[name], F, torch.float32, "cpu"), 0) for name in ("ddls", "mala", "hmc", "dot_clip")]
    ddls, dot = chains[0].sampler, chains[-1].sampler
    chains += [replace(RULE, sampler=replace(dot, latent=None)), replace(RULE, sampler=replace(ddls, noise_scale=0.0))]
    chains += [replace(RULE, sampler=replace(ddls, step_size=0.1, noise_scale=1.0).over(ddls.latent))]
    assert len({ops.baked(rule, "triton") for rule in kinds + chains}) == len(kinds) + len(chains)
    numbers = replace(RULE, seed=5, sampler=replace(SAMPLERS["momentum"], step_size=0.1, momentum=0.5))
    assert ops.baked(numbers, "triton") == ops.baked(RULE, "triton")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_backends_bake_in_the_whole_rule(backend):
    assert ops.baked(RULE, backend) == RULE != ops.baked(replace(RULE, seed=1), backend)


def test_each_kind_of_rule_keeps_its_own_scratch():
    device = device_of("triton")
    own, pool, outputs = slots.allocate(S, F, P, P, RULE, torch.float32, torch.device(device))
    ops.refine_step(own, None, pool, outputs, RULE, backend="triton")
    kinds = own.cache["triton"]
    (first,) = kinds.values()
    ops.refine_step(own, None, pool, outputs, replace(RULE, seed=9), backend="triton")
    assert list(kinds.values()) == [first] and first.seed.item() == 9
    ops.refine_step(own, None, pool, outputs, OTHER_KINDS[2], backend="triton")
    assert len(kinds) == 2
    ops.refine_step(own, None, pool, outputs, RULE, backend="triton")
    assert len(kinds) == 2 and first.seed.item() == 0
