"""The recipe and the run that all experiments share, on an experiment made up for it."""

import json
import warnings

import pytest
import torch
from torch import nn

import fastrefine as fr
from benchmarks.papers.cells import Cells
from benchmarks.papers.result_file import against, claim, pick
from benchmarks.papers.run import QUICK_RUN, Recipe, Table, run
from fastrefine.errors import FastrefineWarning


class Coins:
    """Each row of a seed is a share of heads."""

    FULL = Recipe(samples=4, own=dict(coins=("penny", "cent")))
    QUICK = FULL.but(coins=("penny",))
    REDUCTIONS = ("two coins",)

    def __init__(self):
        self.made, self.drawn = [], []

    def rows(self, run, seed):
        table = Table(run.cells(), run.recipe, seed)
        for coin in run.recipe.coins:
            warnings.warn("of the library", FastrefineWarning, stacklevel=1)

            def make(coin=coin):
                self.made.append((seed, coin))
                return {"tosses": torch.arange(100)}, {"heads": 0.5 + seed}

            yield table.kept({"coin": coin}, make)

    def claims(self, rows):
        return [claim("fair", all(row["heads"] == 0.5 for row in rows))]

    def comparison(self, rows):
        return [against(coin, "heads", 0.5, pick(rows, "heads", coin=coin), "near") for coin in ("penny", "cent")]

    def draw(self, run, rows):
        self.drawn = [Table(run.cells(), run.recipe, seed).shown("penny")["tosses"] for seed in run.seeds]


def test_a_run_writes_every_row_of_every_seed_and_what_they_claim(tmp_path, capsys):
    coins = Coins()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library's warnings stay inside
        record = run(coins, "coins", tmp_path, seeds=(0, 1))
    assert json.loads((tmp_path / "result.json").read_text()) == record
    assert [(row["seed"], row["coin"], row["heads"]) for row in record["rows"]] == [
        (0, "penny", 0.5), (0, "cent", 0.5), (1, "penny", 1.5), (1, "cent", 1.5)
    ]  # fmt: skip
    assert record["claims"] == [{"claim": "fair", "holds": False}] and record["reductions"] == ["two coins"]
    assert [(row["case"], row["ours"], row["seeds"]) for row in record["comparison"]] == [("penny", 1, 2), ("cent", 1, 2)]
    assert record["recipe"] == {"samples": 4, "coins": ["penny", "cent"]}
    assert [len(tosses) for tosses in coins.drawn] == [16, 16]  # the first ones are kept for pictures
    assert capsys.readouterr().err.count("penny") == 2


def test_a_quick_run_compares_only_what_it_has(tmp_path):
    record = run(Coins(), "coins", tmp_path, seeds=(0,), quick=True)
    assert record["reduced"] and record["reductions"] == [QUICK_RUN, "two coins"]
    assert [row["case"] for row in record["comparison"]] == ["penny"]


def test_a_run_that_was_cut_makes_no_row_twice(tmp_path):
    coins = Coins()
    for _ in range(2):
        run(coins, "coins", tmp_path, seeds=(0, 1))
    assert len(coins.made) == len(set(coins.made)) == 4


def test_fields_of_one_experiment_are_read_and_changed_like_the_others():
    recipe = Coins.FULL.but(samples=8, coins=())
    assert (recipe.samples, recipe.coins, Coins.FULL.coins) == (8, (), ("penny", "cent"))
    with pytest.raises(TypeError, match="no notes"):
        recipe.but(notes=1)
    with pytest.raises(AttributeError, match="'notes'"):
        recipe.notes  # noqa: B018


def test_a_discriminator_is_shaped_on_refined_samples_or_tuned_on_raw_ones_by_the_recipe(tmp_path, monkeypatch):
    recipe, seen = Recipe(shaping_iterations=3, shaping_batch=5, shaping_rate=0.1), []
    for name in ("shape_discriminator", "tune_discriminator"):
        monkeypatch.setattr(
            fr, name, lambda *given, name=name, **options: seen.append((name, given, options)) or nn.Linear(2, 1)
        )
    table = Table(Cells(tmp_path, recipe), recipe, 7)
    first = table.trained("a", nn.Linear(2, 1), "refiner", "real")
    table.trained("b", nn.Linear(2, 1), "refiner", "real", "tuned", iterations=0, optimizer="sgd")
    assert seen == [
        ("shape_discriminator", ("refiner", "real", 3, 5, 0.1), {"seed": 7, "progress": None}),
        ("tune_discriminator", ("refiner", "real", 0, 5, 0.1), {"seed": 7, "progress": None, "optimizer": "sgd"}),
    ]
    assert torch.equal(table.trained("a", nn.Linear(2, 1), "refiner", "real").weight, first.weight) and len(seen) == 2
