"""Contexts are copied with the proposals that slots took: every backend against a plain loop."""

import copy

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import slots
from fastrefine.ops.copy_context import over_all_slots
from tests.support.step_machine import SAMPLERS, device_of

EVERY = ["reference", "cpu", "triton"]
S, P = 5, 9
MIXES = {
    "words": [((3, 7), torch.float32), ((1,), torch.int64), ((2100,), torch.int32), ((2, 2), torch.bfloat16)],
    "bytes": [((5,), torch.uint8), ((3,), torch.float32), ((), torch.bool), ((3,), torch.float16)],
    "one": [((4,), torch.float64)],
}


def context_of(mix, count, generator, device):
    """Random bits as tensors of each shape and dtype; numbers small enough for every dtype."""
    return tuple(
        torch.randint(0, 100, (count, *shape), generator=generator).to(dtype).to(device) for shape, dtype in MIXES[mix]
    )


def slots_at(device, source):
    own, _, _ = slots.allocate(S, 2, P, P, slots.Rule(SAMPLERS["sgd"], 0), torch.float32, torch.device(device))
    own.source.copy_(torch.tensor(source))
    return own


@pytest.mark.parametrize("source", [[-1] * S, [3, -1, 8, 0, -1], [4, 5, 6, 7, 8]], ids=str)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("backend", EVERY)
def test_rows_follow_their_samples_and_all_others_stay(backend, mix, source):
    device, generator = device_of(backend), torch.Generator().manual_seed(1)
    own, pool = (context_of(mix, n, generator, device) for n in (S, P))
    wanted = [c.clone() for c in own]
    for tensor, rows in zip(wanted, pool, strict=True):
        for slot, row in enumerate(source):
            if row >= 0:
                tensor[slot] = rows[row]
    before = [p.clone() for p in pool]
    ops.copy_context(slots_at(device, source), own, pool, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((*own, *pool), (*wanted, *before), strict=True))


@pytest.mark.parametrize("backend", EVERY)
def test_nothing_to_carry_is_no_work(backend):
    ops.copy_context(slots_at(device_of(backend), [1] * S), (), (), backend=backend)


@pytest.mark.parametrize("mix", MIXES)
def test_the_reference_over_all_slots_equals_the_one_over_few(mix):
    """What the reference does on devices that it must not wait for, on CPU tensors."""
    generator = torch.Generator().manual_seed(1)
    own, pool = (context_of(mix, n, generator, "cpu") for n in (S, P))
    few, source = [c.clone() for c in own], torch.tensor([3, -1, 8, 0, -1])
    ops.copy_context(slots_at("cpu", source.tolist()), tuple(few), pool)
    over_all_slots(source, own, pool)
    assert all(torch.equal(a, b) for a, b in zip(own, few, strict=True))


def test_the_table_of_addresses_is_made_once_and_again_for_other_tensors():
    device, generator = device_of("triton"), torch.Generator().manual_seed(1)
    own, pool = (context_of("one", n, generator, device) for n in (S, P))
    machine = slots_at(device, [4, 5, 6, 7, 8])
    ops.copy_context(machine, own, pool, backend="triton")
    table = machine.cache["triton.copy_context"]
    ops.copy_context(machine, own, pool, backend="triton")
    assert machine.cache["triton.copy_context"] is table
    other = tuple(torch.zeros_like(c) for c in own)
    ops.copy_context(machine, other, pool, backend="triton")
    assert torch.equal(other[0], pool[0][4:]) and machine.cache["triton.copy_context"] is not table
    twin = copy.deepcopy(machine)
    assert twin.cache["triton.copy_context"] is None


def test_triton_refuses_what_it_would_read_wrongly():
    device = device_of("triton")
    machine = slots_at(device, [0] * S)
    good = torch.zeros(P, 4, device=device)
    for own in (
        torch.zeros(4, S, device=device).t(),
        torch.zeros(S, 4, device=device).half(),
        torch.zeros(S, 3, device=device),
    ):
        with pytest.raises(AssertionError):
            ops.copy_context(machine, (own,), (good,), backend="triton")
