"""The step's rules of a latent where numbers are large: far features, far reflections, step sizes at their bounds."""

import pytest
import torch

import fastrefine as fr
from fastrefine.ops import slots
from fastrefine.samplers import DDLS, DOT, HMC, MALA, Collaborative, DGflow, Latent, step_control
from tests.support.step_machine import Options, bound, compare, device_of, drive

BACKENDS = ("cpu", "triton")
BOX = Latent(torch.tensor([[1, 0, 1], [-8, -8, -9], [8, 8, 9]], dtype=torch.float64))
FAR = {
    "noise": DGflow(0.3, gamma=0.5), "momentum": Collaborative(0.3, optimizer="momentum"), "ddls": DDLS(0.3, 0.8),
    "mala": MALA(0.001, adapt=3), "hmc": HMC(0.02, leapfrog=2), "dot_adam": DOT(0.3, lipschitz=2.0),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAR)
def test_features_beyond_a_block_equal_the_reference(rule):
    """C++ works in blocks of 2048 features: prior, noise and vectors of a later one are its own."""
    args = (FAR[rule], (2, 2500), torch.float64, Options(), 10)
    records = drive("reference", *args)
    compare(drive("cpu", *args), records)
    assert records[-1]["pool.counters"][slots.FINISHED] > 0


@pytest.mark.parametrize("sampler", [DDLS(300.0, 1.0), HMC(10.0, leapfrog=2)], ids=["ddls", "hmc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reflections_over_many_periods_equal_the_reference(backend, sampler):
    expected, found = (drive(b, sampler, (3, 7), torch.float64, None, 8) for b in ("reference", backend))
    # steps of 300, and forces of 8 and more between two reflections, multiply what a rounding does
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours["slots.activation"], theirs["slots.activation"], rtol=1e-8, atol=1e-8)
    _, low, high = bound(sampler, 7, torch.float64, "cpu").latent.table
    inside = torch.isfinite(low)
    moved = torch.cat([r["slots.activation"][r["slots.step"] > 0] for r in expected])[:, inside]
    assert len(moved) and (moved >= low[inside]).all() and (moved <= high[inside]).all()


@pytest.mark.parametrize("name", ["mala", "hmc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapted_step_sizes_stop_at_their_bounds(backend, name, monkeypatch):
    monkeypatch.setattr(step_control, "SMALLEST", 0.9)
    monkeypatch.setattr(step_control, "LARGEST", 1.1)
    options = dict(adapt=100, target=0.5, latent=BOX)
    sampler = MALA(0.05, **options) if name == "mala" else HMC(0.1, leapfrog=2, **options)
    args = (sampler, (3, 3), torch.float64, Options(), 16)
    expected = drive("reference", *args)
    compare(drive(backend, *args), expected)
    sizes = torch.cat([r["state.step_size"] for r in expected])
    assert sizes.min() == 0.9 * sampler.step_size and sizes.max() == 1.1 * sampler.step_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_number_is_a_schedule_too(backend, dtype):
    args = (DDLS(0.3, 0.8), (3, 7), dtype)
    compare(drive(backend, *args), drive("reference", *args))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("sampler", [DDLS(0.3, 0.0), DOT(0.3, lipschitz=2.0)], ids=["ddls", "dot"])
def test_what_the_prior_or_the_transport_moves_is_not_stalled(backend, sampler):
    def still(evaluation):
        return evaluation if evaluation.grad is None else evaluation._replace(grad=torch.zeros_like(evaluation.grad))

    records = drive(backend, sampler, (3, 7), torch.float64, None, 20, still)
    met = torch.cat([r["outputs.status"] for r in records]).unique().tolist()
    assert slots.EXHAUSTED in met and slots.STALLED not in met


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_transport_from_the_origin_divides_by_no_length(backend):
    device_of(backend)
    torch.manual_seed(0)
    z = torch.randn(5, 4)
    z[2] = 0
    networks = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    with fr.use_backend(backend):
        out = fr.Refiner(*networks, fr.DOT(0.01), prior=fr.Normal(4), max_steps=3, num_slots=4).refine(z)
    assert (out.status == fr.Status.EXHAUSTED).all() and out.latents.isfinite().all()
    assert out.latents[2].abs().max() > 0
