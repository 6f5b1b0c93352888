"""The step-size experiment: its data, its measures on known input, its claims on known rows, and that it runs."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
from fastrefine.experiments import rings, step_control

SHARES = torch.tensor(rings.SHARES, dtype=torch.float64)


def rows_of(values, control, name="ring", key="good", other="kl"):
    return [
        {"set": name, "control": control, "step_size": size, "seed": seed, key: value, other: 1.0, "mean_steps": 3.0}
        for size, value in values.items()
        for seed in (0, 1)
    ]


def verdicts(rows, key="good"):
    return [claim["holds"] for claim in step_control.claims(rows) if claim["quality"] == key]


# --- data


@pytest.mark.parametrize("n", [1000, 997, 64])
def test_a_batch_of_the_ring_has_each_component_at_its_share(n):
    x = rings.draw_ring(n, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cdist(x.double(), rings.centres()).argmin(1), minlength=8)
    assert counts.sum() == n and ((counts - n * SHARES).abs() < 1).all()


def test_the_rings_components_are_gaussians_of_the_published_width():
    n = 20_000
    x = rings.draw_ring(n, torch.Generator().manual_seed(1)).double()
    away = x - rings.centres()[torch.cdist(x, rings.centres()).argmin(1)]
    ratio = float(away.square().mean()) / 0.1414**2  # mean of 2n squares: sd 1/sqrt(n); 3.9 sd is 1e-4
    assert abs(ratio - 1) < 3.9 / math.sqrt(n)
    assert abs((1.1 * 0.1414) ** 2 / 0.1414**2 - 1) > 3.9 / math.sqrt(n)  # a width 10 % too large is seen
    assert float(rings.centres().norm(dim=1).mean()) == pytest.approx(10 / 1.414)


def test_the_roll_lies_on_its_spiral_with_the_scaled_noise():
    x = rings.draw_roll(2000, torch.Generator().manual_seed(0))
    t = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 3000)
    distance = torch.cdist(x, torch.stack([t * t.cos(), t * t.sin()], 1) * 10 / 15).min(1).values
    assert float(distance.max()) < 6 * 0.25 * 10 / 15
    assert float(distance.square().mean().sqrt()) == pytest.approx(0.25 * 10 / 15, rel=0.06)


# --- measures


def test_perfect_shares_have_no_divergence_and_only_good_samples():
    x = rings.centres().repeat_interleave((600 * SHARES).round().long(), 0).float()
    found = rings.measure_ring(x)
    assert found["good"] == 1 and found["modes"] == 8 and found["std"] < 1e-5
    assert found["kl"] == pytest.approx(0, abs=1e-12) and found["js"] == pytest.approx(0, abs=1e-12)


def test_bad_samples_count_in_js_and_not_in_kl():
    good = rings.centres().repeat_interleave((600 * SHARES).round().long(), 0)
    found = rings.measure_ring(torch.cat([good, torch.zeros(600, 2)]))
    assert found["good"] == 0.5 and found["kl"] == pytest.approx(0, abs=1e-12)
    js = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) + 0.5 * math.log(1 / 0.75)
    assert found["js"] == pytest.approx(js)


def test_kl_is_of_the_model_against_the_data():
    assert rings.measure_ring(rings.centres()[:1].repeat(10, 1))["kl"] == pytest.approx(math.log(1 / 0.45))
    assert rings.measure_ring(rings.centres()[2:3].repeat(10, 1))["kl"] == pytest.approx(math.log(60))


def test_good_ends_at_four_sigma():
    away = torch.tensor([[3.99, 0], [0, -3.99], [4.01, 0], [0, 4.01]]) * rings.SIGMA
    assert rings.measure_ring(rings.centres()[3] + away)["good"] == 0.5


def test_without_any_good_sample_kl_is_infinite_and_js_ln_2():
    found = rings.measure_ring(torch.zeros(5, 2))
    assert found["good"] == 0 and found["kl"] == math.inf and found["js"] == pytest.approx(math.log(2))


def test_the_roll_is_measured_by_the_nearest_real_sample():
    real = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    x = torch.tensor([[0.0, 0.5], [10.0, 1.0], [3.0, 0.0], [10.0, 0.7]])
    found = rings.measure_roll(x, real)
    assert found["distance"] == pytest.approx((0.5 + 1 + 3 + 0.7) / 4) and found["good"] == 0.5


# --- training


def test_training_approaches_the_data():
    training = replace(rings.ROLL, steps=60, batch_size=100)
    z, real = (
        torch.randn(500, 2, generator=torch.Generator().manual_seed(2)),
        rings.draw_roll(2000, torch.Generator().manual_seed(1)),
    )
    raw, trained = rings.networks(training, 0)[0], rings.train(training, rings.draw_roll, 0)[0]
    with torch.no_grad():
        before, after = (rings.measure_roll(g(z), real)["distance"] for g in (raw, trained))
    assert after < 0.7 * before


def test_training_repeats_its_bits_ends_in_eval_mode_and_leaves_torchs_state_alone():
    training, state = replace(rings.RING, steps=3, batch_size=50), torch.get_rng_state()
    (g, d), (again, _), (other, _) = (rings.train(training, rings.draw_ring, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and not g.training and not d.training
    assert all(torch.equal(a, b) for a, b in zip(g.parameters(), again.parameters(), strict=True))
    assert not torch.equal(g[0].weight, other[0].weight)


def test_the_published_optimizer_is_plain_sgd():
    training = replace(rings.RING, steps=1, batch_size=50, rates=(0.0, 1e-2))
    (_, d), (g0, d0) = rings.train(training, rings.draw_ring, 0), rings.networks(training, 0)
    random = torch.Generator().manual_seed(0)
    fake = g0.train()(torch.randn(50, 2, generator=random)).detach()
    real = rings.draw_ring(50, random)
    softplus = torch.nn.functional.softplus
    (softplus(-d0(real)).mean() + softplus(d0(fake)).mean()).backward()
    for trained, start in zip(d.parameters(), d0.parameters(), strict=True):
        torch.testing.assert_close(trained, start - 1e-2 * start.grad)


# --- claims


GOOD_FIXED, GOOD_OURS = {0.1: 0.8, 1.0: 0.9, 10.0: 0.1}, {0.1: 0.88, 1.0: 0.9, 10.0: 0.87}


def test_all_claims_hold_where_backtracking_is_flat_and_good():
    rows = rows_of({None: 0.7}, "none") + rows_of(GOOD_FIXED, "fixed") + rows_of(GOOD_OURS, "backtracking")
    assert verdicts(rows) == [True] * 5


@pytest.mark.parametrize(
    ("fixed", "ours", "raw", "failing"),
    [
        (GOOD_FIXED, GOOD_OURS | {0.1: 0.83}, 0.7, {0}),  # not flat
        ({0.1: 0.84, 1.0: 0.9, 10.0: 0.85}, GOOD_OURS, 0.7, {1}),  # fixed steps do as well
        ({0.1: 0.1, 1.0: 0.97, 10.0: 0.1}, GOOD_OURS, 0.7, {2, 3}),  # control costs quality
        (GOOD_FIXED | {0.1: 0.95}, GOOD_OURS, 0.7, {3}),  # at one step size alone; the best are still alike
        (GOOD_FIXED, GOOD_OURS, 0.93, {4}),  # refinement harms
    ],
)
def test_a_claim_that_does_not_hold_says_so(fixed, ours, raw, failing):
    rows = rows_of({None: raw}, "none") + rows_of(fixed, "fixed") + rows_of(ours, "backtracking")
    assert {i for i, holds in enumerate(verdicts(rows)) if not holds} == failing


def test_relative_qualities_are_compared_by_their_ratio():
    def found(worst):
        key = {"name": "MNIST", "key": "frechet_distance", "other": "classifier_score"}
        rows = rows_of({None: 200.0}, "none", **key) + rows_of({0.1: 300.0, 1.0: 100.0}, "fixed", **key)
        return verdicts(rows + rows_of({0.1: worst, 1.0: 100.0}, "backtracking", **key), "frechet_distance")[0]

    assert found(124.0) and not found(126.0)


def test_a_curve_is_the_mean_over_seeds():
    rows = [{"set": "ring", "control": "fixed", "step_size": 0.1, "good": value} for value in (0.2, 0.6)]
    assert step_control.curve(rows, "ring", "fixed", "good") == {0.1: pytest.approx(0.4)}


# --- the whole


def test_the_quick_run_leaves_a_record_of_every_row_and_a_picture(tmp_path, capsys):
    record = step_control.run(tmp_path, recipe=step_control.QUICK, seed=3)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse) == json.loads(json.dumps(record))
    assert record["experiment"] == "step_control" and record["reduced"] and record["seeds"]["sampling"] == [3]
    sets = [name for name in step_control.QUALITIES if name != "MNIST"]
    assert [row["set"] for row in record["rows"]] == [name for name in sets for _ in range(3)]
    for row in record["rows"]:
        assert (row["mean_steps"] == 0) == (row["control"] == "none")
        assert (row["step_sizes_reached"] is None) == (row["control"] != "backtracking") or row["control"] == "none"
    assert len(record["claims"]) == 2 * 5 * len(sets)
    assert 10_000 < (tmp_path / "step-control.png").stat().st_size < 120_000
    assert capsys.readouterr().err.count("\n") == len(record["rows"])
