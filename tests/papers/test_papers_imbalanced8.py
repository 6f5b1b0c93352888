"""Data in the plane and what is measured of samples of it, on known input."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch

from benchmarks.papers import imbalanced8
from benchmarks.papers.cells import Cells
from benchmarks.papers.plane import EARLY, draw_roll, measure_roll
from benchmarks.papers.plane import IMBALANCED8 as RING
from benchmarks.papers.run import Fresh

SHARES = torch.tensor(RING.shares, dtype=torch.float64)


# --- data


@pytest.mark.parametrize("n", [1000, 997, 64])
def test_a_batch_of_the_ring_has_each_component_at_its_share(n):
    x = RING.draw(n, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cdist(x.double(), RING.points()).argmin(1), minlength=8)
    assert counts.sum() == n and ((counts - n * SHARES).abs() < 1).all()


def test_the_rings_components_are_gaussians_of_the_published_width():
    n = 20_000
    x = RING.draw(n, torch.Generator().manual_seed(1)).double()
    away = x - RING.points()[torch.cdist(x, RING.points()).argmin(1)]
    ratio = float(away.square().mean()) / 0.1414**2  # mean of 2n squares: sd 1/sqrt(n); 3.9 sd is 1e-4
    assert abs(ratio - 1) < 3.9 / math.sqrt(n)
    assert abs((1.1 * 0.1414) ** 2 / 0.1414**2 - 1) > 3.9 / math.sqrt(n)  # a width 10 % too large is seen
    assert float(RING.points().norm(dim=1).mean()) == pytest.approx(10 / 1.414)


def test_the_roll_lies_on_its_spiral_with_the_scaled_noise():
    x = draw_roll(2000, torch.Generator().manual_seed(0))
    t = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 3000)
    distance = torch.cdist(x, torch.stack([t * t.cos(), t * t.sin()], 1) * 10 / 15).min(1).values
    assert float(distance.max()) < 6 * 0.25 * 10 / 15
    assert float(distance.square().mean().sqrt()) == pytest.approx(0.25 * 10 / 15, rel=0.06)


# --- measures


def test_perfect_shares_have_no_divergence_and_only_good_samples():
    x = RING.points().repeat_interleave((600 * SHARES).round().long(), 0).float()
    found = RING.measure(x)
    assert found["good"] == 1 and found["modes"] == 8 and found["std"] < 1e-5
    assert found["kl"] == pytest.approx(0, abs=1e-12) and found["js"] == pytest.approx(0, abs=1e-12)


def test_bad_samples_count_in_js_and_not_in_kl():
    good = RING.points().repeat_interleave((600 * SHARES).round().long(), 0)
    found = RING.measure(torch.cat([good, torch.zeros(600, 2)]))
    assert found["good"] == 0.5 and found["kl"] == pytest.approx(0, abs=1e-12)
    js = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) + 0.5 * math.log(1 / 0.75)
    assert found["js"] == pytest.approx(js)


def test_kl_is_of_the_model_against_the_data():
    assert RING.measure(RING.points()[:1].repeat(10, 1))["kl"] == pytest.approx(math.log(1 / 0.45))
    assert RING.measure(RING.points()[2:3].repeat(10, 1))["kl"] == pytest.approx(math.log(60))


def test_good_ends_at_four_sigma():
    away = torch.tensor([[3.99, 0], [0, -3.99], [4.01, 0], [0, 4.01]]) * RING.sigma
    assert RING.measure(RING.points()[3] + away)["good"] == 0.5


def test_without_any_good_sample_kl_is_infinite_and_js_ln_2():
    found = RING.measure(torch.zeros(5, 2))
    assert found["good"] == 0 and found["kl"] == math.inf and found["js"] == pytest.approx(math.log(2))


def test_the_roll_is_measured_by_the_nearest_real_sample():
    real = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    x = torch.tensor([[0.0, 0.5], [10.0, 1.0], [3.0, 0.0], [10.0, 0.7]])
    found = measure_roll(x, real)
    assert found["distance"] == pytest.approx((0.5 + 1 + 3 + 0.7) / 4) and found["good"] == 0.5


# --- training


def test_training_approaches_the_data():
    plane = EARLY.smaller(100)
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
    real = draw_roll(2000, torch.Generator().manual_seed(1))
    raw, trainer = plane.networks(0)[0], plane.trainer(draw_roll, 0)
    assert list(trainer.advance(60))
    with torch.no_grad():
        before, after = (measure_roll(g(z), real)["distance"] for g in (raw, trainer.generator))
    assert after < 0.7 * before


def test_fresh_batches_differ_and_come_again_in_the_same_order():
    fresh = Fresh(RING.draw, 5, 0)
    batches = iter(fresh)
    a, b, again = next(batches), next(batches), next(iter(fresh))
    assert not torch.equal(a, b) and torch.equal(a, again)


# --- the control of the ring: proposals of two generators


def test_each_half_of_two_generators_has_latents_of_their_law():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, z):
            seen.append(z)
            return torch.full_like(z, self.value)

    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    first = imbalanced8.Halves(Recorder(1.0), Recorder(2.0))(z)[:, 0] == 1
    assert abs(first.float().mean() - 0.5) < 0.02
    for half in (seen[0][first], seen[1][~first]):  # each coordinate N(0, 1); false alarm below 1e-6 each
        for values in (half[:, 0], half[:, 1], half.sum(1) / 2**0.5):
            assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 1e-6


def test_the_control_refines_the_proposals_of_both_with_a_discriminator_shaped_on_both(tmp_path):
    recipe = replace(
        imbalanced8.QUICK, checkpoints=(2, 4), shaping_iterations=2, max_steps=2, samples=40, chain_length=2, reference=100
    )
    table = imbalanced8.MixtureTable(Cells(tmp_path, recipe), recipe, 0, RING)
    pairs = table.pairs()
    rows = list(table.covered(4))
    assert [row["name"] for row in rows][:2] == ["refine, covering proposals", imbalanced8.COVERED]
    whole = table.discriminator("shaped", 4, *pairs[4])
    both = table.discriminator("shaped", 4, *pairs[4], ", covering")  # as it was kept
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), both.parameters(), strict=True))
    assert list(table.covered(4)) == rows
