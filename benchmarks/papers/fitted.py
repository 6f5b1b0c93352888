"""A generator that comes alone gets a discriminator, and is refined.

The demo's early-stopped generator (embedded weights, MNIST or digits), its own discriminator thrown away: one is fitted to
it on the real training images (``fr.fit_discriminator``), shaped for refinement ([CS] Alg. 2), and used for collaborative
sampling as in the demo. Frechet distance and classifier score on a classifier trained here, against held-out images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import plots
from benchmarks.papers.cells import Cells, trained_judge
from benchmarks.papers.result_file import Row, against, claim, pick
from benchmarks.papers.run import Made, Recipe, Run, Table, moved
from fastrefine import pictures
from fastrefine.demo import recipes
from fastrefine.demo.gan import build
from fastrefine.demo.judge import Judge
from fastrefine.models.default import default_discriminator

STAGES = ("raw", "fitted", "fitted, shaped")
# Shaping and the classifier are the demo's, whose numbers a quick run replaces.
FULL = Recipe(samples=4000, own=dict(mnist_samples=3000, fit_iterations=1000, fit_rate=1e-3, fit_batch=64))
QUICK = FULL.but(samples=300, mnist_samples=300, fit_iterations=40, shaping_iterations=3, classifier_steps=100)
REDUCTIONS = ()


class Parts(Table):
    """The refiners of one seed on one data set, whose discriminators are kept in ``cells``."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int, demo: recipes.Recipe, real: Tensor):
        super().__init__(cells, recipe, seed)
        self.demo, self.real, (self.generator, _) = demo, real, recipes.embedded(demo)
        self.prior = fr.Normal(demo.latent)

    def refiner(self, stage: str) -> fr.Refiner:
        """The demo's refiner, by the discriminator of a stage; of "raw" without a step."""
        d, demo = self._shaped() if stage == "fitted, shaped" else self._fitted(), self.demo
        return fr.Refiner(
            self.generator, d, fr.Collaborative(demo.step_size), at=demo.at, max_steps=0 if stage == "raw" else demo.max_steps,
            prior=self.prior, stop=fr.stopping.MedianOfReal(), real=self.real[: demo.reference], num_slots=demo.num_slots,
        )  # fmt: skip

    def rows(self, judge: Judge, samples: int) -> Iterator[Row]:
        """A row for each stage."""

        def make(stage: str) -> Made:
            out = self.refiner(stage).sample(samples, seed=self.seed)
            shown = {"images": out.images, "before": out.initial_logits, "after": out.logits}
            return shown, {**judge(out.images), **moved(out)}

        for stage in STAGES:
            yield self.kept({"data": self.demo.name, "stage": stage}, lambda stage=stage: make(stage))  # type: ignore[misc]

    def _fitted(self) -> nn.Module:
        """The default discriminator, fitted to the generator on the real images."""
        recipe = self.recipe
        return self.cells.network(
            f"fitted-{self.seed}", self._empty(),
            lambda: fr.fit_discriminator(
                self.generator, self.real, recipe.fit_iterations, prior=self.prior, batch_size=recipe.fit_batch,
                learning_rate=recipe.fit_rate, seed=self.seed,
            ),
        )  # fmt: skip

    def _shaped(self) -> nn.Module:
        """The same, shaped by the demo's recipe."""
        plain = self.refiner("fitted")
        return self.trained(
            "D-shaped", self._empty(), plain, self.real, stop=plain.stop, betas=(0.5, 0.9), batch=self.demo.shaping_batch,
            rate=self.demo.shaping_rate, iterations=self.recipe.shaping_iterations or self.demo.shaping_iterations,
        )  # fmt: skip

    def _empty(self) -> nn.Module:
        return build(lambda: default_discriminator(tuple(self.real.shape[1:])), 0)


def rows(run: Run, seed: int) -> Iterator[Row]:
    """On MNIST, or without data on the digits."""
    recipe, demo = run.recipe, recipes.DIGITS if run.data is None else recipes.MNIST
    images, samples = demo.load(run.data), recipe.samples if run.data is None else recipe.mnist_samples
    parts = Parts(run.cells(recipe.but(name=demo.name)), recipe, seed, demo, images.train)
    steps = recipe.classifier_steps or demo.classifier_steps
    judge = trained_judge(parts.cells, demo.classifier, images, seed=seed, steps=steps)
    run.judged(str(seed), judge.accuracy)
    made_of = {"demo": demo.name, "generator": f"embedded, {demo.early_steps} steps"}
    run.extra |= {"data": demo.name, "recipe": made_of | recipe.facts() | {"samples": samples}}
    return parts.rows(judge, samples)


def claims(rows: Sequence[Row]) -> list[Row]:
    """Refinement by the fitted and shaped discriminator lowers the distance, in every seed."""
    raw, refined = (pick(rows, "frechet_distance", stage=stage) for stage in ("raw", "fitted, shaped"))
    holds = [after < before for before, after in zip(raw, refined, strict=True)]
    text = "a discriminator fitted to the generator alone, then shaped, refines to a lower Frechet distance"
    return [claim(text, all(holds), seeds=list(dict.fromkeys(row["seed"] for row in rows)), holds_by_seed=holds)]


def comparison(rows: Sequence[Row]) -> list[Row]:
    """No paper has the figures: every stage's."""
    data = rows[0]["data"]
    return [
        against(f"{data}, {stage}", key, None, pick(rows, key, stage=stage), better,
                headline=key == "frechet_distance" and stage != "fitted")
        for stage in STAGES
        for key, better in (("frechet_distance", "lower"), ("classifier_score", "higher"))
    ]  # fmt: skip


def draw(run: Run, rows: Sequence[Row]) -> None:
    """The first samples of the first seed, raw and refined."""
    data = run.extra["data"]
    table = Table(run.cells(run.recipe.but(name=data)), run.recipe, run.seeds[0])
    raw, refined = table.shown(data, "raw"), table.shown(data, "fitted, shaped")
    notes = [pictures.from_to(a, b) for a, b in torch.stack([refined["before"], refined["after"]], 1).tolist()]
    title = f"{data}: the first samples, refined by a discriminator fitted to the generator alone, then shaped"
    plots.tiles(run.outdir / "picture.png", {"generator": raw["images"], "refined": refined["images"]}, notes, title)
