"""[CS0] Table 1 on a data set in the plane: an early GAN refined by its D as it is, tuned or shaped, and a GAN trained on.

[CS0] Liu, Kothari, Alahi: "Collaborative GAN Sampling", 2019, the preprint of [CS].
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import plane_plot, result_file, training
from benchmarks.papers.cells import Cells
from benchmarks.papers.mixtures import nearest_real
from benchmarks.papers.plane import LATENT_DIM, Fresh, Plane
from benchmarks.papers.result_file import against, claim, mean, pick
from fastrefine import settings
from fastrefine.demo.gan import Draw, Pair

Row = dict[str, Any]
FIGURES = {"distance": "lower", "good": "higher"}
NAMES = ("early", "frozen", "tuned", "shaped", "optimal")
QUICK = "a quick run: all sizes reduced"  # what is said of it
REAL = 12345  # seeds the real samples that stop and measure: never those of a training
RULES: dict[str, dict[str, Any]] = {"adaptive": {"adaptive": True}, "ladam": {"optimizer": "ladam"}}  # [CS0], [CS]'s code
STOPPED = "stopped"  # [CS0]'s stop: at the logit of a real sample
SHOWN, GRID, MARGIN = 2000, 160, 1.15  # samples of a panel, points per axis of its landscape, its limit over the data's


@dataclass(frozen=True)
class Recipe:
    """What the rows of one data set are made of.

    early, optimal: updates of G and D of the GAN that is refined, and of the one trained on. iterations: of shaping and of
    tuning, both by Adam at ``rate`` on batches of the GAN's own size; a shaping batch is left at a uniformly drawn step.
    Refinement is in data space by step control that starts at ``step_size``, max_steps for all; rows of their own have the
    published step rules with the same step size, and [CS0]'s stop.
    real, few: real samples that the nearest one is looked for among. [CS0] does not say how many it has; among ``few``, one
    batch, samples of the Swiss roll itself are .163 away from the nearest, what [CS0] reports of its best rows.
    """

    plane: Plane
    early: int
    optimal: int
    iterations: int
    rate: float
    step_size: float = 0.1
    max_steps: int = 50
    samples: int = 10_000
    real: int = 10_000
    few: int = 400
    references: int = 1000


def small(recipe: Recipe) -> Recipe:
    """``recipe`` in seconds: a small pair that learns fast, refined by few large steps."""
    training = replace(recipe.plane.training, batch_size=100, rates=(5e-3, 5e-3))
    plane = replace(recipe.plane, hidden=(64, 64), training=training)
    return replace(
        recipe, plane=plane, early=300, optimal=330, iterations=60, rate=5e-3, step_size=1.0, max_steps=12, samples=300,
        real=1000, references=300,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A data set: its real samples, and what is measured of (samples, real samples)."""

    name: str
    draw: Draw
    measure: Callable[[Tensor, Tensor], dict[str, float]]


class Table:
    """The rows of one recipe, data set and training seed, each kept in ``cells`` when it is done.

    rules: of RULES, those that have rows of their own. A row's "missed" is the mean distance of a real sample to the nearest
    of the row's: what [CS0]'s measures do not see.
    """

    def __init__(self, cells: Cells, recipe: Recipe, case: Case, seed: int, rules: Sequence[str] = tuple(RULES)):
        self.cells, self.recipe, self.case, self.seed, self.rules = cells, recipe, case, seed, rules
        random = torch.Generator().manual_seed(REAL)
        self.real, self.few, self.references = (
            case.draw(n, random) for n in (recipe.real, recipe.few, recipe.references)
        )  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """NAMES in order; those that are refined also with [CS0]'s stop, "frozen" and "tuned" by the published step rules."""
        for name, pair in self.pairs().items():
            refined = name not in ("early", "optimal")
            yield self._row(name, self.refiner(*pair, max_steps=None if refined else 0))
            if refined:
                yield self._row(f"{name}, {STOPPED}", self.refiner(*pair, stop=fr.stopping.ReferenceSample()))
            for rule in self.rules if name in ("frozen", "tuned") else ():
                sampler = fr.Collaborative(self.recipe.step_size, **RULES[rule])
                yield self._row(f"{name}, {rule}", self.refiner(*pair, sampler=sampler))

    def pairs(self) -> dict[str, Pair]:
        """The networks of every row."""
        recipe = self.recipe
        trained = training.checkpoints(
            self.cells, f"gan-{self._key()}", lambda: recipe.plane.trainer(self.case.draw, self.seed),
            (recipe.early, recipe.optimal),
        )  # fmt: skip
        g, d = trained[recipe.early]
        own = {"early": d, "frozen": d, "tuned": self._trained("tuned", g, d), "shaped": self._trained("shaped", g, d)}
        return {name: (g, by) for name, by in own.items()} | {"optimal": trained[recipe.optimal]}

    def refiner(
        self, g: nn.Module, d: nn.Module, *, max_steps: int | None = None, sampler: fr.Collaborative | None = None,
        stop: fr.stopping.StopRule | None = None,
    ) -> fr.Refiner:  # fmt: skip
        """In data space; without a stop rule max_steps for every sample."""
        recipe = self.recipe
        return fr.Refiner(
            g, d, sampler or fr.Collaborative(recipe.step_size), at="output", prior=fr.Normal(LATENT_DIM),
            real=self.references, max_steps=recipe.max_steps if max_steps is None else max_steps,
            num_slots=recipe.plane.training.batch_size, stop=stop,
        )  # fmt: skip

    def points(self, name: str) -> Tensor:
        """The samples (n, 2) of a row that was made."""
        return self.cells.tensors(self._key(name), dict)["samples"]

    def _trained(self, name: str, g: nn.Module, d: nn.Module) -> nn.Module:
        recipe, batch = self.recipe, self.recipe.plane.training.batch_size

        def train() -> nn.Module:
            compiled = name == "shaped" and recipe.iterations >= 500  # half a minute, won back
            refiner = self.refiner(g, d).replaced(compile=compiled)
            fresh = Fresh(self.case.draw, batch, self.seed + 1)
            work = fr.shape_discriminator if name == "shaped" else fr.tune_discriminator
            return work(refiner, fresh, recipe.iterations, batch, recipe.rate, seed=self.seed, progress=None)

        _, empty = recipe.plane.networks(0)
        return self.cells.network(f"discriminator-{self._key(name)}", empty, train)

    def _row(self, name: str, refiner: fr.Refiner) -> Row:
        def row() -> Row:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fr.FastrefineWarning)  # the rows show what comes of it
                out = refiner.sample(self.recipe.samples, seed=self.seed)
            self.cells.put(self._key(name), {"samples": out.images[:SHOWN]})
            few = {f"{key}_few": value for key, value in self.case.measure(out.images, self.few).items() if key in FIGURES}
            return {
                "seed": self.seed, "data": self.case.name, "name": name, "samples": len(out),
                **self.case.measure(out.images, self.real), **few,
                "missed": nearest_real(self.real, out.images, 0.0)["distance"],
                "mean_steps": float(out.steps.double().mean()), "backend": out.report["backend"],
            }  # fmt: skip

        return self.cells.row(self._key(name), row)

    def _key(self, name: str = "") -> str:
        return f"{self.case.name}-{self.seed}" + f"-{name}" * bool(name)


def run(
    outdir: Path, experiment: str, cases: Sequence[Case], recipe: Recipe, seeds: Sequence[int], *,
    published: dict[str, dict[str, tuple[float, float]]], goal: float, quick: bool, reductions: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The experiment on every case; writes result.json and a landscape of each case's first seed into ``outdir``.

    published: case -> row -> ([CS0]'s distance, good). goal: the share of good samples wanted of the first case, shaped.
    """
    started, rows = time.perf_counter(), []
    rules = ("adaptive",) if quick else tuple(RULES)
    cells = Cells(outdir / ("cells-quick" if quick else "cells"), recipe)
    with settings.threads_for(flops=0.0):  # these networks are small
        for seed in seeds:
            for case in cases:
                for row in Table(cells, recipe, case, seed, rules).rows():
                    rows.append(row)
                    figures = "  ".join(f"{key} {row[key]:.3f}" for key in FIGURES)
                    print(f"{seed} {case.name}, {row['name']}: {figures}", file=sys.stderr, flush=True)
        for case in cases:
            landscapes(outdir / f"{case.name}.png", Table(cells, recipe, case, seeds[0]))
    return result_file.write(
        outdir, experiment, rows=rows, seeds=list(seeds), recipe=asdict(recipe), reduced=bool(reductions),
        reductions=list(reductions), claims=claims(rows, {} if quick else {cases[0].name: goal}),
        comparison=[] if quick else comparison(rows, published), seconds=time.perf_counter() - started,
    )  # fmt: skip


def claims(rows: Sequence[Row], goals: dict[str, float]) -> list[Row]:
    """Of every data set: shaped against the rest by both figures; goals: data set -> wanted mean share of good ones."""
    found = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for key, better in FIGURES.items():
            means = {name: mean(rows, key, data=data, name=name) for name in dict.fromkeys(row["name"] for row in rows)}
            by_seed = {name: pick(rows, key, data=data, name=name) for name in ("frozen", "tuned", "shaped")}
            ahead = all(_beats(better, s, f) and _beats(better, s, t) for f, t, s in zip(*by_seed.values(), strict=True))
            others = {name: means[name] for name in means if name != "optimal" and not name.startswith("shaped")}
            text = f"{data}: {key} of refinement with the shaped D is {better} than with D as it is or tuned"
            found.append(claim(f"{text}, for every seed", ahead, **by_seed))
            best = all(_beats(better, means["shaped"], value) for value in others.values())
            found.append(
                claim(f"{text}, by the published step rule too, and than of the early GAN, on the mean", best, **means)
            )
            text = f"{data}: {key} of the early GAN, refined with the shaped D, is no worse than of the GAN trained on"
            equal = not _beats(better, means["optimal"], means["shaped"])
            found.append(claim(text, equal, shaped=means["shaped"], optimal=means["optimal"]))
        if data in goals:
            ours = {key: mean(rows, key, data=data, name="shaped") for key in ("good", "good_few")}
            text = f"{data}: refined with the shaped D, at least {goals[data]:.0%} are good, as published"
            found.append(claim(text, ours["good"] >= goals[data], **ours))
    return found


def comparison(rows: Sequence[Row], published: dict[str, dict[str, tuple[float, float]]]) -> list[Row]:
    """[CS0] Table 1 beside ours, by either number of real samples that the nearest one is looked for among."""
    found = []
    for data, table in published.items():
        for name, figures in table.items():
            for (key, better), value in zip(FIGURES.items(), figures, strict=True):
                for suffix, of in (("_few", "one batch of real samples"), ("", "10,000 real samples")):
                    ours, shown = pick(rows, key + suffix, data=data, name=name), name == "shaped" and suffix == "_few"
                    found.append(against(f"{data}, {name}", f"{key}, {of}", value, ours, better, headline=shown))
    return found


def landscapes(path: Path, table: Table) -> None:
    """A PNG like [CS0] Figures 3-4: each row's samples over the landscape of its discriminator, bright where it is high."""
    limit = MARGIN * float(table.real.abs().max())
    figure, axes = plane_plot.subplots(1, len(NAMES), 2.2, 2.4)
    for axis, (name, (_, d)) in zip(axes[0], table.pairs().items(), strict=True):
        axis.imshow(landscape(d, limit).numpy(), origin="lower", extent=(-limit, limit) * 2, cmap="magma", vmin=0, vmax=1)
        x = table.points(name).numpy()
        axis.scatter(x[:, 0], x[:, 1], s=0.8, linewidths=0, color="#30e0d0")
        axis.set(xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit))
        axis.set_title(name, fontsize=9, pad=3)
    figure.tight_layout(pad=0.7, w_pad=0.4)
    plane_plot.save(figure, path)


def landscape(d: nn.Module, limit: float) -> Tensor:
    """s(d(x)) on a grid (GRID, GRID) of the square from -limit to limit: rows go along the second axis of x, upwards."""
    steps = torch.linspace(-limit, limit, GRID)
    with torch.no_grad():
        return torch.sigmoid(d(torch.cartesian_prod(steps, steps).flip(1))).reshape(GRID, GRID)


def _beats(better: str, a: float, b: float) -> bool:
    return a < b if better == "lower" else a > b
