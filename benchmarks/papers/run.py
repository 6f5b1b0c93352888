"""A run of any experiment: its recipe, its rows, each kept when it is done, its result file and pictures.

An experiment is a module, or an object, with recipes FULL and QUICK; REDUCTIONS, what of FULL is less than was published;
rows(run, seed), of one seed in the order of the table; claims(rows) and comparison(rows), of all rows; draw(run, rows), which
makes the pictures.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import result_file
from benchmarks.papers.cells import Cells
from benchmarks.papers.plane import Plane
from benchmarks.papers.result_file import Row
from fastrefine.demo.gan import Draw, Training
from fastrefine.networks import torch_state

QUICK_RUN = "a quick run: all sizes reduced"
SHOWN = 16  # samples of a row that are kept for pictures: the first ids, not chosen ones
Made = tuple[Mapping[str, Tensor], Row]  # tensors to keep, figures
UNUSED: Any = None  # of a field that an experiment does not use: it is left out of its record


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of but the seed. ``own`` fields, of one experiment alone, are read like the others.

    plane: networks on two-dimensional data, and their training. network: "dcgan" | "sngan" | "sagan", of images of ``size``,
    with widths ``features`` of G and D. training: of networks that are no plane. checkpoints: updates after which the GAN is
    sampled. at, step_size, max_steps: of refinement. reference: real samples whose logits stop samples, start chains and
    calibrate. shaping_*: [CS] Alg. 2; shaping_steps: the most that a batch is refined by for D. samples: of a row.
    chain_length: proposals of a chain of Metropolis-Hastings. classifier_*: of the classifier that judges images.
    """

    name: str = ""
    plane: Plane = UNUSED
    network: str = UNUSED
    size: int = UNUSED
    latent: int = UNUSED
    features: tuple[int, int] = UNUSED
    training: Training = UNUSED
    checkpoints: tuple[int, ...] = UNUSED
    at: str = UNUSED
    step_size: float = UNUSED
    max_steps: int = UNUSED
    num_slots: int = UNUSED
    precision: str = UNUSED
    reference: int = UNUSED
    shaping_iterations: int = UNUSED
    shaping_batch: int = UNUSED
    shaping_rate: float = UNUSED
    shaping_steps: int = UNUSED
    samples: int = UNUSED
    chain_length: int = UNUSED
    classifier_width: int = UNUSED
    classifier_steps: int = UNUSED
    own: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        own = {} if name.startswith("__") else self.own
        if name not in own:
            raise AttributeError(f"the recipe has no {name!r}")
        return own[name]

    def but(self, **changes: Any) -> Recipe:
        """The same with other values of some fields."""
        mine = {f.name for f in fields(self)}
        own = {name: value for name, value in changes.items() if name not in mine}
        if unknown := own.keys() - self.own.keys():
            raise TypeError(f"the recipe has no {', '.join(sorted(unknown))}")
        common = {name: value for name, value in changes.items() if name in mine}
        return replace(self, **common, own={**self.own, **own})

    def facts(self) -> dict[str, Any]:
        """The fields that are used, for the record."""
        found = asdict(self)
        return {name: value for name, value in (found | found.pop("own")).items() if value is not None and value != ""}


class Table:
    """Rows and discriminators of one recipe and seed, kept in ``cells``."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int):
        self.cells, self.recipe, self.seed = cells, recipe, seed

    def kept(self, facts: Row, make: Callable[[], Made], first: int | None = SHOWN) -> Row:
        """The row {seed, facts, figures}: from ``cells``, or made now; the ``first`` of its tensors are kept with it."""
        key = self._key(*facts.values())

        def cell() -> Row:
            tensors, figures = make()
            if tensors:
                self.cells.put(key, {name: tensor[:first] for name, tensor in tensors.items()})
            return {"seed": self.seed, **facts, **figures}

        return self.cells.row(key, cell)

    def shown(self, *facts: Any) -> dict[str, Tensor]:
        """The tensors that were kept with the row of these facts."""
        return self.cells.tensors(self._key(*facts), dict)

    def trained(
        self, key: str, empty: nn.Module, refiner: fr.Refiner, real: Any, how: str = "shaped", *, iterations: int | None = None,
        batch: int | None = None, rate: float | None = None, **options: Any,
    ) -> nn.Module:  # fmt: skip
        """The refiner's D, trained by the recipe: "shaped" on refined samples ([CS] Alg. 2), "tuned" on raw ones.

        empty: a network that its weights are loaded into. iterations, batch, rate: the recipe's unless given.
        """
        recipe = self.recipe
        number = recipe.shaping_iterations if iterations is None else iterations
        options = {"seed": self.seed, "progress": None, **options}

        def train() -> nn.Module:
            update = fr.shape_discriminator if how == "shaped" else fr.tune_discriminator
            return update(refiner, real, number, batch or recipe.shaping_batch, rate or recipe.shaping_rate, **options)

        return self.cells.network(self._key(key), empty, train)

    def _key(self, *facts: Any) -> str:
        return "-".join(map(str, (self.seed, *facts)))


class Fresh:
    """A loader of fresh real batches without end, the same ones each time it is begun."""

    def __init__(self, draw: Draw, batch_size: int, seed: int):
        self.draw, self.batch_size, self.seed = draw, batch_size, seed

    def __iter__(self) -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        while True:
            yield self.draw(self.batch_size, random)


def moved(out: fr.Result) -> Row:
    """How far samples went: mean_steps, and the mean logit before and after."""
    return {
        "mean_steps": float(out.steps.double().mean()), "logit_before": float(out.initial_logits.mean()),
        "logit_after": float(out.logits.mean()),
    }  # fmt: skip


class Run:
    """One run: where it writes, what it is made of, and what it has found so far.

    extra: what the record says besides rows, claims and comparison. claims: those that rows alone do not decide. left_out:
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
        self.extra: dict[str, Any] = {}
        self.started = time.perf_counter()

    def cells(self, recipe: Recipe | None = None) -> Cells:
        """The finished parts of this run, or of the part of it that another recipe makes."""
        recipe = recipe or self.recipe
        return Cells(self.outdir / ("cells" + "-quick" * self.quick + f"-{recipe.name}" * bool(recipe.name)), recipe)

    def judged(self, name: str, accuracy: float) -> None:
        """Note how good the classifier is that judges images."""
        self.extra.setdefault("classifier_accuracy", {})[name] = accuracy

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
        return result_file.write(self.outdir, self.name, **content | self.extra)


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
    names = [f"{value}" for value in row.values() if isinstance(value, str | int)]
    figures = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return "  ".join([", ".join(names[:7]), *figures[:5]])
