"""A generator that comes alone gets a discriminator, and is refined: ``python -m fastrefine.experiments.fitted``.

The demo's early-stopped generator (embedded weights, MNIST or digits), its own discriminator thrown away: one is fitted to
it on the real training images (``fr.fit_discriminator``), shaped for refinement ([CS] Alg. 2), and used for collaborative
sampling as in the demo. Frechet distance and classifier score on a classifier trained here, against held-out images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import fastrefine as fr
from fastrefine import settings
from fastrefine.experiments import picture, recipes, result_file
from fastrefine.experiments.demo import Judge, embedded
from fastrefine.result import Result

SHOWN = 16  # columns of the picture: the first ids, not chosen ones
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What the demo's recipe does not fix, and what is taken from it unless given: iterations of shaping, samples."""

    fit_iterations: int = 1000
    fit_rate: float = 1e-3
    fit_batch: int = 64
    shaping_iterations: int | None = None
    samples: int | None = None


QUICK = Sizes(fit_iterations=40, shaping_iterations=3, samples=300)


def fitted_refiner(recipe: recipes.Recipe, real: Tensor, sizes: Sizes, seed: int) -> fr.Refiner:
    """The demo's refiner of the embedded generator, with the default discriminator fitted to it on ``real``."""
    generator, _ = embedded(recipe)
    prior = fr.Normal(recipe.latent)
    fitted = fr.fit_discriminator(
        generator, real, sizes.fit_iterations, prior=prior, batch_size=sizes.fit_batch, learning_rate=sizes.fit_rate, seed=seed
    )
    return fr.Refiner(
        generator, fitted, fr.Collaborative(recipe.step_size), at=recipe.at, max_steps=recipe.max_steps, prior=prior,
        stop=fr.stopping.MedianOfReal(), real=real[: recipe.reference], num_slots=recipe.num_slots,
    )  # fmt: skip


def shaped(refiner: fr.Refiner, recipe: recipes.Recipe, real: Tensor, sizes: Sizes, seed: int) -> fr.Refiner:
    """The same with its discriminator shaped, by the demo's recipe."""
    iterations = sizes.shaping_iterations or recipe.shaping_iterations
    discriminator = fr.shape_discriminator(
        refiner, real, iterations, recipe.shaping_batch, recipe.shaping_rate, stop=refiner.stop, betas=(0.5, 0.9), seed=seed
    )
    return refiner.with_discriminator(discriminator)


def run(
    outdir: Path, *, data: Path | None = None, seeds: Sequence[int] = (0,), sizes: Sizes | None = None
) -> dict[str, Any]:  # fmt: skip
    """The experiment on MNIST in the folder ``data``, or on the digits; writes result.json and picture.png into ``outdir``."""
    sizes, started, cpu = sizes or Sizes(), time.perf_counter(), time.process_time()
    recipe = recipes.DIGITS if data is None else recipes.MNIST
    n = sizes.samples or recipe.samples
    rows: list[Row] = []
    accuracy: dict[str, float] = {}
    with settings.threads_for(flops=0.0):  # one thread, so that training repeats its bits
        images = recipe.load(data)
        for seed in seeds:
            judge = Judge(recipe, images, seed)
            accuracy[str(seed)] = judge.accuracy
            plain = fitted_refiner(recipe, images.train, sizes, seed)
            better = shaped(plain, recipe, images.train, sizes, seed)
            raw = fr.Refiner(
                plain.generator, plain.discriminator, plain.sampler, at=recipe.at, max_steps=0, prior=plain.prior,
                num_slots=recipe.num_slots,
            )  # fmt: skip
            outs = {name: r.sample(n, seed=seed) for name, r in (("raw", raw), ("fitted", plain), ("fitted, shaped", better))}
            for stage, out in outs.items():
                rows.append(
                    {
                        "seed": seed, "stage": stage, **judge(out.images), "mean_steps": float(out.steps.double().mean()),
                        "logit_before": float(out.initial_logits.mean()), "logit_after": float(out.logits.mean()),
                    }
                )  # fmt: skip
                print(line(rows[-1]), file=sys.stderr)
            if seed == seeds[0]:
                _draw(outdir, recipe.name, outs["raw"], outs["fitted, shaped"])
    reduced = replace(sizes, samples=n) != Sizes(samples=recipe.samples)
    return result_file.write(
        outdir, "fitted", cores=1, data=recipe.name, rows=rows, seeds=list(seeds), reduced=reduced, claims=claims(rows),
        recipe={"demo": recipe.name, "generator": f"embedded, {recipe.early_steps} steps"} | asdict(sizes) | {"samples": n},
        classifier_accuracy=accuracy, seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
    )  # fmt: skip


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Refinement by the fitted and shaped discriminator lowers the distance, in every seed."""
    distance = {(r["seed"], r["stage"]): r["frechet_distance"] for r in rows}
    seeds = sorted({seed for seed, _ in distance})
    holds = [distance[seed, "fitted, shaped"] < distance[seed, "raw"] for seed in seeds]
    text = "a discriminator fitted to the generator alone, then shaped, refines to a lower Frechet distance"
    return [{"claim": text, "seeds": seeds, "holds_by_seed": holds, "holds": all(holds)}]


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"seed {row['seed']} {row['stage']:<15} FD {row['frechet_distance']:7.2f}  CS {row['classifier_score']:5.2f}  "
        f"steps {row['mean_steps']:4.1f}  logit {row['logit_before']:.2f} > {row['logit_after']:.2f}"
    )


def _draw(outdir: Path, name: str, raw: Result, refined: Result) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    rows = [(label, picture.grey(out.images[:SHOWN])) for label, out in (("generator", raw), ("refined", refined))]
    notes = [f"{a:.1f} > {b:.1f}" for a, b in zip(refined.initial_logits[:SHOWN], refined.logits[:SHOWN], strict=True)]
    title = f"{name}: the first {SHOWN} samples, refined by a discriminator fitted to the generator alone, then shaped"
    picture.comparison(outdir / "picture.png", rows, notes, title)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastrefine.experiments.fitted", description=__doc__)
    parser.add_argument("--outdir", type=Path, required=True, help="where result.json and picture.png go")
    parser.add_argument("--data", type=Path, help="a folder with MNIST's idx files (.gz); default: the digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of fitting, shaping, sampling, judge (default: 0)")
    parser.add_argument("--samples", type=int, help="in each row (default: 4000 digits, 10000 MNIST)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: figures mean nothing")
    given = parser.parse_args()
    sizes = QUICK if given.quick else Sizes(samples=given.samples)
    result_file.tell(run(given.outdir, data=given.data, seeds=given.seeds, sizes=sizes))


if __name__ == "__main__":
    main()
