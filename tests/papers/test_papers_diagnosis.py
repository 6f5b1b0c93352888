"""The diagnosis experiment: correlations and claims on known rows, the ladder of discriminators, and that it runs."""

import sys

import pytest
import torch

from benchmarks.papers import diagnosis
from benchmarks.papers.cells import Cells
from fastrefine.errors import InputError

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
TINY = diagnosis.QUICK.but(checkpoints=(2,), tuned=(1, 3), samples=50, chain_length=3)
NOISE = (0.3, -1.0, 0.9, -0.2, 0.1)


def rows_of(brier, gain, z=NOISE, ece=NOISE, seed=0):
    """Rows whose gains in KL and JS are the opposite of the one in good."""
    return [
        {"seed": seed, "optimizer": "sgd", "brier": b, "z": s, "abs_z": abs(s), "ece": e,
         **{f"gain_{key}": -g if key in ("kl", "js") else g for key in diagnosis.GAINS}}
        for b, g, s, e in zip(brier, gain, z, ece, strict=True)
    ]  # fmt: skip


def found(table, score, gain="good", seed="pooled"):
    return next(row for row in table if (row["score"], row["gain"], row["seed"]) == (score, gain, seed))


def verdicts(rows):
    return [claim["holds"] for claim in diagnosis.claims(rows)]


# --- correlations


def test_a_line_has_correlation_one_and_a_curve_rank_correlation_one():
    gain = (0.0, 1.0, 2.0, 3.0, 10.0)
    table = diagnosis.correlations(rows_of([1 - g for g in gain], gain, ece=[g**3 for g in gain]))
    line, curve = found(table, "brier"), found(table, "ece")
    assert line["pearson"] == pytest.approx(-1) and line["spearman"] == pytest.approx(-1)
    assert curve["spearman"] == pytest.approx(1) and 0.8 < curve["pearson"] < 0.99
    assert found(table, "brier", "kl")["pearson"] == pytest.approx(1)


def test_few_discriminators_are_less_certain_than_many():
    rows = rows_of((5, 3, 4, 2, 1), (1, 2, 3, 4, 5))
    few, many = (found(diagnosis.correlations(rows * times), "brier") for times in (1, 3))
    assert few["pearson"] == pytest.approx(many["pearson"]) and many["pearson_p"] < few["pearson_p"] / 5
    assert many["discriminators"] == 15


def test_each_seed_is_correlated_by_itself_and_all_together():
    rising, falling = (rows_of((1, 2, 3, 4, 5), gain, seed=seed) for seed, gain in ((0, (1, 2, 3, 4, 5)), (7, (5, 4, 3, 2, 1))))
    table = diagnosis.correlations(rising + falling)
    assert found(table, "brier", seed=0)["pearson"] == pytest.approx(1)
    assert found(table, "brier", seed=7)["pearson"] == pytest.approx(-1)
    assert found(table, "brier")["pearson"] == pytest.approx(0, abs=1e-12)


def test_without_scipy_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="SciPy"):
        diagnosis.correlations(rows_of((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)))


# --- claims


def test_all_claims_hold_where_the_brier_score_tells_most():
    assert all(verdicts(rows_of((5, 4, 3, 2, 1), (1, 2, 3, 4, 5))))


@pytest.mark.parametrize(
    ("brier", "other"),
    [
        ((1, 2, 3, 4, 5), {}),  # a worse discriminator gains more
        ((5, 3, 4, 2, 1), {"ece": (5, 4, 3, 2, 1)}),  # ECE tells more
        ((5, 3, 4, 2, 1), {"z": (1, 2, 3, 4, 5)}),
        ((5, 3, 4, 2, 1), {"z": (-1, 2, -3, 4, -5)}),  # |z| does, z does not
    ],
)
def test_no_claim_holds_where_it_tells_less_or_the_wrong_way(brier, other):
    assert not any(verdicts(rows_of(brier, (1, 2, 3, 4, 5), **other)))


def test_published_correlations_stand_beside_the_mean_over_seeds():
    rows = rows_of((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)) + rows_of((1, 2, 3, 4, 5), (5, 4, 3, 2, 1), seed=1)
    comparison = diagnosis.comparison(rows)
    brier = next(row for row in comparison if row["case"] == "Brier, D by sgd" and row["metric"].endswith("good"))
    assert (brier["published"], brier["ours"], brier["seeds"]) == (-0.68, pytest.approx(0, abs=1e-12), 2)
    assert all(row["published"] is None for row in comparison if row["case"].startswith("|Z|"))


def test_the_ladders_of_two_optimizers_are_judged_apart():
    rising = rows_of((5, 4, 3, 2, 1), (1, 2, 3, 4, 5))
    falling = [row | {"optimizer": "adam"} for row in rows_of((5, 4, 3, 2, 1), (5, 4, 3, 2, 1))]
    verdict = {c["claim"].split(":")[0]: c["holds"] for c in diagnosis.claims(rising + falling)}
    assert verdict == {"D by sgd": True, "D by adam": False}


# --- the ladder


def test_every_discriminator_judges_the_same_proposals_and_goes_on_from_the_one_before(tmp_path):
    cells = Cells(tmp_path, TINY)
    rows = list(diagnosis.Ladder(cells, TINY, 0).rows())
    assert len({row["standard_js"] for row in rows}) == 1 and [row["iterations"] for row in rows] == [1, 3]
    first, second = (cells.tensors(f"0-D-sgd-{k}", dict)["0.weight"] for k in (1, 3))
    start = TINY.plane.networks(diagnosis.FRESH)[1][0].weight.detach()
    one, two = (float((b - a).norm()) for a, b in ((start, first), (first, second)))
    assert 0 < one < two < 5 * one  # one update away from the start, then two more


def test_the_held_out_samples_are_not_the_proposals(tmp_path):
    ladder = diagnosis.Ladder(Cells(tmp_path, TINY), TINY, 0)
    assert len(ladder.proposals) == 150 and float(torch.cdist(ladder.held_out, ladder.proposals).min()) > 0


def test_in_a_quick_run_better_trained_discriminators_have_better_brier_scores(quick_run):
    _, record = quick_run("diagnosis")
    brier = [row["brier"] for row in record["rows"]]
    assert brier == sorted(brier, reverse=True) and len(brier) == len(diagnosis.QUICK.tuned)
    assert len(record["claims"]) == 6 and len(record["correlations"]) == 24
