"""The experiment on 25 Gaussians: its measures on known samples, its quadrature against a law in closed form."""

import json
import math

import pytest
import torch
from torch import nn

import fastrefine as fr
from benchmarks.papers import gaussians25, imbalanced8
from benchmarks.papers.latent_law import LatentGrid
from benchmarks.papers.plane import DOT25, at_random25, earth_mover, evenly25, quality25
from benchmarks.papers.run import run
from fastrefine.networks import recording


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_real_samples_are_of_high_quality_in_all_modes():
    measured = quality25(at_random25(200_000, random()))
    inside = 1 - math.exp(-8)  # Rayleigh, 4 sigma
    assert abs(measured["high_quality"] - inside) < 3.9 * math.sqrt(inside * (1 - inside) / 200_000)
    assert measured["modes"] == 25
    assert max(abs(share - 0.04) for share in measured["shares"]) < 4.8 * math.sqrt(0.04 * 0.96 / 200_000)
    assert measured["std"] == pytest.approx(DOT25.sigma, rel=0.01)


def test_a_sample_is_good_up_to_four_sigma_and_counts_for_its_mode_alone():
    middle = DOT25.points().float()
    away = torch.tensor([[0.999], [1.001], [5.0]]) * torch.tensor([[0.6, 0.8]]) * 4 * DOT25.sigma
    x = torch.cat([middle[7] + away, middle[24:]])
    assert DOT25.modes_of(x)[0].tolist() == [7, -1, -1, 24]
    measured = quality25(x)
    assert (measured["high_quality"], measured["modes"]) == (0.5, 2)
    assert [i for i, share in enumerate(measured["shares"]) if share > 0] == [7, 24]
    assert measured["shares"][7] == 0.25


def test_the_std_of_the_good_is_about_their_own_centres():
    offset = torch.tensor([0.01, 0.03])
    x = torch.cat([DOT25.points().float() + offset, torch.full((5, 2), 9.0)])
    assert quality25(x)["std"] == pytest.approx(math.sqrt((0.01**2 + 0.03**2) / 2), rel=1e-4)


def test_even_batches_hold_every_mode_equally_often():
    x = evenly25(100, random(3))
    nearest = torch.cdist(x, DOT25.points().float()).argmin(1)
    assert torch.bincount(nearest).tolist() == [4] * 25


def test_earth_movers_distance_of_a_shift_is_its_length():
    x = at_random25(300, random(1))
    shift = torch.tensor([0.003, 0.004])
    assert earth_mover(x[torch.randperm(300, generator=random(2))], x + shift) == pytest.approx(0.005, rel=1e-3)


def gaussian_case():
    """G(z) = A z + c, d(x) = -|x - m|^2 / (2 s^2): p0 exp(w d) is normal, with this mean, covariance and log normaliser."""
    g = nn.Linear(2, 2)
    with torch.no_grad():
        g.weight.copy_(torch.tensor([[0.8, 0.3], [-0.2, 0.5]]))
        g.bias.copy_(torch.tensor([0.1, -0.2]))
    m, s, w = torch.tensor([0.4, 0.3], dtype=torch.float64), 0.6, 1.7
    a, c = g.weight.detach().double(), g.bias.detach().double()
    precision = torch.eye(2, dtype=torch.float64) + w / s**2 * a.T @ a
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (w / s**2 * a.T @ (m - c))
    constant = -w / (2 * s**2) * (m - c).square().sum() + 0.5 * mean @ precision @ mean
    log_normaliser = float(constant - 0.5 * torch.logdet(precision))
    return g, lambda x: -(x.double() - m).square().sum(1) / (2 * s**2), w, mean, covariance, log_normaliser


def test_quadrature_finds_the_gaussian_law_of_a_linear_generator_and_a_quadratic_logit():
    g, d, w, mean, covariance, log_normaliser = gaussian_case()
    grid = LatentGrid(g, points=200)
    law = grid.law(d(grid.images), w)
    z = grid.latents
    assert law.log_normaliser == pytest.approx(log_normaliser, abs=2e-5)
    found = torch.tensor([law.mean(z[:, 0]), law.mean(z[:, 1])], dtype=torch.float64)
    assert torch.allclose(found, mean, atol=2e-5)
    away = z - mean
    for i in range(2):
        for j in range(2):
            assert law.mean(away[:, i] * away[:, j]) == pytest.approx(float(covariance[i, j]), abs=2e-5)
    assert abs(grid.law(d(grid.images), 1.0).log_normaliser - log_normaliser) > 0.1, "the scale of the logit has no effect"


def test_shares_of_the_law_are_the_mass_of_the_cells_of_a_mode():
    grid = LatentGrid(nn.Identity(), points=400)
    half = torch.where(grid.latents[:, 0] > 1, 1, torch.where(grid.latents[:, 0] < -1, 0, -1))
    shares = grid.law(torch.zeros(400**2)).shares(half, 3)
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    assert shares.tolist() == pytest.approx([tail, tail, 0.0], abs=1e-5)


def test_samples_of_the_law_have_its_moments():
    g, d, w, mean, covariance, _ = gaussian_case()
    grid = LatentGrid(g, points=200)
    n = 200_000
    z = grid.latents[grid.law(d(grid.images), w).sample(n, random(4))]
    assert ((z.mean(0) - mean).abs() < 4.1 * (covariance.diag() / n).sqrt()).all()
    assert ((z.var(0) / covariance.diag() - 1).abs() < 4.1 * math.sqrt(2 / n) + 1e-3).all()  # cells are .05 wide: h^2/12


def test_every_row_stands_beside_its_law(quick_run):
    pytest.importorskip("matplotlib")
    folder, result = quick_run("gaussians25")
    rows = [row for row in result["rows"] if row["version"] == "[DDLS]"]
    assert {"generator", "DRS", "MH", "DDLS (ULA), eps .0002", "collaborative"} <= {row["name"] for row in rows}
    laws = result["laws"]
    for row in rows:
        law = laws[row["energy"] if row["energy"] != "none" else "fitted"]
        furthest = max(abs(a - b) for a, b in zip(row["shares"], law["shares"], strict=True))
        assert row["share_distance"] == pytest.approx(furthest, abs=1e-4), row["name"]
    for name in ("samples", "mixing", "densities"):
        assert (folder / f"{name}.png").stat().st_size > 0


def test_fitting_a_discriminator_traces_its_networks_no_oftener_for_more_iterations(monkeypatch):
    traced = []
    record = recording.record
    monkeypatch.setattr("fastrefine.networks.recording.record", lambda *a, **k: traced.append(1) or record(*a, **k))

    def times(iterations):
        traced.clear()
        real = at_random25(64, random())
        fr.fit_discriminator(
            nn.Linear(2, 2), real, iterations, prior=fr.Normal(2), discriminator=nn.Linear(2, 1), batch_size=8, check_every=100
        )
        return len(traced)

    assert 0 < times(2) == times(6)


def test_a_run_that_is_cut_in_the_training_of_cs_has_left_the_other_grid(quick_run, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, record = quick_run("gaussians25")
    (folder / "result.json").unlink()

    def cut(table):
        raise KeyboardInterrupt

    monkeypatch.setattr(imbalanced8.MixtureTable, "rows", cut)
    with pytest.raises(KeyboardInterrupt):
        run(gaussians25, "gaussians25", folder, seeds=(0,), quick=True)
    left = json.loads((folder / "result.json").read_text())
    assert left["rows"][-1]["status"] == "not run"
    assert [row["name"] for row in left["rows"][:-1]] == [row["name"] for row in record["rows"] if row["version"] == "[DDLS]"]
    assert left["claims"] and not any("[CS]" in claim["claim"] for claim in left["claims"])
