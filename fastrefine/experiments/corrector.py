"""A GAN's discriminator, corrected, refines a VAE and a normalizing flow: ``python -m fastrefine.experiments.corrector``.

[DGflow]: D_phi tells data from samples of the GAN g_phi, the corrector D_lambda samples of g_phi from samples of the base
generator; their logits add up to the log ratio of data and base generator, along whose gradient DGflow (KL) moves.
scikit-learn's 8x8 digits; Frechet distance and classifier score on a classifier trained here, against held-out images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import fastrefine as fr
from fastrefine import settings
from fastrefine.datasets import Images
from fastrefine.experiments import base_models, networks, picture, result_file
from fastrefine.experiments.base_models import VAE, Flow
from fastrefine.experiments.demo import Judge
from fastrefine.experiments.recipes import DIGITS
from fastrefine.experiments.train import build, train_gan
from fastrefine.result import Result

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


QUICK = replace(
    Recipe(), vae_steps=200, flow_steps=60, gan_steps=100, fit_iterations=60, reference_samples=500, max_steps=5, samples=300
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A trained generator that is no GAN, with its prior."""

    name: str
    generator: nn.Module
    prior: fr.Normal


def train_bases(recipe: Recipe, data: Images, seed: int) -> list[Base]:
    """The VAE and the flow."""
    shape = tuple(data.train.shape[1:])
    vae = build(lambda: VAE(shape, recipe.vae_latent), seed)
    base_models.train(vae, data.train, steps=recipe.vae_steps, seed=seed)
    flow = build(lambda: Flow(data.train, recipe.flow_layers, recipe.flow_width), seed)
    base_models.train(flow, data.train, steps=recipe.flow_steps, weight_decay=recipe.flow_weight_decay, seed=seed)
    return [
        Base("vae", vae, fr.Normal(recipe.vae_latent)),
        Base("flow", flow, fr.Normal(data.train[0].numel())),
    ]


def train_reference(recipe: Recipe, data: Images, seed: int) -> tuple[Base, nn.Module]:
    """The GAN's generator g_phi, and D_phi: fitted for it afterwards, for a GAN's own D is no calibrated ratio."""
    g, d = build(DIGITS.generator, seed), build(DIGITS.discriminator, seed + 100)
    rates, r1 = DIGITS.learning_rate, DIGITS.r1
    train_gan(g, d, data.train, latent_dim=DIGITS.latent, steps=recipe.gan_steps, learning_rate=rates, r1=r1, seed=seed)
    gan = Base("gan", g, fr.Normal(networks.DIGITS_LATENT_DIM))
    return gan, fr.fit_discriminator(g, data.train, recipe.fit_iterations, prior=gan.prior, **_fitting(recipe, seed))


def correct(base: Base, gan: Base, d_phi: nn.Module, recipe: Recipe, seed: int) -> fr.SumDiscriminator:
    """The discriminator of ``base``: D_phi + D_lambda."""
    corrector = fr.fit_corrector(
        base.generator, gan.generator, recipe.fit_iterations, prior=base.prior, reference_prior=gan.prior,
        reference_samples=recipe.reference_samples, **_fitting(recipe, seed),
    )  # fmt: skip
    return fr.SumDiscriminator(d_phi, corrector)


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


def compare(base: Base, d_phi: nn.Module, total: nn.Module, judge: Judge, recipe: Recipe, seed: int) -> tuple[list[Row], list]:
    """Rows of one base generator: raw, refined with D_phi alone, refined with the sum; and the results themselves.

    ``logit`` is the mean of D_phi + D_lambda in every row.
    """
    ours = refiner(base, total, recipe)
    stages = {
        "raw": refiner(base, total, recipe, max_steps=0),
        "uncorrected": refiner(base, d_phi, recipe),
        "refined": ours,
    }
    outs = {stage: run.sample(recipe.samples, seed=seed) for stage, run in stages.items()}
    rows = [
        {"seed": seed, "model": base.name, "stage": stage, **judge(out.images), "logit": float(ours.score(out.images).mean())}
        for stage, out in outs.items()
    ]
    return rows, list(outs.values())


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
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
        found.append({"claim": text, "seeds": seeds, "holds_by_seed": holds, "holds": all(holds)})
    return found


def run(outdir: Path, *, seeds: Sequence[int] = (0, 1, 2), recipe: Recipe | None = None) -> dict[str, Any]:
    """The experiment; writes result.json and picture.png (of the first seed) into ``outdir``, returns the former."""
    recipe, started, cpu = recipe or Recipe(), time.perf_counter(), time.process_time()
    rows: list[Row] = []
    accuracy: dict[str, float] = {}
    with settings.threads_for(flops=0.0):  # these networks are small
        data = DIGITS.load(None)
        for seed in seeds:
            judge = Judge(DIGITS, data, seed)
            accuracy[str(seed)] = judge.accuracy
            rows.append({"seed": seed, "model": "data", "stage": "training images", **judge(data.train), "logit": None})
            gan, d_phi = train_reference(recipe, data, seed)
            samples = refiner(gan, d_phi, recipe, max_steps=0).sample(recipe.samples, seed=seed)
            logit = float(samples.logits.mean())
            rows.append({"seed": seed, "model": "gan", "stage": "raw", **judge(samples.images), "logit": logit})
            pictures: list[tuple[str, Result]] = []
            for base in train_bases(recipe, data, seed):
                found, outs = compare(base, d_phi, correct(base, gan, d_phi, recipe, seed), judge, recipe, seed)
                rows += found
                pictures += [(f"{base.name}, raw", outs[0]), (f"{base.name}, refined", outs[2])]
                for row in found:
                    print(line(row), file=sys.stderr)
            if seed == seeds[0]:
                _draw(outdir, pictures, seed)
    return result_file.write(
        outdir, "corrector", cores=1, rows=rows, seeds=list(seeds), recipe=asdict(recipe) | {"chosen_on_seed": 0},
        reduced=recipe != Recipe(), claims=claims(rows), classifier_accuracy=accuracy, seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
    )  # fmt: skip


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"seed {row['seed']} {row['model']:<5}{row['stage']:<12} FD {row['frechet_distance']:6.2f}  "
        f"CS {row['classifier_score']:5.2f}  logit {row['logit']:6.2f}"
    )


def _draw(outdir: Path, pictures: list[tuple[str, Result]], seed: int) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    rows = [(name, picture.grey(out.images[:SHOWN])) for name, out in pictures]
    notes = [f"{value:.1f}" for value in pictures[-1][1].logits[:SHOWN]]
    title = f"digits, seed {seed}: the first {SHOWN} samples of a VAE and of a flow, raw and refined; logits of the last row"
    picture.comparison(outdir / "picture.png", rows, notes, title)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastrefine.experiments.corrector", description=__doc__)
    parser.add_argument("--outdir", type=Path, required=True, help="where result.json and picture.png go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of everything (default: 0 1 2)")
    parser.add_argument("--quick", action="store_true", help="tiny trainings, to see that it runs: figures mean nothing")
    given = parser.parse_args()
    result_file.tell(run(given.outdir, seeds=given.seeds, recipe=QUICK if given.quick else None))


if __name__ == "__main__":
    main()
