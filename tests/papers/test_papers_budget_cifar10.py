"""The experiment on budgets for colour images: its claims on known rows, and what its quick run chose and measured."""

import importlib.util

import pytest

from benchmarks.papers import budget, budget_cifar10
from benchmarks.papers.budget_cifar10 import EFFICIENTNET


def row(method, discriminator, budget, value, second=None):
    found = {"pair": "P", "method": method, "discriminator": discriminator, "budget": budget, "value": value}
    found["evaluations"] = float(budget)
    return found | ({} if second is None else {EFFICIENTNET: second})


def verdicts(rows, text):
    claims = [claim for claim in budget_cifar10.claims(rows) if text in claim["claim"] and "tuned" not in claim["claim"]]
    return {claim["claim"].partition(":")[0]: claim["holds"] for claim in claims}


@pytest.mark.parametrize(("best", "holds"), [(6.0, True), (6.1, False)])
def test_the_goal_counts_the_best_row_within_fifty_evaluations(best, holds):
    rows = [
        row("generator", "none", 0, 10.0, 100.0), row("fixed steps", "as it is", 50, 9.0, 90.0),
        row("fixed steps", "shaped", 50, best, 10 * best), row("DDLS", "as it is", 50, 7.5, 75.1),
        row("DDLS", "shaped", 50, 8.0, 80.0), row("DDLS", "shaped", 200, 1.0, 1.0),
    ]  # fmt: skip
    assert verdicts(rows, "the best method lowers") == {"own classifier": holds, "EfficientNet-Lite0": holds}
    assert verdicts(rows, "DDLS lowers") == {"own classifier": True, "EfficientNet-Lite0": False}


def test_a_method_is_compared_at_its_greatest_budget_and_noise_is_no_gain():
    rows = [
        row("generator", "none", 0, 10.0, 100.0), row("DDLS", "as it is", 50, 9.7, 99.0),
        row("DDLS", "shaped", 50, 11.0, 99.0), row("fixed steps", "as it is", 5, 9.0, 90.0),
        row("fixed steps", "as it is", 50, 12.0, 90.0), row("fixed steps", "shaped", 25, 9.0),
        row("fixed steps", "shaped", 50, 9.0, 90.0),
    ]  # fmt: skip
    assert verdicts(rows, "fixed steps, D as it is") == {"own classifier": False, "EfficientNet-Lite0": True}
    assert verdicts(rows, "DDLS, D as it is") == {"own classifier": True, "EfficientNet-Lite0": False}


def test_the_goal_is_for_our_methods_and_not_for_a_peer():
    rows = [
        row("generator", "none", 0, 10.0, 100.0), row("DDLS", "as it is", 50, 7.5, 75.0),
        row("ex2mcmc: mala", "as it is", 50, 1.0, 10.0),
    ]  # fmt: skip
    assert verdicts(rows, "the best method lowers") == {"own classifier": False, "EfficientNet-Lite0": False}
    assert verdicts(rows, "ex2mcmc: mala, D as it is") == {"own classifier": True, "EfficientNet-Lite0": True}


@pytest.mark.parametrize(("tuned", "holds"), [(8.0, True), (9.9, False)])
def test_tuned_is_compared_with_given_at_the_budget_of_tuning(tuned, holds):
    rows = [row("DDLS as given", "as it is", 25, 10.0), row("DDLS", "as it is", 25, tuned), row("DDLS", "as it is", 50, 1.0)]
    one, pair = budget.tuning_claims(rows)
    assert one["holds"] == pair["holds"] == holds and one["claim"].endswith("as given, within 25 evaluations")
    assert pair["claim"].endswith("as given, geometric mean") and pair["ours"] == pytest.approx(tuned / 10)


def test_the_quick_run_reports_what_it_chose_and_judges_twice(quick_run):
    _, record = quick_run("budget_cifar10")
    recipe = budget_cifar10.QUICK
    assert {row["what"] for row in record["shaping"]} == {shaping.name for shaping in recipe.shapings}
    assert all(row["distance"] == min(row["of_steps"]) for row in record["shaping"])
    tuned = {(row["method"], row["discriminator"]): row["steps"] for row in record["tuning"]}
    assert len(tuned) == 4
    for row in record["rows"]:
        assert (EFFICIENTNET in row) == (row["budget"] in recipe.judged_twice)
        assert row["evaluations"] <= row["budget"]
        if row["method"] == "DDLS" and row["budget"] == recipe.tuning:
            assert row["most_steps"] == tuned["DDLS", row["discriminator"]]
    shown = {row["method"] for row in record["rows"]}
    assert {"DDLS as given", "MALA as given"} <= shown
    assert ({"ex2mcmc: mala", "ex2mcmc: ex2mcmc"} <= shown) == (importlib.util.find_spec("ex2mcmc") is not None)
    assert record["real"][EFFICIENTNET] < record["rows"][0][EFFICIENTNET]
