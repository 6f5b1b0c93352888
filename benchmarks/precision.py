"""What a precision costs in quality: ``python -m benchmarks.precision [--device cuda] [--data MNIST] [--output FILE.json]``.

A trained GAN (the demo's embedded pair), refined by its discriminator as it is and by one shaped for it in float32, in every
precision from the same proposals: Frechet distance and classifier score on the classifier of the demo, each for several
sampling seeds, because differences between precisions are only worth telling where they exceed those between seeds.
moved: share of the samples whose number of steps differs from float32's; deviation: of their images, root mean square.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import fastrefine as fr
from benchmarks.machine import RESULTS, facts, write_json
from fastrefine.demo.judge import Judge, trained_classifier
from fastrefine.demo.recipes import DIGITS, MNIST, Recipe, embedded


def measure(recipe: Recipe, data: Path | None, device: str, seeds: int, n: int, precisions: list[str]) -> list[dict[str, Any]]:
    """A row for each discriminator and precision."""
    images = recipe.load(data)
    judge = Judge(trained_classifier(recipe.classifier, images, seed=0, steps=recipe.classifier_steps), images)
    generator, discriminator = (network.to(device) for network in embedded(recipe))
    options: dict[str, Any] = dict(
        sampler=fr.Collaborative(recipe.step_size), at=recipe.at, prior=fr.Normal(recipe.latent), max_steps=recipe.max_steps,
        real=images.train[: recipe.reference], stop=fr.stopping.MedianOfReal(), num_slots=recipe.num_slots,
    )  # fmt: skip
    plain = fr.Refiner(generator, discriminator, **options)
    shaped = fr.shape_discriminator(
        plain, images.train, recipe.shaping_iterations, recipe.shaping_batch, recipe.shaping_rate, stop=plain.stop,
        betas=(0.5, 0.9), seed=0, progress=None,
    )  # fmt: skip
    rows = []
    for name, network in (("as it is", discriminator), ("shaped", shaped)):
        wanted: list[fr.Result] = []
        for precision in precisions:
            refiner = fr.Refiner(generator, network, precision=precision, **options)
            outs = [refiner.sample(n, seed=seed) for seed in range(seeds)]
            wanted = wanted or outs
            scores = [judge(out.images) for out in outs]
            row: dict[str, Any] = {"discriminator": name, "precision": precision, "samples": n, "seeds": seeds}
            for key in ("frechet_distance", "classifier_score"):
                values = [score[key] for score in scores]
                row |= {key: statistics.mean(values), f"{key}_spread": max(values) - min(values), f"{key}_all": values}
            row["mean_steps"] = statistics.mean(float(out.steps.double().mean()) for out in outs)
            both = list(zip(outs, wanted, strict=True))
            row["moved"] = statistics.mean(float((a.steps != b.steps).double().mean()) for a, b in both)
            row["deviation"] = statistics.mean(float((a.images - b.images).square().mean().sqrt()) for a, b in both)
            row["nonfinite"] = sum(int((out.status == fr.Status.NONFINITE).sum()) for out in outs)
            rows.append(row)
            print(line(row), file=sys.stderr)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    return (
        f"| {row['discriminator']} | {row['precision']} | {row['frechet_distance']:.2f} ({row['frechet_distance_spread']:.2f}) "
        f"| {row['classifier_score']:.3f} ({row['classifier_score_spread']:.3f}) | {row['mean_steps']:.2f} "
        f"| {row['moved']:.1%} | {row['deviation']:.4f} | {row['nonfinite']} |"
    )


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown; in brackets the range over sampling seeds."""
    head = ("discriminator", "precision", "FD", "CS", "mean steps", "steps differ", "RMS of images", "non-finite")
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(line, results["rows"])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda, where tf32 is measured too")
    parser.add_argument("--data", type=Path, help="a folder with MNIST: its pair instead of the digits")
    parser.add_argument("--samples", type=int, help="for each seed (default: the recipe's)")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds (default 3)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/precision-<data>-<device>.json")
    given = parser.parse_args()
    recipe = DIGITS if given.data is None else MNIST
    precisions = ["float32", *(["tf32"] if given.device != "cpu" else []), "bfloat16", "float16"]
    if given.device == "cpu":
        torch.set_num_threads(1)
    rows = measure(recipe, given.data, given.device, given.seeds, given.samples or recipe.samples, precisions)
    results = {"kind": "fastrefine precision", "data": recipe.name, "machine": facts(torch.device(given.device)), "rows": rows}
    path = given.output or RESULTS / f"precision-{recipe.name}-{given.device}.json"
    write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
