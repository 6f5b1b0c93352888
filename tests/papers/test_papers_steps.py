"""The experiments on step control and on stop rules: what a row is made of, and their claims on known rows."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from benchmarks.papers import cases, step_control, steps
from benchmarks.papers.cases import Case, Quality
from benchmarks.papers.cells import Cells
from benchmarks.papers.run import Table


def rows_of(values, control, name="ring", key="good", other="kl"):
    return [
        {"set": name, "control": control, "step_size": size, "seed": seed, key: value, other: 1.0, "mean_steps": 3.0}
        for size, value in values.items()
        for seed in (0, 1)
    ]


def verdicts(rows, key="good"):
    return [claim["holds"] for claim in step_control.claims(rows) if claim["quality"] == key]


class Bowl(nn.Module):
    """Logit 1 - |x|^2 / 8."""

    def forward(self, x):
        return 1 - x.square().sum(1) / 8


def case(name="ring"):
    """Proposals N(0, 9 I) that climb into a bowl, real data N(0, I); measured by their mean distance from the bottom."""
    g = nn.Linear(2, 2, bias=False)
    g.weight.data = 3 * torch.eye(2)
    real = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    return Case(name, g, Bowl(), "output", 2, real, lambda x: {"js": float(x.norm(dim=1).mean()), "good": 0.5, "kl": 0.5}, 64)


# --- claims on step control


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
    rows = [
        {"control": c, "step_size": z, "good": v} for c, z, v in (("fixed", 0.1, 0.2), ("fixed", 0.1, 0.6), ("none", 0.1, 9))
    ]
    assert cases.curve(rows, "step_size", "good", control="fixed") == {0.1: pytest.approx(0.4)}


# --- rows


NAME = "ring, D shaped at a uniform step"


def test_the_ring_is_trained_once_and_shaped_at_either_stop(tmp_path):
    ring = replace(cases.QUICK_RING, hidden=(8,))
    recipe = steps.QUICK.but(ring=ring, ring_steps=2, shaping_iterations=1, shaping_batch=20, shaping_steps=2)
    table = Table(Cells(tmp_path, recipe), recipe, 0)
    uniform, median = (steps.trained_case(table, "ring", at) for at in steps.SHAPED_AT)
    assert [case.name for case in (uniform, median)] == [f"ring, D shaped at {at}" for at in steps.SHAPED_AT]
    assert torch.equal(uniform.generator[0].weight, median.generator[0].weight)
    assert not torch.equal(uniform.discriminator[0].weight, median.discriminator[0].weight)


@pytest.mark.parametrize("control", ["fixed", "backtracking"])
def test_a_row_of_k_steps_is_what_a_run_of_k_steps_gives(control, tmp_path):
    recipe, slow = steps.FULL.but(ks=(0, 1, 8), hazards=()), case(NAME)
    rows = list(islice(steps.sweep(Table(Cells(tmp_path, recipe), recipe, 5), slow, {control: 1.0}, 100), 3))
    assert [(row["rule"], row["parameter"], row["mean_steps"]) for row in rows] == [(steps.FIXED, k, k) for k in recipe.ks]
    for row in rows[1:]:
        out = slow.refiner(control, 1.0, row["parameter"], None).sample(100, seed=5)
        assert row["js"] == pytest.approx(slow.measure(out.images)["js"], rel=1e-5)
    assert rows[0]["js"] > 1.05 * rows[1]["js"] > 1.1 * rows[2]["js"], "the steps change nothing"


def test_every_stop_rule_has_its_rows_and_their_shares_tell_who_moved(tmp_path):
    recipe, slow, n = steps.FULL.but(ks=(0, 6), hazards=(0.4, 1.0)), case(NAME), 400
    rows = list(steps.sweep(Table(Cells(tmp_path, recipe), recipe, 0), slow, {"fixed": 0.3}, n))
    told = [(row["rule"], row["parameter"]) for row in rows]
    assert told[:2] == [("K steps", 0), ("K steps", 6)]
    assert told[2:] == [("median stop", None), ("reference sample", None), ("hazard", 0.4), ("hazard", 1.0)]
    _, all_of_them, median, _, some, none = rows
    assert (all_of_them["unmoved"], all_of_them["exhausted"]) == (0, 1) and (none["unmoved"], none["mean_steps"]) == (1, 0)
    assert abs(some["unmoved"] - 0.4) < 3.9 * (0.4 * 0.6 / n) ** 0.5  # 1e-4
    assert 0 < median["unmoved"] < 0.3 and 0.3 < median["exhausted"] < 1  # 1/8 of the proposals are above the median


def test_step_control_leaves_proposals_alone_where_it_says_none(tmp_path):
    recipe, slow = step_control.QUICK, case()
    rows = list(step_control.sweep(Table(Cells(tmp_path, recipe), recipe, 3), slow, (0.5,), 100, seeds=2))
    assert [(row["control"], row["step_size"]) for row in rows[::2]] == [("none", None), ("fixed", 0.5), ("backtracking", 0.5)]
    assert [row["sampling_seed"] for row in rows] == [3, 4] * 3
    assert [row["mean_steps"] > 0 for row in rows] == [False] * 2 + [True] * 4
    assert [row["step_sizes_reached"] is None for row in rows] == [True] * 4 + [False] * 2


# --- claims on stop rules


JS = Quality("js", "JS", 0.01)
FALLING = {0: 0.3, 10: 0.2, 20: 0.1, 50: 0.2}


def stops(fixed, median, reference=(0.2, 10.0), hazard=(0.25, 10.0), control="fixed"):
    """Rows of one set and control over two seeds: K -> JS, and (JS, mean steps) of the others."""
    others = [(steps.MEDIAN, None, *median), (steps.REFERENCE, None, *reference), (steps.HAZARD, 0.1, *hazard)]
    return [
        {"set": "ring, D shaped at a uniform step", "control": control, "rule": rule, "parameter": p, "seed": seed,
         "js": js + shift, "mean_steps": taken}
        for rule, p, js, taken in [*((steps.FIXED, k, js, float(k)) for k, js in fixed.items()), *others]
        for seed, shift in ((0, 0.002), (1, -0.002))
    ]  # fmt: skip


def held(rows):
    """Of the median stop: reaches the best K in fewer steps, beats K steps of its mean number, the largest K is worse; then of
    the hazard."""
    of = [claim["holds"] for claim in steps._of_rules(rows, "ring", JS, "fixed")]
    return [of[0], of[1], of[4], of[5]]


def test_quality_between_two_k_lies_on_the_line_between_them():
    assert steps.interpolated(15.0, FALLING) == pytest.approx(0.15)
    assert steps.interpolated(10.0, FALLING) == 0.2 and steps.interpolated(50.0, FALLING) == 0.2


@pytest.mark.parametrize(
    ("median", "hazard", "wanted"),
    [
        ((0.1, 12.0), (0.25, 10.0), [True, True, True, True]),
        ((0.105, 12.0), (0.25, 10.0), [True, True, True, True]),  # alike
        ((0.12, 12.0), (0.25, 10.0), [False, True, True, True]),  # not as good as the best K
        ((0.1, 25.0), (0.25, 10.0), [False, True, True, True]),  # as good, but 20 steps for all are cheaper
        ((0.05, 25.0), (0.25, 10.0), [True, True, True, True]),  # better than any K
        ((0.19, 11.0), (0.25, 10.0), [False, False, False, True]),  # on the curve of K steps, alike with the largest
        ((0.1, 12.0), (0.15, 10.0), [True, True, True, False]),  # the hazard beats it
    ],
)
def test_claims_of_a_stop_rule_hold_where_it_saves_steps_at_no_loss(median, hazard, wanted):
    assert held(stops(FALLING, median, hazard=hazard)) == wanted


@pytest.mark.parametrize(
    ("ours", "holds"), [((0.1, 10.0), True), ((0.108, 10.0), True), ((0.13, 10.0), False), ((0.1, 13.0), False)]
)
def test_backtracking_must_be_as_good_in_fewer_steps(ours, holds):
    rows = stops(FALLING, (0.1, 12.0)) + stops(FALLING, ours, control="backtracking")
    (claim,) = [c for c in steps.claims(rows) if "backtracking is within" in c["claim"]]
    assert claim["holds"] == holds


def test_the_median_stop_stands_beside_the_best_k_of_each_seed():
    found = steps.comparison(stops(FALLING, (0.1, 12.0)) + stops(FALLING, (0.1, 9.0), control="backtracking"))
    ours = {(row["case"].split(", ", 2)[2], row["metric"]): row["ours"] for row in found}
    assert ours["fixed, best K for all", "mean steps"] == 20 and ours["backtracking, median stop", "mean steps"] == 9
    assert ours["fixed, best K for all", "JS (nats)"] == pytest.approx(0.1)
