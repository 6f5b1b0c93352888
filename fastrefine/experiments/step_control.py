"""Backtracking against fixed steps over three decades of step size: ``python -m fastrefine.experiments.step_control``.

The same proposals are refined by Collaborative (nonsaturating, sgd) with control="fixed" and "backtracking", stopped at the
median real logit or after 50 steps: the imbalanced ring of [CS] in data space, by D as it is and shaped, and in the latent;
the Swiss roll of [CS0] in data space; the demo's digits, and with --data MNIST, at the layer of their recipe.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fastrefine as fr
from fastrefine import settings
from fastrefine.experiments import result_file, rings
from fastrefine.experiments.demo import Judge, embedded
from fastrefine.experiments.recipes import DIGITS, MNIST
from fastrefine.experiments.recipes import Recipe as ImageRecipe

Row = dict[str, Any]
CONTROLS = ("fixed", "backtracking")
REAL = 12345  # seeds the real samples that 2-D sets are measured against and stopped by: never those of a training


@dataclass(frozen=True)
class Quality:
    """A figure of merit: its key in a row, and the difference below which two are called alike (`relative`: their ratio)."""

    key: str
    label: str
    alike: float
    higher: bool = False
    relative: bool = False

    def loss(self, value: float) -> float:
        """``value`` so that lower is better and differences count: logarithms where they are relative."""
        value = math.log(value) if self.relative else value
        return -value if self.higher else value

    @property
    def bound(self) -> float:
        """``alike`` as a difference of losses."""
        return math.log1p(self.alike) if self.relative else self.alike


GOOD = Quality("good", "good samples", 0.05, higher=True)
KL = Quality("kl", "KL (nats)", 0.05)
DISTANCE = Quality("distance", "distance", 0.25, relative=True)
FRECHET = Quality("frechet_distance", "Frechet distance", 0.25, relative=True)
SCORE = Quality("classifier_score", "classifier score", 0.25, higher=True)
STEPS = Quality("mean_steps", "mean steps", 1.0)
QUALITIES = {
    "ring": (GOOD, KL), "ring, latent": (GOOD, KL), "ring, shaped D": (GOOD, KL), "Swiss roll": (DISTANCE, GOOD),
    "digits": (FRECHET, SCORE), "MNIST": (FRECHET, SCORE),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What one run does; fixed before the claims were looked at.

    shaping_*: SGD on batches refined with backtracking by steps of shaping_step, left at a uniformly drawn step ([CS]: 5,000
    iterations of batch 1,000 at rate .008). points, images: samples a row. image_seeds: how many of the sampling seeds
    the image sets are run with.
    """

    ring: rings.Training = rings.RING
    roll: rings.Training = rings.ROLL
    point_steps: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    image_steps: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    max_steps: int = 50
    shaping_iterations: int = 500
    shaping_batch: int = 500
    shaping_rate: float = 8e-3
    shaping_step: float = 1.0
    points: int = 10_000
    images: int = 2000
    seeds: int = 3
    image_seeds: int = 1
    classifier_steps: int | None = None  # None: the image recipe's


QUICK = Recipe(
    ring=replace(rings.RING, steps=20, batch_size=100), roll=replace(rings.ROLL, steps=20, batch_size=100),
    point_steps=(1.0,), image_steps=(1.0,), max_steps=5, shaping_iterations=3, shaping_batch=50, points=200,
    images=100, seeds=1, classifier_steps=20,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A trained pair, where it is refined, and how its samples are measured; the name is a key of QUALITIES."""

    name: str
    generator: nn.Module
    discriminator: nn.Module
    at: str
    latent: int
    real: Tensor
    measure: Callable[[Tensor], Mapping[str, float]]
    step_sizes: tuple[float, ...]
    samples: int
    num_slots: int
    seeds: int

    def refiner(self, control: str, step_size: float, max_steps: int) -> fr.Refiner:
        """Collaborative of a control and a step size, with the median stop."""
        return fr.Refiner(
            self.generator, self.discriminator, fr.Collaborative(step_size, control=control), at=self.at,
            prior=fr.Normal(self.latent), real=self.real, stop=fr.stopping.MedianOfReal(), max_steps=max_steps,
            num_slots=self.num_slots,
        )  # fmt: skip


def point_cases(recipe: Recipe, seed: int) -> Iterator[Case]:
    """The ring thrice and the roll once, trained here."""
    random = torch.Generator().manual_seed(REAL)
    common: dict[str, Any] = dict(
        latent=2, step_sizes=recipe.point_steps, samples=recipe.points, num_slots=2500, seeds=recipe.seeds
    )
    g, d = rings.train(recipe.ring, rings.draw_ring, seed)
    real = rings.draw_ring(10_000, random)
    ring = Case("ring", g, d, "output", real=real, measure=rings.measure_ring, **common)
    yield ring
    yield replace(ring, name="ring, latent", at="input")
    shaped = fr.shape_discriminator(
        ring.refiner("backtracking", recipe.shaping_step, recipe.max_steps), real, recipe.shaping_iterations,
        recipe.shaping_batch, recipe.shaping_rate, optimizer="sgd", seed=seed,
    )  # fmt: skip
    yield replace(ring, name="ring, shaped D", discriminator=shaped)
    g, d = rings.train(recipe.roll, rings.draw_roll, seed)
    real = rings.draw_roll(10_000, random)

    def measure(x: Tensor) -> Mapping[str, float]:
        return rings.measure_roll(x, real)

    yield Case("Swiss roll", g, d, "output", real=real, measure=measure, **common)


def image_case(images: ImageRecipe, recipe: Recipe, data: Path | None, seed: int) -> Case:
    """The early-stopped GAN that the package carries."""
    loaded = images.load(data)
    judge = Judge(replace(images, classifier_steps=recipe.classifier_steps or images.classifier_steps), loaded, seed)
    return Case(
        {"mnist": "MNIST"}.get(images.name, images.name), *embedded(images), images.at, images.latent,
        loaded.train[: images.reference], judge, recipe.image_steps, recipe.images, images.num_slots,
        min(recipe.image_seeds, recipe.seeds),
    )  # fmt: skip


def sweep(case: Case, recipe: Recipe, seed: int) -> list[Row]:
    """Rows of a case: its proposals as they are, then every control and step size; sampling seeds seed, seed + 1, ..."""
    rows = []
    plans: list[tuple[str, float | None]] = [("none", None), *((c, size) for c in CONTROLS for size in case.step_sizes)]
    for control, size in plans:
        refiner = case.refiner("fixed", 1.0, 0) if size is None else case.refiner(control, size, recipe.max_steps)
        for s in range(seed, seed + case.seeds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fr.FastrefineWarning)  # what they say of a step size stands in the row
                out = refiner.sample(case.samples, seed=s)
            told = fr.diagnose_steps(out, refiner.sampler)
            rows.append({
                "set": case.name, "at": case.at, "control": control, "step_size": size,
                "seed": s, "samples": case.samples, **case.measure(out.images),
                "mean_steps": float(out.steps.double().mean()), "falls": told.falls, "reached": told.reached,
                "nonfinite": told.nonfinite, "gain": told.gain, "stable": told.stable, "step_sizes_reached": told.step_sizes,
                "backend": out.report["backend"],
            })  # fmt: skip
        print(line(rows[-case.seeds :]), file=sys.stderr, flush=True)
    return rows


def line(rows: Sequence[Row]) -> str:
    """Rows of one set, control and step size as text, means over seeds."""
    first = rows[0]
    size = "" if first["step_size"] is None else f"{first['step_size']:g}"
    keys = [q.key for q in QUALITIES[first["set"]]] + ["mean_steps", "falls"]
    return f"{first['set']:<15}{first['control']:<13}{size:<6}" + "".join(f"  {key} {mean(rows, key):.4g}" for key in keys)


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean of a column."""
    return sum(row[key] for row in rows) / len(rows)


def curve(rows: Sequence[Row], name: str, control: str, key: str) -> dict[float | None, float]:
    """Of one set and control: step size -> mean over seeds, in order of step size."""
    mine = [row for row in rows if row["set"] == name and row["control"] == control]
    sizes = dict.fromkeys(row["step_size"] for row in mine)
    return {size: mean([row for row in mine if row["step_size"] == size], key) for size in sizes}


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is claimed of every set and figure of merit; two values count as alike within ``Quality.alike``."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        for q in QUALITIES[name]:
            fixed, ours = (curve(rows, name, control, q.key) for control in CONTROLS)
            raw = curve(rows, name, "none", q.key)[None]
            best_fixed, worst_fixed = min(fixed.values(), key=q.loss), max(fixed.values(), key=q.loss)
            best, worst = min(ours.values(), key=q.loss), max(ours.values(), key=q.loss)
            exceptions = [size for size in ours if q.loss(ours[size]) > q.loss(fixed[size]) + q.bound]
            below = [size for size in ours if q.loss(ours[size]) > q.loss(raw) + q.bound]
            margin = f"{q.alike:.0%}" if q.relative else f"{q.alike:g}"
            told, of = {"set": name, "quality": q.key}, f"{name}, {q.label}"
            found += [
                {**told, "claim": f"{of}: backtracking's worst is within {margin} of its best", "best": best, "worst": worst,
                 "holds": q.loss(worst) <= q.loss(best) + q.bound},
                {**told, "claim": f"{of}: fixed steps' worst is worse than backtracking's worst by more than {margin}",
                 "fixed_best": best_fixed, "fixed_worst": worst_fixed, "worst": worst,
                 "holds": q.loss(worst_fixed) > q.loss(worst) + q.bound},
                {**told, "claim": f"{of}: backtracking's best is within {margin} of fixed steps' best, or better",
                 "fixed_best": best_fixed, "best": best, "holds": q.loss(best) <= q.loss(best_fixed) + q.bound},
                {**told, "claim": f"{of}: at no step size is backtracking worse than fixed steps by more than {margin}",
                 "exceptions": exceptions, "holds": not exceptions},
                {**told, "claim": f"{of}: at no step size is backtracking worse than no refinement by more than {margin}",
                 "raw": raw, "exceptions": below, "holds": not below},
            ]  # fmt: skip
    return found


def run(outdir: Path, *, data: Path | None = None, recipe: Recipe | None = None, seed: int = 0) -> dict[str, Any]:
    """The experiment; writes result.json and step-control.png into ``outdir``, returns the former.

    data: MNIST's folder, else MNIST is left out. seed: of all trainings, and the first of the sampling seeds.
    """
    recipe, started = recipe or Recipe(), time.perf_counter()
    rows: list[Row] = []
    with settings.threads_for(flops=0.0):  # these networks are small
        for case in point_cases(recipe, seed):
            rows += sweep(case, recipe, seed)
        rows += sweep(image_case(DIGITS, recipe, None, seed), recipe, seed)
        if data is not None:
            rows += sweep(image_case(MNIST, recipe, data, seed), recipe, seed)
    record = result_file.write(
        outdir, "step_control", cores=1, rows=_finite(rows), recipe=asdict(recipe),
        seeds={"training": [seed], "sampling": list(range(seed, seed + recipe.seeds))}, reduced=recipe != Recipe(),
        claims=_finite(claims(rows)), seconds=time.perf_counter() - started,
    )  # fmt: skip
    draw(outdir / "step-control.png", record["rows"])
    return record


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A PNG from rows, a result.json's too: a row of panels for each set, its figures of merit and mean steps by step size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["set"] for row in rows))
    height = 1.6 * len(names) + 0.6
    figure, axes = plt.subplots(len(names), 3, figsize=(8.5, height), sharex="row", squeeze=False)
    for line_of_axes, name in zip(axes, names, strict=True):
        line_of_axes[0].set_ylabel(name, fontsize=10, fontweight="bold")
        for axis, q in zip(line_of_axes, (*QUALITIES[name], STEPS), strict=True):
            known = [row for row in rows if row.get(q.key) is not None]
            for control, color in zip(CONTROLS, ("C1", "C0"), strict=True):
                points = curve(known, name, control, q.key)
                axis.plot(points.keys(), points.values(), label=control, color=color, marker="o", linewidth=1.5, markersize=3.5)
            for raw in () if q is STEPS else curve(known, name, "none", q.key).values():
                axis.axhline(raw, color="0.4", linestyle="--", linewidth=1, label="not refined")
            axis.set_xscale("log")
            low, high = axis.get_ylim()
            missing = max(3 * q.alike * (abs(low) if q.relative else 1) - (high - low), 0) / 2  # or mere noise fills a panel
            axis.set_ylim(*(0, high) if q is STEPS else (low - missing, high + missing))
            better = "" if q is STEPS else ", higher is better" if q.higher else ", lower is better"
            axis.set_title(q.label + better, fontsize=8, pad=3)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step size", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=10, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height), pad=0.5, h_pad=0.4)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastrefine.experiments.step_control", description=__doc__)
    parser.add_argument("--outdir", type=Path, required=True, help="where result.json and step-control.png go")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four original .gz files (default: without MNIST)")
    parser.add_argument("--seed", type=int, default=0, help="of trainings, and first of the sampling seeds (default: 0)")
    parser.add_argument("--quick", action="store_true", help="tiny trainings, to see that it runs: figures mean nothing")
    given = parser.parse_args()
    result_file.tell(run(given.outdir, data=given.data, recipe=QUICK if given.quick else None, seed=given.seed))


if __name__ == "__main__":
    main()
