"""The demo: one early-stopped GAN, six ways to sample from it, a picture, a table and a measured speed-up."""

from __future__ import annotations

import contextlib
import json
import platform
import time
import warnings
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
from fastrefine.training.distil import refiner_of

SHOWN = 16  # columns of the picture: the first ids, not chosen ones
B0_SIZES, B0_STEPS = (1, 3, 10, 30, 100), (2, 5, 10, 15, 20, 30, 40, 60, 80)  # tried for B0: factors of the step size, steps
B0_SAMPLES = 300  # on which they are chosen
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
                metrics |= _rows(recipe, pair, images, judge, n, seed, outdir if name == "rows" else None, name)
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
    recipe: Recipe, pair: tuple[nn.Module, nn.Module], data: Images, judge: Judge, n: int, seed: int, outdir: Path | None,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    """The rows under ``name``, and what B0 is at its best under "b0_best" in front of it."""
    g, d = pair
    options: dict[str, Any] = dict(
        sampler=fr.Collaborative(recipe.step_size), at=recipe.at, prior=fr.Normal(recipe.latent),
        real=data.train[: recipe.reference], stop=fr.stopping.MedianOfReal(), num_slots=recipe.num_slots,
    )  # fmt: skip
    raw, refiner = (fr.Refiner(g, d, max_steps=k, **options) for k in (0, recipe.max_steps))

    _say("sampling: generator, refined")
    base = _sample(raw, n, seed)
    found = [("generator", base, 0, 0), ("refined", _sample(refiner, n, seed), recipe.max_steps, 1)]
    shaping: dict[str, Any] = dict(
        iterations=recipe.shaping_iterations, batch_size=recipe.shaping_batch, learning_rate=recipe.shaping_rate,
        betas=(0.5, 0.9), stop=refiner.stop, seed=seed, progress=None,
    )  # fmt: skip
    better = refiner.with_discriminator(fr.shape_discriminator(refiner, data.train, **shaping))
    _say("sampling: shaped")
    out = _sample(better, n, seed)
    found.append(("shaped", out, recipe.max_steps, 1))
    _say(f"sampling: shaped + Metropolis-Hastings, {recipe.chain_length} proposals for each image")
    chosen = _metropolis_hastings(better, n, recipe.chain_length, seed)
    found.append(("shaped+mh", chosen, recipe.max_steps, recipe.chain_length))
    curved = refiner.replaced(sampler=fr.Collaborative(), max_steps=recipe.curved_steps)
    teacher = curved.with_discriminator(fr.shape_discriminator(curved, data.train, **shaping))
    learned = fr.distil(teacher, seed=seed, real=data.train, shaping=shaping, **recipe.distil)
    further = refiner_of(learned, teacher)
    _say("sampling: distilled, distilled + steps")
    alone = _sample(further.replaced(max_steps=0), n, seed)
    alone.report["images_per_second"] = Bench(further, 0).b0(further.at)  # it needs no discriminator
    found += [("distilled", alone, 0, 0), ("distilled+steps", _sample(further, n, seed), recipe.curved_steps, 1)]
    if outdir is not None:
        _draw(outdir / "comparison.png", recipe, base, out, alone)

    _say("the usual loop: its best step size and number of steps")
    best = _best_b0(better, recipe, judge, n, seed)
    b0 = {k: Bench(raw, k).b0(recipe.at) for k in {best["steps"], *(steps for _, _, steps, _ in found)}}
    best["images_per_second"] = b0[best["steps"]]
    rows = [
        _row(label, result, judge, proposals, b0[steps] / max(proposals, 1), best["images_per_second"])
        for label, result, steps, proposals in found
    ]
    return {name: rows, f"b0_best_{name}": best}


def _best_b0(refiner: fr.Refiner, recipe: Recipe, judge: Judge, n: int, seed: int) -> dict[str, Any]:
    """B0's quality where it is best: fixed steps for all samples; step size and number of steps chosen on other samples."""

    def loop(factor: int, steps: int) -> fr.Refiner:
        fixed = fr.Collaborative(factor * recipe.step_size, control="fixed")
        return refiner.replaced(sampler=fixed, stop=None, max_steps=steps)

    distances: dict[tuple[int, int], float] = {}
    for factor in B0_SIZES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fr.FastrefineWarning)  # of steps that are too large
            out = loop(factor, max(B0_STEPS)).sample(min(n, B0_SAMPLES), seed=seed, first_id=n, snapshots=B0_STEPS)
        distances |= {(factor, k): judge(out.snapshots[k].images)["frechet_distance"] for k in B0_STEPS}
    factor, steps = min(distances, key=distances.__getitem__)
    images = loop(factor, steps).sample(n, seed=seed).images
    return {"step_size": factor * recipe.step_size, "steps": steps, **judge(images)}


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


def _row(name: str, out: Result, judge: Judge, proposals: int, b0: float, best: float) -> Row:
    """proposals: refined for an image, 0 where D is not needed. b0, best: images/s of B0 at equal steps, at its best."""
    speed, steps = out.report["images_per_second"], float(out.steps.double().mean())
    return {
        "name": name, **judge(out.images), "mean_steps": steps, "evaluations": proposals * (steps + 1),
        "logit_before": float(out.initial_logits.mean()), "logit_after": float(out.logits.mean()),
        "images_per_second": speed, "images_per_second_b0": b0, "ratio_b0": speed / b0,
        "ratio_b0_best": speed / best,
        "backend": out.report["backend"], "threads": out.report["threads"],
    }  # fmt: skip


def _draw(path: Path, recipe: Recipe, base: Result, out: Result, alone: Result) -> None:
    before, after, learned = (pictures.levels(result.images[:SHOWN]) for result in (base, out, alone))
    notes = [
        pictures.from_to(*pair) for pair in zip(out.initial_logits[:SHOWN].tolist(), out.logits[:SHOWN].tolist(), strict=True)
    ]
    rows = [
        ("generator", before), ("refined (shaped)", after), ("difference", pictures.difference(before, after)),
        ("distilled", learned),
    ]  # fmt: skip
    title = f"{recipe.name}: the first {len(before)} samples, before and after refinement by a shaped discriminator; distilled"
    pictures.comparison(path, rows, notes, title, pictures.LEGEND)


def table(metrics: dict[str, Any], recipe: Recipe) -> str:
    """The metrics as text."""
    real = metrics["real_training_images"]
    lines = [
        f"{recipe.name}: {metrics['samples']} samples a row; Frechet distance and classifier score on a classifier of "
        f"{metrics['classifier_accuracy']:.1%} accuracy,",
        f"against held-out real images (real training images: {real['frechet_distance']:.2f}, {real['classifier_score']:.2f}).",
        "evals: evaluations of D for an image. B0 is the usual loop, whose samples all take the most steps of the row's; ours "
        "stops at the median real logit.",
    ]
    for key, title in (("rows", f"early-stopped generator, {recipe.early_steps} steps"),
                       ("converged_rows", f"converged generator, {recipe.converged_steps} steps")):  # fmt: skip
        if key not in metrics:
            continue
        lines += [
            "",
            title,
            f"{'':<16}{'FD':>7}{'CS':>6}{'evals':>7}{'logit from ... to':>22}{'images/s':>11}{'B0':>10}{'ratio':>7}"
            f"{'best B0':>9}",
        ]
        for r in metrics[key]:
            logits = f"{r['logit_before']:.2f} to {r['logit_after']:.2f}"
            lines.append(
                f"{r['name']:<16}{r['frechet_distance']:>7.2f}{r['classifier_score']:>6.2f}{r['evaluations']:>7.1f}{logits:>22}"
                f"{r['images_per_second']:>11.1f}{r['images_per_second_b0']:>10.1f}{r['ratio_b0']:>6.1f}x{r['ratio_b0_best']:>8.1f}x"
            )
        best = metrics[f"b0_best_{key}"]
        lines.append(
            f"B0 at its best takes {best['steps']} steps of {best['step_size']:g} by the shaped discriminator: FD "
            f"{best['frechet_distance']:.2f}, CS {best['classifier_score']:.2f}, {best['images_per_second']:.1f} images/s"
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
