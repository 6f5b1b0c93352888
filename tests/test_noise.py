"""Noise: known answers, parity of the backends, and independence of everything but (seed, id, step, element)."""

import importlib

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import Stream, philox, registry

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


def draw(backend, *args, op=ops.normal):
    """An op of a backend, on the device where it runs; the result on the CPU."""
    if registry.available()[backend] != "ok":
        pytest.skip(registry.available()[backend])
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    return op(*moved, backend=backend).cpu()


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


@pytest.mark.parametrize("numel", [1, 7, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_draw_the_same_normals(backend, seed, dtype, numel):
    args = (seed, torch.tensor([0, 2**32 - 1, 2**31]), torch.tensor([0, 7, 1000], dtype=torch.int32))
    args = (*args, numel, Stream.LATENT, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(draw(backend, *args), draw("reference", *args), rtol=0, atol=tolerance)


@pytest.mark.parametrize("numel", [1, 7, 1025])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_draw_the_same_uniforms(backend, seed, numel):
    args = seed, torch.tensor([0, 2**32 - 1, 2**31]), torch.tensor([0, 7, 1000], dtype=torch.int32), numel, Stream.LATENT
    assert torch.equal(draw(backend, *args, op=ops.uniform), draw("reference", *args, op=ops.uniform))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_noise_of_a_sample_does_not_depend_on_its_slot_or_batch(backend):
    ids, step = torch.tensor([5, 9, 2, 9]), torch.tensor([1, 4, 0, 4])
    whole = draw(backend, 3, ids, step, 10, 0, torch.float32)
    alone = draw(backend, 3, ids[1:2], step[1:2], 10, 0, torch.float32)
    longer = draw(backend, 3, ids, step, 14, 0, torch.float32)
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(whole[1], whole[3])
    assert torch.equal(whole, longer[:, :10])


@pytest.mark.parametrize("other", [{"seed": 4}, {"sample_id": 6}, {"step": 2}, {"stream": 1}])
def test_each_of_seed_id_step_and_stream_changes_the_noise(other):
    def drawn(seed=3, sample_id=5, step=1, stream=0):
        return ops.normal(seed, torch.tensor([sample_id]), torch.tensor([step]), 8, stream, torch.float64)

    assert not (drawn() == drawn(**other)).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_noise_is_standard_normal(backend):
    """N = 200,000, alpha 1e-4 each: 5 % too much noise is 32 standard errors of the variance away."""
    x = draw(backend, 11, torch.arange(200), torch.zeros(200, dtype=torch.int64), 1000, 0, torch.float64).flatten()
    n = len(x)
    assert abs(x.mean()) < 3.9 / n**0.5
    assert abs(x.var() - 1) < 3.9 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 3.9 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 3.9 * (96 / n) ** 0.5
    pairs = x.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 3.9 / (n / 2) ** 0.5
    assert x.abs().max() <= 5.78


def test_uniforms_are_open_and_uniform():
    u = ops.uniform(5, torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 100, Stream.ACCEPT).flatten()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 3.9 * (1 / 12 / len(u)) ** 0.5
    assert abs(u.var() - 1 / 12) < 3.9 * (1 / 180 / len(u)) ** 0.5


def test_torch_generators_are_left_alone():
    before = torch.random.get_rng_state()
    ops.normal(1, torch.arange(4), torch.zeros(4), 9, 0, torch.float32)
    assert torch.equal(before, torch.random.get_rng_state())
