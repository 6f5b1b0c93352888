"""Noise: known answers, the same draws in every backend's step, nothing but (seed, id, step, stream, element) matters."""

import importlib

import pytest
import torch

from fastrefine import ops
from fastrefine.noise import Stream, normal, philox, uniform
from fastrefine.ops import registry, slots
from fastrefine.samplers import DGflow, Evaluation
from tests.support.step_machine import SAMPLERS, Options, compare, device_of, drive, driven

SEEDS = (0, 1, 2**31 + 5, 1234567890123, 2**63 + 5, 2**64 - 1)
# Random123 kat_vectors, philox4x32 10: counter, key, answer
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


def drawn_by_a_step(backend, seed, ids, step, numel, dtype):
    """(S, numel) normals that the backend's step adds, at noise of one standard deviation, to samples at the origin."""
    rule, device = slots.Rule(DGflow(1.0, gamma=0.5), seed), torch.device(device_of(backend))
    own, pool, outputs = slots.allocate(len(ids), numel, 1, 1, rule, dtype, device)
    own.sample_id.copy_(ids)
    own.step.copy_(step)
    own.last_step.fill_(2**31 - 1)
    own.threshold.fill_(torch.inf)
    nothing = own.threshold.new_zeros(len(ids))
    ops.refine_step(own, Evaluation(nothing, nothing, torch.zeros_like(own.activation)), pool, outputs, rule, backend=backend)
    return own.activation.cpu()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_native_philox_gives_the_known_answers(counter, key, answer):
    if registry.available()["cpu"] != "ok":
        pytest.skip(registry.available()["cpu"])
    native = importlib.import_module("fastrefine._native")
    assert native.philox(key[0] | key[1] << 32, *counter) == answer


IDS, STEP = torch.tensor([0, 2**32 - 1, 2**31]), torch.tensor([0, 7, 1000], dtype=torch.int32)


# Every seed meets every number of elements and both types, which meet each other.
DRAWS = [
    (seed, numel, (torch.float32, torch.float64)[(s + n) % 2])
    for s, seed in enumerate(SEEDS)
    for n, numel in enumerate((1, 7, 1025))
]


@pytest.mark.parametrize(("seed", "numel", "dtype"), DRAWS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_step_draws_the_same_normals(backend, seed, dtype, numel):
    found = drawn_by_a_step(backend, seed, IDS, STEP, numel, dtype)
    wanted = normal(seed, IDS, STEP, numel, Stream.PROPOSAL, dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("seed", "rule"), [(seed, ("mala", "hmc")[s % 2]) for s, seed in enumerate(SEEDS)])
def test_every_step_draws_the_same_uniforms(backend, rule, seed):
    """Those of a test's acceptance, and of HMC's jitter."""
    args = (SAMPLERS[rule], (5, 3), torch.float64, Options(seed=seed), 7)
    compare(drive(backend, *args), driven("reference", *args))


def test_other_draws_than_the_references_are_found():
    """A stream, a step, an id, a seed or an element that is not the reference's shows in every number."""
    found = drawn_by_a_step("reference", 3, IDS, STEP, 7, torch.float64)
    for wrong in (
        normal(3, IDS, STEP, 7, Stream.ACCEPT, torch.float64), normal(3, IDS, STEP + 1, 7, 0, torch.float64),
        normal(3, IDS ^ 1, STEP, 7, 0, torch.float64), normal(2, IDS, STEP, 7, 0, torch.float64),
        normal(3, IDS, STEP, 8, 0, torch.float64)[:, 1:],
    ):  # fmt: skip
        assert not (wrong == found).any()


def test_noise_of_a_sample_does_not_depend_on_its_slot_or_batch():
    ids, step = torch.tensor([5, 9, 2, 9]), torch.tensor([1, 4, 0, 4])
    whole = normal(3, ids, step, 10, 0, torch.float32)
    alone = normal(3, ids[1:2], step[1:2], 10, 0, torch.float32)
    longer = normal(3, ids, step, 14, 0, torch.float32)
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(whole[1], whole[3])
    assert torch.equal(whole, longer[:, :10])


@pytest.mark.parametrize("other", [{"seed": 4}, {"sample_id": 6}, {"step": 2}, {"stream": 1}])
def test_each_of_seed_id_step_and_stream_changes_the_noise(other):
    def drawn(seed=3, sample_id=5, step=1, stream=0):
        return normal(seed, torch.tensor([sample_id]), torch.tensor([step]), 8, stream, torch.float64)

    assert not (drawn() == drawn(**other)).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_noise_is_standard_normal(backend):
    """N = 200,000, alpha 1e-4 each: 5 % too much noise is 32 standard errors of the variance away."""
    x = drawn_by_a_step(backend, 11, torch.arange(200), torch.zeros(200, dtype=torch.int32), 1000, torch.float64).flatten()
    n = len(x)
    assert abs(x.mean()) < 3.9 / n**0.5
    assert abs(x.var() - 1) < 3.9 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 3.9 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 3.9 * (96 / n) ** 0.5
    pairs = x.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 3.9 / (n / 2) ** 0.5
    assert x.abs().max() <= 5.78


def test_uniforms_are_open_and_uniform():
    u = uniform(5, torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 100, Stream.ACCEPT).flatten()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 3.9 * (1 / 12 / len(u)) ** 0.5
    assert abs(u.var() - 1 / 12) < 3.9 * (1 / 180 / len(u)) ** 0.5


def test_torch_generators_are_left_alone():
    before = torch.random.get_rng_state()
    normal(1, torch.arange(4), torch.zeros(4), 9, 0, torch.float32)
    assert torch.equal(before, torch.random.get_rng_state())
