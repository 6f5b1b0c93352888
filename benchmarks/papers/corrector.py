"""A GAN's discriminator, corrected, refines a VAE and a normalizing flow.

[DGflow]: D_phi tells data from samples of the GAN g_phi, the corrector D_lambda samples of g_phi from samples of the base
generator; their logits add up to the log ratio of data and base generator, along whose gradient DGflow (KL) moves.
scikit-learn's 8x8 digits; Frechet distance and classifier score on a classifier trained here, against held-out images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import base_models, result_file, training
from benchmarks.papers.base_models import VAE, Flow
from benchmarks.papers.cases import QUICK_RUN
from benchmarks.papers.cells import Cells
from benchmarks.papers.result_file import against, claim, pick
from fastrefine import settings
from fastrefine.datasets import Images
from fastrefine.demo import picture
from fastrefine.demo.gan import build, train_gan
from fastrefine.demo.judge import Judge
from fastrefine.demo.recipes import DIGITS
from fastrefine.models import digits as networks
from fastrefine.models.default import default_discriminator

SHOWN = 16  # columns of the picture: the first ids, not chosen ones
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Trainings and refinement of one seed. Chosen on seed 0, the same for all.

    fit_*: fit_discriminator of D_phi (for g_phi, on the training images) and fit_corrector, both with the default D.
    step_size, max_steps: DGflow (KL, gamma .01) on `at`, "input" (the latent) or "output" (the image), by model.
    """

    vae_latent: int = 16
    vae_steps: int = 3000
    flow_layers: int = 8
    flow_width: int = 64
    flow_steps: int = 1000
    flow_weight_decay: float = 0.1
    gan_steps: int = 5000
    fit_iterations: int = 2000
    fit_batch: int = 64
    fit_rate: float = 1e-3
    fit_patience: int = 5
    reference_samples: int = 10_000
    at: str = "input"
    step_size: float = 0.03
    max_steps: int = 25
    samples: int = 4000
    classifier_steps: int = DIGITS.classifier_steps


FULL = Recipe()
QUICK = replace(
    FULL, vae_steps=80, flow_layers=2, flow_steps=20, gan_steps=50, fit_iterations=30, fit_batch=32, reference_samples=200,
    step_size=0.5, max_steps=4, samples=200, classifier_steps=60,
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A trained generator that is no GAN, with its prior."""

    name: str
    generator: nn.Module
    prior: fr.Normal


def train_bases(cells: Cells, recipe: Recipe, data: Images, seed: int) -> list[Base]:
    """The VAE and the flow."""
    shape = tuple(data.train.shape[1:])

    def trained(name: str, factory: Callable[[], VAE | Flow], steps: int, weight_decay: float = 0.0) -> nn.Module:
        def make() -> nn.Module:
            model = build(factory, seed)
            base_models.train(model, data.train, steps=steps, weight_decay=weight_decay, seed=seed)
            return model

        return cells.network(f"{name}-{seed}", build(factory, seed), make)

    vae = trained("vae", lambda: VAE(shape, recipe.vae_latent), recipe.vae_steps)
    flow = trained(
        "flow", lambda: Flow(data.train, recipe.flow_layers, recipe.flow_width), recipe.flow_steps, recipe.flow_weight_decay
    )
    return [
        Base("vae", vae, fr.Normal(recipe.vae_latent)),
        Base("flow", flow, fr.Normal(data.train[0].numel())),
    ]


def train_reference(cells: Cells, recipe: Recipe, data: Images, seed: int) -> tuple[Base, nn.Module]:
    """The GAN's generator g_phi, and D_phi: fitted for it afterwards, for a GAN's own D is no calibrated ratio."""

    def train() -> nn.Module:
        g, d = build(DIGITS.generator, seed), build(DIGITS.discriminator, seed + 100)
        rates, r1 = DIGITS.learning_rate, DIGITS.r1
        train_gan(g, d, data.train, latent_dim=DIGITS.latent, steps=recipe.gan_steps, learning_rate=rates, r1=r1, seed=seed)
        return g

    g = cells.network(f"gan-{seed}", build(DIGITS.generator, seed), train)
    gan = Base("gan", g, fr.Normal(networks.DIGITS_LATENT_DIM))
    d_phi = cells.network(
        f"d-phi-{seed}", _discriminator(data.train),
        lambda: fr.fit_discriminator(g, data.train, recipe.fit_iterations, prior=gan.prior, **_fitting(recipe, seed)),
    )  # fmt: skip
    return gan, d_phi


def correct(
    cells: Cells, base: Base, gan: Base, d_phi: nn.Module, recipe: Recipe, images: Tensor, seed: int
) -> fr.SumDiscriminator:  # fmt: skip
    """The discriminator of ``base``: D_phi + D_lambda; images: any of the data's shape."""
    corrector = cells.network(
        f"d-lambda-{base.name}-{seed}", _discriminator(images),
        lambda: fr.fit_corrector(
            base.generator, gan.generator, recipe.fit_iterations, prior=base.prior, reference_prior=gan.prior,
            reference_samples=recipe.reference_samples, **_fitting(recipe, seed),
        ),
    )  # fmt: skip
    return fr.SumDiscriminator(d_phi, corrector)


def _discriminator(images: Tensor) -> nn.Module:
    return build(lambda: default_discriminator(tuple(images.shape[1:])), 0)


def _fitting(recipe: Recipe, seed: int) -> dict[str, Any]:
    return dict(
        batch_size=recipe.fit_batch, learning_rate=recipe.fit_rate, check_every=100, patience=recipe.fit_patience, seed=seed
    )


def refiner(base: Base, discriminator: nn.Module, recipe: Recipe, max_steps: int | None = None) -> fr.Refiner:
    """DGflow along the gradient of a discriminator; max_steps: the recipe's unless given."""
    return fr.Refiner(
        base.generator, discriminator, fr.DGflow(recipe.step_size), at=recipe.at, prior=base.prior,
        max_steps=recipe.max_steps if max_steps is None else max_steps,
    )  # fmt: skip


def compare(
    cells: Cells, base: Base, d_phi: nn.Module, total: nn.Module, judge: Judge, recipe: Recipe, seed: int
) -> list[Row]:  # fmt: skip
    """Rows of one base generator: raw, refined with D_phi alone, refined with the sum; their first images go into ``cells``.

    ``logit`` is the mean of D_phi + D_lambda in every row.
    """

    def make() -> list[Row]:
        ours = refiner(base, total, recipe)
        stages = {
            "raw": refiner(base, total, recipe, max_steps=0),
            "uncorrected": refiner(base, d_phi, recipe),
            "refined": ours,
        }
        outs = {stage: run.sample(recipe.samples, seed=seed) for stage, run in stages.items()}
        for stage, out in outs.items():
            shown = {"images": out.images[:SHOWN], "logits": out.logits[:SHOWN]}
            cells.put(f"shown-{seed}-{base.name}-{stage}", shown)
        return [
            {"seed": seed, "model": base.name, "stage": stage, **judge(out.images),
             "logit": float(ours.score(out.images).mean())}
            for stage, out in outs.items()
        ]  # fmt: skip

    return cells.row(f"rows-{seed}-{base.name}", make)


def claims(rows: Sequence[Row]) -> list[Row]:
    """For each base generator: after refinement by the sum, distance and score are both better, in every seed."""
    found = []
    for model in ("vae", "flow"):
        by = {(r["seed"], r["stage"]): r for r in rows if r["model"] == model}
        seeds = sorted({seed for seed, _ in by})
        holds = [
            by[s, "refined"]["frechet_distance"] < by[s, "raw"]["frechet_distance"]
            and by[s, "refined"]["classifier_score"] > by[s, "raw"]["classifier_score"]
            for s in seeds
        ]
        text = f"{model}: refined by D_phi + D_lambda, Frechet distance and classifier score are better than raw, every seed"
        found.append(claim(text, all(holds), seeds=seeds, holds_by_seed=holds))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """[DGflow] has other data: its figures are no measure of ours."""
    return [
        against(f"{model}, {stage}", key, None, pick(rows, key, model=model, stage=stage), better,
                headline=key == "frechet_distance" and stage != "uncorrected")
        for model in ("vae", "flow")
        for stage in ("raw", "uncorrected", "refined")
        for key, better in (("frechet_distance", "lower"), ("classifier_score", "higher"))
    ]  # fmt: skip


def run(outdir: Path, *, seeds: tuple[int, ...], quick: bool, data: Path | None) -> dict[str, Any]:
    """The experiment; writes result.json and picture.png (of the first seed) into ``outdir``, returns the former."""
    recipe = QUICK if quick else FULL
    cells = Cells(outdir / ("cells-quick" if quick else "cells"), recipe)
    rows: list[Row] = []
    accuracy: dict[str, float] = {}
    with settings.threads_for(flops=0.0):  # these networks are small
        images = DIGITS.load(None)
        for seed in seeds:
            judge = training.trained_judge(cells, DIGITS.classifier, images, seed=seed, steps=recipe.classifier_steps)
            accuracy[str(seed)] = judge.accuracy
            rows.append({"seed": seed, "model": "data", "stage": "training images", **judge(images.train), "logit": None})
            gan, d_phi = train_reference(cells, recipe, images, seed)
            samples = refiner(gan, d_phi, recipe, max_steps=0).sample(recipe.samples, seed=seed)
            logit = float(samples.logits.mean())
            rows.append({"seed": seed, "model": "gan", "stage": "raw", **judge(samples.images), "logit": logit})
            for base in train_bases(cells, recipe, images, seed):
                total = correct(cells, base, gan, d_phi, recipe, images.train, seed)
                found = compare(cells, base, d_phi, total, judge, recipe, seed)
                rows += found
                for row in found:
                    print(line(row), file=sys.stderr)
    record = result_file.write(
        outdir, "corrector", rows=rows, seeds=list(seeds), recipe=asdict(recipe) | {"chosen_on_seed": 0}, reduced=True,
        reductions=["digits in place of [DGflow]'s CIFAR-10 and STL-10", *[QUICK_RUN] * quick],
        claims=claims(rows),
        comparison=comparison(rows), classifier_accuracy=accuracy,
    )  # fmt: skip
    _draw(outdir, cells, seeds[0])
    return record


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"seed {row['seed']} {row['model']:<5}{row['stage']:<12} FD {row['frechet_distance']:6.2f}  "
        f"CS {row['classifier_score']:5.2f}  logit {row['logit']:6.2f}"
    )


def _draw(outdir: Path, cells: Cells, seed: int) -> None:
    shown = {
        f"{name}, {stage}": cells.tensors(f"shown-{seed}-{name}-{stage}", dict)
        for name in ("vae", "flow") for stage in ("raw", "refined")
    }  # fmt: skip
    rows = [(label, picture.pixels(found["images"])) for label, found in shown.items()]
    notes = [f"{value:.1f}" for value in shown["flow, refined"]["logits"]]
    title = f"digits, seed {seed}: the first {SHOWN} samples of a VAE and of a flow, raw and refined; logits of the last row"
    picture.comparison(outdir / "picture.png", rows, notes, title)
