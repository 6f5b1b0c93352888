"""The demo: one early-stopped GAN, four ways to sample from it, a picture, a table and a measured speed-up."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import fastrefine as fr
from fastrefine import pictures
from fastrefine.datasets import Images
from fastrefine.demo.gan import build, train_gan
from fastrefine.demo.judge import Judge, trained_classifier
from fastrefine.demo.recipes import DIGITS, MNIST, Recipe, embedded
from fastrefine.production.bench import Bench
from fastrefine.progress import ProgressBar, over
from fastrefine.result import Result

SHOWN = 16  # columns of the picture: the first ids, not chosen ones
Row = dict[str, Any]


def run(
    outdir: Path, *, data: Path | None = None, samples: int | None = None, seed: int = 0, retrain: bool = False,
    converged: bool = False, as_json: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the demo, write comparison.png and metrics.json into ``outdir``, print the table; returns the metrics."""
    recipe = DIGITS if data is None else MNIST
    outdir.mkdir(parents=True, exist_ok=True)
    started, n = time.perf_counter(), samples or recipe.samples
    with one_thread():
        images = recipe.load(data)
        _say(f"training the classifier that judges ({recipe.classifier_steps} steps)")
        judge = Judge(trained_classifier(recipe.classifier, images, seed=seed, steps=recipe.classifier_steps), images)
        metrics: dict[str, Any] = {
            "dataset": recipe.name, "samples": n, "seed": seed, "classifier_accuracy": judge.accuracy,
            "real_training_images": judge(images.train[: max(n, 1000)]),
            "torch": torch.__version__, "fastrefine": fr.__version__, "machine": platform.machine(),
        }  # fmt: skip
        for steps, name in ((recipe.early_steps, "rows"), (recipe.converged_steps, "converged_rows")):
            if name == "rows" or converged:
                pair = _networks(recipe, images, seed, steps, retrain)
                metrics[name] = _rows(recipe, pair, images, judge, n, seed, outdir if name == "rows" else None)
    metrics["seconds"] = time.perf_counter() - started
    (outdir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    click.echo(json.dumps(metrics) if as_json else table(metrics, recipe))
    _say(f"wrote {outdir / 'comparison.png'} and {outdir / 'metrics.json'}")
    return metrics


def _networks(recipe: Recipe, data: Images, seed: int, steps: int, retrain: bool) -> tuple[nn.Module, nn.Module]:
    """The trained pair: embedded weights of the early-stopped one where they serve, else trained now."""
    if not retrain and steps == recipe.early_steps:
        return embedded(recipe)
    g, d = build(recipe.generator, seed), build(recipe.discriminator, seed + 100)
    with ProgressBar(steps, "training the GAN", "steps", None) as bar:
        train_gan(
            g, d, data.train, latent_dim=recipe.latent, steps=steps, learning_rate=recipe.learning_rate, r1=recipe.r1,
            seed=seed, callback=lambda _: bar.to(bar.done + 1),
        )  # fmt: skip
    return g, d


def _rows(
    recipe: Recipe, pair: tuple[nn.Module, nn.Module], data: Images, judge: Judge, n: int, seed: int, outdir: Path | None
) -> list[Row]:
    g, d = pair
    options: dict[str, Any] = dict(
        sampler=fr.Collaborative(recipe.step_size), at=recipe.at, prior=fr.Normal(recipe.latent),
        real=data.train[: recipe.reference], stop=fr.stopping.MedianOfReal(), num_slots=recipe.num_slots,
    )  # fmt: skip
    raw, refiner = (fr.Refiner(g, d, max_steps=k, **options) for k in (0, recipe.max_steps))
    b0 = {k: Bench(raw, k).b0(recipe.at) for k in (0, recipe.max_steps)}

    _say("sampling: generator, refined")
    base = _sample(raw, n, seed)
    rows = [
        _row("generator", base, judge, b0[0]),
        _row("refined", _sample(refiner, n, seed), judge, b0[recipe.max_steps]),
    ]
    shaped = fr.shape_discriminator(
        refiner, data.train, recipe.shaping_iterations, recipe.shaping_batch, recipe.shaping_rate, stop=refiner.stop,
        betas=(0.5, 0.9), seed=seed, progress=None,
    )  # fmt: skip
    better = refiner.with_discriminator(shaped)
    _say("sampling: shaped")
    out = _sample(better, n, seed)
    rows.append(_row("shaped", out, judge, b0[recipe.max_steps]))
    _say(f"sampling: shaped + Metropolis-Hastings, {recipe.chain_length} proposals for each image")
    chosen = _metropolis_hastings(better, n, recipe.chain_length, seed)
    rows.append(_row("shaped+mh", chosen, judge, b0[recipe.max_steps] / recipe.chain_length))
    if outdir is not None:
        _draw(outdir / "comparison.png", recipe, base, out)
    return rows


def _sample(refiner: fr.Refiner, n: int, seed: int) -> Result:
    refiner.sample(256, seed=seed + 1)  # warm-up, as the baseline has one: traces the step
    return refiner.sample(n, seed=seed)


def _metropolis_hastings(refiner: fr.Refiner, n: int, length: int, seed: int) -> Result:
    """n chains over n x length refined proposals, part by part, so that only the chosen images are kept."""
    parts, chains = [], 500
    stream = refiner.stream(n * length, seed=seed, chunk=chains * length)
    for part in over(stream, n * length, "selecting", "proposals", None, len):
        # the row is [CS]'s scheme with D as it comes out of shaping, whether it may be trusted or not
        chain = fr.metropolis_hastings(part, length, seed=seed + int(part.ids[0]), untrusted="allow")
        parts.append(part.select(chain.indices))
    chosen = Result.concatenate(parts)
    chosen.report["images_per_second"] /= length
    return chosen


def _row(name: str, out: Result, judge: Judge, b0: float) -> Row:
    speed = out.report["images_per_second"]
    return {
        "name": name, **judge(out.images), "mean_steps": float(out.steps.double().mean()),
        "logit_before": float(out.initial_logits.mean()), "logit_after": float(out.logits.mean()),
        "images_per_second": speed, "images_per_second_b0": b0, "ratio_b0": speed / b0,
        "backend": out.report["backend"], "threads": out.report["threads"],
    }  # fmt: skip


def _draw(path: Path, recipe: Recipe, base: Result, out: Result) -> None:
    before, after = (pictures.levels(images[:SHOWN]) for images in (base.images, out.images))
    logits = list(zip(out.initial_logits[:SHOWN].tolist(), out.logits[:SHOWN].tolist(), strict=True))
    title = f"{recipe.name}: the first {len(before)} samples, before and after refinement by a shaped discriminator"
    pictures.grid(path, before, after, logits, title)


def table(metrics: dict[str, Any], recipe: Recipe) -> str:
    """The metrics as text."""
    real = metrics["real_training_images"]
    lines = [
        f"{recipe.name}: {metrics['samples']} samples a row; Frechet distance and classifier score on a classifier of "
        f"{metrics['classifier_accuracy']:.1%} accuracy,",
        f"against held-out real images (real training images: {real['frechet_distance']:.2f}, {real['classifier_score']:.2f}).",
        f"B0 is the usual loop: {recipe.max_steps} steps for every sample; ours stops at the median real logit.",
    ]
    for key, title in (("rows", f"early-stopped generator, {recipe.early_steps} steps"),
                       ("converged_rows", f"converged generator, {recipe.converged_steps} steps")):  # fmt: skip
        if key not in metrics:
            continue
        lines += [
            "",
            title,
            f"{'':<11}{'FD':>8}{'CS':>7}{'steps':>7}{'logit from ... to':>22}{'images/s':>11}{'B0':>9}{'ratio':>8}",
        ]
        for r in metrics[key]:
            logits = f"{r['logit_before']:.2f} to {r['logit_after']:.2f}"
            lines.append(
                f"{r['name']:<11}{r['frechet_distance']:>8.2f}{r['classifier_score']:>7.2f}{r['mean_steps']:>7.1f}{logits:>22}"
                f"{r['images_per_second']:>11.1f}{r['images_per_second_b0']:>9.1f}{r['ratio_b0']:>7.1f}x"
            )
    return "\n".join(lines)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small networks run fastest on one thread, ours and the baseline alike, and training repeats its bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(text: str) -> None:
    click.echo(text, err=True)
