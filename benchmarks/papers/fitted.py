"""A generator that comes alone gets a discriminator, and is refined.

The demo's early-stopped generator (embedded weights, MNIST or digits), its own discriminator thrown away: one is fitted to
it on the real training images (``fr.fit_discriminator``), shaped for refinement ([CS] Alg. 2), and used for collaborative
sampling as in the demo. Frechet distance and classifier score on a classifier trained here, against held-out images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import cases, result_file, training
from benchmarks.papers.cases import QUICK_RUN
from benchmarks.papers.cells import Cells
from benchmarks.papers.result_file import against, claim, pick
from fastrefine import settings
from fastrefine.demo import picture, recipes
from fastrefine.demo.gan import build
from fastrefine.demo.judge import Judge
from fastrefine.demo.recipes import embedded
from fastrefine.models.default import default_discriminator

SHOWN = 16  # columns of the picture: the first ids, not chosen ones
STAGES = ("raw", "fitted", "fitted, shaped")
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What the demo's recipe does not fix; None: the demo's."""

    digits_samples: int = 4000
    mnist_samples: int = 3000
    fit_iterations: int = 1000
    fit_rate: float = 1e-3
    fit_batch: int = 64
    shaping_iterations: int | None = None
    classifier_steps: int | None = None


FULL = Recipe()
QUICK = Recipe(digits_samples=300, mnist_samples=300, fit_iterations=40, shaping_iterations=3, classifier_steps=100)


class Parts:
    """The refiners of one seed on one data set, whose discriminators are kept in ``cells``."""

    def __init__(self, cells: Cells, demo: recipes.Recipe, recipe: Recipe, real: Tensor, seed: int):
        self.cells, self.demo, self.recipe, self.real, self.seed = cells, demo, recipe, real, seed
        self.generator, _ = embedded(demo)
        self.prior = fr.Normal(demo.latent)

    def refiner(self, stage: str) -> fr.Refiner:
        """The demo's refiner, by the discriminator of a stage; of "raw" without a step."""
        d = self.shaped() if stage == "fitted, shaped" else self.fitted()
        return self._refiner(d, 0 if stage == "raw" else self.demo.max_steps)

    def fitted(self) -> nn.Module:
        """The default discriminator, fitted to the generator on the real images."""
        recipe = self.recipe
        return self.cells.network(
            f"fitted-{self.seed}", self._empty(),
            lambda: fr.fit_discriminator(
                self.generator, self.real, recipe.fit_iterations, prior=self.prior, batch_size=recipe.fit_batch,
                learning_rate=recipe.fit_rate, seed=self.seed,
            ),
        )  # fmt: skip

    def shaped(self) -> nn.Module:
        """The same, shaped by the demo's recipe."""
        iterations, plain = self.recipe.shaping_iterations or self.demo.shaping_iterations, self.refiner("fitted")
        return self.cells.network(
            f"shaped-{self.seed}", self._empty(),
            lambda: cases.shape_images(plain, self.demo, self.real, iterations, plain.stop, self.seed),
        )  # fmt: skip

    def _refiner(self, discriminator: nn.Module, max_steps: int) -> fr.Refiner:
        demo = self.demo
        return fr.Refiner(
            self.generator, discriminator, fr.Collaborative(demo.step_size), at=demo.at, max_steps=max_steps,
            prior=self.prior, stop=fr.stopping.MedianOfReal(), real=self.real[: demo.reference], num_slots=demo.num_slots,
        )  # fmt: skip

    def _empty(self) -> nn.Module:
        return build(lambda: default_discriminator(tuple(self.real.shape[1:])), 0)


def rows_of(parts: Parts, judge: Judge, samples: int) -> list[Row]:
    """A row for each stage; their first images go into the cells."""

    def make(stage: str) -> Row:
        out = parts.refiner(stage).sample(samples, seed=parts.seed)
        shown = {"images": out.images, "before": out.initial_logits, "after": out.logits}
        parts.cells.put(f"shown-{parts.seed}-{stage}", {name: tensor[:SHOWN] for name, tensor in shown.items()})
        return {
            "seed": parts.seed, "stage": stage, **judge(out.images), "mean_steps": float(out.steps.double().mean()),
            "logit_before": float(out.initial_logits.mean()), "logit_after": float(out.logits.mean()),
        }  # fmt: skip

    found = []
    for stage in STAGES:
        found.append(parts.cells.row(f"{parts.seed}-{stage}", lambda stage=stage: make(stage)))  # type: ignore[misc]
        print(line(found[-1]), file=sys.stderr)
    return found


def run(outdir: Path, *, seeds: tuple[int, ...], quick: bool, data: Path | None) -> dict[str, Any]:
    """The experiment on MNIST in the folder ``data``, or on the digits; writes result.json and picture.png into ``outdir``."""
    recipe = QUICK if quick else FULL
    demo = recipes.DIGITS if data is None else recipes.MNIST
    samples = recipe.digits_samples if data is None else recipe.mnist_samples
    cells = Cells(outdir / f"{'cells-quick' if quick else 'cells'}-{demo.name}", recipe)
    rows: list[Row] = []
    accuracy: dict[str, float] = {}
    with settings.threads_for(flops=0.0):  # one thread, so that training repeats its bits
        images = demo.load(data)
        for seed in seeds:
            steps = recipe.classifier_steps or demo.classifier_steps
            judge = training.trained_judge(cells, demo.classifier, images, seed=seed, steps=steps)
            accuracy[str(seed)] = judge.accuracy
            rows += rows_of(Parts(cells, demo, recipe, images.train, seed), judge, samples)
    record = result_file.write(
        outdir, "fitted", data=demo.name, rows=rows, seeds=list(seeds), reduced=quick,
        reductions=[QUICK_RUN] * quick, claims=claims(rows), comparison=comparison(rows, demo.name),
        recipe={"demo": demo.name, "generator": f"embedded, {demo.early_steps} steps", "samples": samples} | asdict(recipe),
        classifier_accuracy=accuracy,
    )  # fmt: skip
    _draw(outdir, cells, demo.name, seeds[0])
    return record


def claims(rows: Sequence[Row]) -> list[Row]:
    """Refinement by the fitted and shaped discriminator lowers the distance, in every seed."""
    distance = {(r["seed"], r["stage"]): r["frechet_distance"] for r in rows}
    seeds = sorted({seed for seed, _ in distance})
    holds = [distance[seed, "fitted, shaped"] < distance[seed, "raw"] for seed in seeds]
    text = "a discriminator fitted to the generator alone, then shaped, refines to a lower Frechet distance"
    return [claim(text, all(holds), seeds=seeds, holds_by_seed=holds)]


def comparison(rows: Sequence[Row], name: str) -> list[Row]:
    """No paper has the figures: every stage's."""
    return [
        against(f"{name}, {stage}", key, None, pick(rows, key, stage=stage), better,
                headline=key == "frechet_distance" and stage != "fitted")
        for stage in STAGES
        for key, better in (("frechet_distance", "lower"), ("classifier_score", "higher"))
    ]  # fmt: skip


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"seed {row['seed']} {row['stage']:<15} FD {row['frechet_distance']:7.2f}  CS {row['classifier_score']:5.2f}  "
        f"steps {row['mean_steps']:4.1f}  logit {row['logit_before']:.2f} > {row['logit_after']:.2f}"
    )


def _draw(outdir: Path, cells: Cells, name: str, seed: int) -> None:
    raw, refined = (cells.tensors(f"shown-{seed}-{stage}", dict) for stage in ("raw", "fitted, shaped"))
    rows = [(label, picture.pixels(found["images"])) for label, found in (("generator", raw), ("refined", refined))]
    notes = [f"{a:.1f} > {b:.1f}" for a, b in zip(refined["before"], refined["after"], strict=True)]
    title = f"{name}: the first {SHOWN} samples, refined by a discriminator fitted to the generator alone, then shaped"
    picture.comparison(outdir / "picture.png", rows, notes, title)
