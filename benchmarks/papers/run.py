"""A run of any experiment: cells that a cut run is taken up from, rows, claims, the result file, pictures."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fastrefine as fr
from benchmarks.papers import result_file
from benchmarks.papers.cells import Cells
from benchmarks.papers.recipe import Recipe
from benchmarks.papers.result_file import Row
from fastrefine.networks import torch_state

QUICK_RUN = "a quick run: all sizes reduced"


class Paper(Protocol):
    """An experiment: a module, or an object, that has these.

    FULL, QUICK: recipes. REDUCTIONS: what of FULL is less than was published. rows: of one seed, in the order of the table.
    claims, comparison: of all rows. draw: the pictures, into the run's folder.
    """

    FULL: Recipe
    QUICK: Recipe
    REDUCTIONS: tuple[str, ...]

    def rows(self, run: Run, seed: int) -> Iterable[Row]: ...
    def claims(self, rows: Sequence[Row]) -> list[Row]: ...
    def comparison(self, rows: Sequence[Row]) -> list[Row]: ...
    def draw(self, run: Run, rows: Sequence[Row]) -> None: ...


class Run:
    """One run: where it writes, what it is made of, and what it has found so far.

    told: what the record says besides rows, claims and comparison. claims: those that rows alone do not decide. left_out:
    rows of what was not run.
    """

    def __init__(
        self, paper: Any, name: str, outdir: Path, *, seeds: Sequence[int], quick: bool = False, data: Path | None = None,
        recipe: Recipe | None = None,
    ):  # fmt: skip
        self.paper, self.name, self.outdir = paper, name, outdir
        self.seeds, self.quick, self.data = tuple(seeds), quick, data
        self.recipe: Recipe = recipe or (paper.QUICK if quick else paper.FULL)
        self.rows: list[Row] = []
        self.claims: list[Row] = []
        self.left_out: list[Row] = []
        self.told: dict[str, Any] = {}
        self.started = time.perf_counter()

    def cells(self, recipe: Recipe | None = None) -> Cells:
        """The finished parts of this run, or of the part of it that another recipe makes."""
        recipe = recipe or self.recipe
        return Cells(self.outdir / ("cells" + "-quick" * self.quick + f"-{recipe.name}" * bool(recipe.name)), recipe)

    def judged(self, name: str, accuracy: float) -> None:
        """Note how good the classifier is that judges images."""
        self.told.setdefault("classifier_accuracy", {})[name] = accuracy

    def save(self) -> dict[str, Any]:
        """Write result.json of what was found so far, and return it."""
        paper, reductions = self.paper, [QUICK_RUN] * self.quick
        if self.quick or self.recipe == paper.FULL:
            reductions += paper.REDUCTIONS
        compared = [row for row in paper.comparison(self.rows) if row["seeds"]]
        content = {
            "rows": self.rows + self.left_out, "seeds": list(self.seeds), "recipe": self.recipe.facts(),
            "reduced": bool(reductions), "reductions": reductions, "claims": self.claims + paper.claims(self.rows),
            "comparison": compared, "seconds": time.perf_counter() - self.started,
        }  # fmt: skip
        return result_file.write(self.outdir, self.name, **content | self.told)


def run(
    paper: Any, name: str, outdir: Path, *, seeds: Sequence[int], quick: bool = False, data: Path | None = None,
    recipe: Recipe | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The experiment; writes result.json and pictures into ``outdir``, returns the former. recipe: another than the paper's."""
    one = Run(paper, name, outdir, seeds=seeds, quick=quick, data=data, recipe=recipe)
    wide = getattr(paper, "ALL_CORES", False) and not quick  # else one thread: faster on small networks, and repeats its bits
    with torch_state.threads_for(flops=None if wide else 0.0), warnings.catch_warnings():
        warnings.simplefilter("ignore", fr.FastrefineWarning)  # the rows show what comes of it
        for seed in one.seeds:
            for row in paper.rows(one, seed):
                one.rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
        record = one.save()
        paper.draw(one, record["rows"])
    return record


def line(row: Row) -> str:
    """A row as text: what tells it from others, and its first figures."""
    said = [f"{value}" for value in row.values() if isinstance(value, str | int)]
    figures = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return "  ".join([", ".join(said[:7]), *figures[:5]])
