"""[CS0]'s experiments: what their rows are made of and measured by, their claims on known rows, and that they run."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.papers import cs0, plane, result_file
from benchmarks.papers.cells import Cells

pytest.importorskip("matplotlib")
EIGHT, ROLL = cs0.PAPERS.values()
QUICK = ROLL.QUICK
TINY = QUICK.but(
    plane=replace(QUICK.plane, hidden=(16,)), checkpoints=(2, 4), shaping_iterations=2, max_steps=3, samples=100, real=100,
    reference=50, rules=("adaptive", "ladam"),
)  # fmt: skip
GOOD = {"early": 0.3, "frozen": 0.4, "frozen, adaptive": 0.4, "tuned": 0.5, "shaped": 0.9, "optimal": 0.8}


def table(tmp_path, recipe=TINY):
    return cs0.ShapingTable(Cells(tmp_path, recipe), recipe, 0, ROLL.cases[0])


def rows_of(good, second_seed=None):
    """Rows of two seeds, the second one's with other shares where given; the distance is one less the share of good ones."""
    return [
        {"seed": seed, "data": "roll", "name": name, "good": share, "distance": 1 - share, "good_few": share - 0.1}
        for seed, shares in ((0, good), (1, {**good, **(second_seed or {})}))
        for name, share in shares.items()
    ]


def failing(rows, goals=None):
    """Of good: against D as it is and tuned, against all others, trained on; then the goal: which of them fail."""
    verdicts = [claim["holds"] for claim in cs0.claims(rows, goals or {})]
    return {index - 3 for index, holds in enumerate(verdicts) if not holds and index >= 3}


# --- measures


def test_good_on_eight_gaussians_means_near_a_real_sample_and_strictly_near_a_centre():
    centre = torch.tensor(plane.GAUSSIANS8.centres[2])
    real = (centre + torch.tensor([0.0, 0.1]))[None]
    x = centre + torch.tensor([[0.0, 0.24], [0.0, 0.26], [0.1, 0.0], [0.0, 0.11]])  # .14, .16, .141, .01 from the real one
    found = EIGHT.cases[0].measure(x, real)
    assert found["good"] == 0.75
    assert found["good_3_sigma"] == 0.25  # 3 sigma are .106


def test_both_sets_of_eight_gaussians_have_their_own_shares():
    equal, unequal = (case.draw(800, torch.Generator().manual_seed(0)) for case in EIGHT.cases)
    first_two = torch.tensor(plane.GAUSSIANS8.centres[:2])
    shares = [float((torch.cdist(x, first_two).min(1).values < 1).double().mean()) for x in (equal, unequal)]
    assert shares == pytest.approx([0.25, 0.8], abs=0.005)


def test_every_published_row_is_one_of_ours():
    assert all(tuple(rows) == cs0.NAMES for rows in cs0.PUBLISHED.values())


# --- rows


def test_tuned_and_shaped_start_from_the_early_discriminator_and_keep_its_generator(tmp_path):
    pairs = table(tmp_path, replace(TINY, shaping_iterations=0)).pairs()
    for name in ("frozen", "tuned", "shaped"):
        for ours, early in zip(pairs[name], pairs["early"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), early.parameters(), strict=True))
    assert not torch.equal(pairs["optimal"][0][0].weight, pairs["early"][0][0].weight)


def test_shaping_sees_refined_samples_and_tuning_raw_ones(tmp_path):
    pairs = table(tmp_path).pairs()
    early, tuned, shaped = (pairs[name][1][0].weight for name in ("early", "tuned", "shaped"))
    assert not torch.equal(early, tuned) and not torch.equal(early, shaped) and not torch.equal(tuned, shaped)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(table, rows) with five real samples in a batch, and 500 in all."""
    one = table(tmp_path_factory.mktemp("rows"), TINY.but(checkpoints=(150, 151), real=500, few=5))
    return one, {row["name"]: row for row in one.rows()}


def test_only_the_rows_between_early_and_optimal_are_refined(rows):
    steps = {name: row["mean_steps"] for name, row in rows[1].items()}
    assert steps.pop("early") == steps.pop("optimal") == 0
    assert {"frozen, adaptive", "tuned, ladam", "shaped, stopped"} < set(steps)
    stopped = {name for name, mean in steps.items() if mean < TINY.max_steps}
    assert stopped == {name for name in steps if name.endswith("stopped")}


def test_a_row_is_measured_against_many_real_samples_and_against_a_batch(rows):
    assert rows[1]["early"]["distance"] < rows[1]["early"]["distance_few"]


def test_missed_is_what_the_real_samples_lack(rows):
    one, found = rows
    distances = torch.cdist(one.real, one.points("early")).min(1).values
    assert found["early"]["missed"] == pytest.approx(float(distances.mean()), rel=1e-4)


# --- claims


def test_all_claims_hold_where_shaped_is_best():
    assert all(claim["holds"] for claim in cs0.claims(rows_of(GOOD), {"roll": 0.9}))


@pytest.mark.parametrize(
    ("change", "second_seed", "wrong"),
    [
        ({}, {"tuned": 0.95}, {0, 1}),  # one seed of two
        ({"frozen, adaptive": 0.95}, {}, {1}),  # another step rule
        ({"early": 0.95}, {}, {1}),  # refinement harms
        ({"optimal": 0.95}, {}, {2}),
        ({"shaped": 0.85}, {}, {3}),  # the goal
        ({"frozen": 0.95}, {}, {0, 1}),
    ],
)
def test_a_claim_that_does_not_hold_says_so(change, second_seed, wrong):
    assert failing(rows_of(GOOD | change, second_seed), {"roll": 0.9}) == wrong


def test_seeds_decide_and_the_claim_shows_each():
    """Nine of ten are enough, eight are not."""
    for lost, holds in ((1, True), (2, False)):
        rows = [
            {"seed": seed, "data": "roll", "name": name, "distance": 0.0,
             "good": 0.95 if name == "tuned" and seed < lost else good}
            for seed in range(10) for name, good in GOOD.items()
        ]  # fmt: skip
        found = next(claim for claim in cs0.claims(rows, {}) if "good of refinement" in claim["claim"])
        assert found["holds"] == holds
        assert found["seeds_won"] == f"{10 - lost} of 10" and found["needed"] == 9
        assert found["false_alarm"] == pytest.approx(11 / 1024)
        assert found["tuned"] == [0.95] * lost + [0.5] * (10 - lost) and found["shaped"] == [0.9] * 10


@pytest.mark.parametrize(
    ("seeds", "needed", "false_alarm"), [(1, 1, 0.5), (3, 3, 0.125), (5, 5, 1 / 32), (8, 7, 9 / 256), (20, 15, 21700 / 2**20)]
)
def test_a_sign_test_asks_for_what_chance_rarely_reaches(seeds, needed, false_alarm):
    for wins in (needed - 1, needed):
        found = result_file.by_seeds("a claim", [True] * wins + [False] * (seeds - wins))
        assert (found["holds"], found["needed"]) == (wins == needed, needed)
        assert found["false_alarm"] == pytest.approx(false_alarm)


def test_a_lower_distance_is_the_better_one():
    rows = rows_of(GOOD)
    for row in rows:
        row["distance"] = row["good"]
    assert [claim["holds"] for claim in cs0.claims(rows, {})] == [False] * 3 + [True] * 3


def test_published_figures_stand_beside_the_mean_over_seeds_of_either_measure():
    rows = [{**row, "distance_few": 0.4} for row in rows_of(GOOD, {"shaped": 0.7})]
    found = cs0.comparison(rows, {"roll": {"shaped": (0.16, 0.66)}})
    ours = {row["metric"]: (row["published"], row["ours"], row["headline"]) for row in found}
    assert ours["good, 10,000 real samples"] == (0.66, pytest.approx(0.8), False)
    assert ours["good, one batch of real samples"] == (0.66, pytest.approx(0.7), True)
    assert ours["distance, one batch of real samples"] == (0.16, pytest.approx(0.4), True)


# --- pictures


class Slope(nn.Module):
    """d(x) = 9 x_1: high above the middle."""

    def forward(self, x):
        return 9 * x[:, 1]


def test_a_landscape_is_bright_where_the_discriminator_is_high():
    height = cs0.landscape(Slope(), 2.0)
    assert height.shape == (cs0.GRID,) * 2
    assert (height[0] < 1e-6).all() and (height[-1] > 1 - 1e-6).all()  # rows go along y, from below
    assert torch.equal(height[:, 0], height[:, -1])
