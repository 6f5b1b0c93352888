"""Backtracking against fixed steps over three decades of step size.

The same proposals are refined by Collaborative (nonsaturating, sgd) with control="fixed" and "backtracking", stopped at the
median real logit or after 50 steps: the imbalanced ring of [CS] in data space, by D as it is and shaped, and in the latent;
the Swiss roll of [CS0] in data space; the demo's digits, and with data MNIST, at the layer of their recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import fastrefine as fr
from benchmarks.papers import cases, plots
from benchmarks.papers.cases import CONTROLS, QUICK_RING, Case, Quality, curve
from benchmarks.papers.cells import trained_judge
from benchmarks.papers.plane import EARLY, RING
from benchmarks.papers.result_file import Row, against, claim
from benchmarks.papers.run import Made, Recipe, Run, Table
from fastrefine.demo.recipes import DIGITS, MNIST

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
# Fixed before the claims were looked at. [CS] published 5,000 iterations of shaping, of batch 1,000. samples, images: of a row.
# point_seeds, image_seeds: how many sampling seeds, from the training's on.
FULL = Recipe(
    step_size=1.0, max_steps=50, shaping_iterations=500, shaping_batch=500, shaping_rate=8e-3, shaping_steps=50, samples=10_000,
    own=dict(
        ring=RING, ring_steps=3000, roll=EARLY, roll_steps=3000, point_sizes=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        image_sizes=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), images=2000, point_seeds=3, image_seeds=1,
    ),
)  # fmt: skip
QUICK = FULL.but(
    ring=QUICK_RING, ring_steps=250, roll=EARLY.smaller(100), roll_steps=20, point_sizes=(30.0,), image_sizes=(30.0,),
    max_steps=10, shaping_iterations=3, shaping_batch=100, shaping_steps=4, samples=200, images=50, point_seeds=1,
    classifier_steps=5,
)  # fmt: skip
REDUCTIONS = ()


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Of every case; seed: of the trainings, and the first of the sampling seeds. Without data MNIST is left out."""
    recipe, table = run.recipe, Table(run.cells(), run.recipe, seed)
    run.extra["data"] = None if run.data is None else "mnist"
    ring = cases.ring(table, recipe.ring, recipe.ring_steps)
    yield from sweep(table, ring, recipe.point_sizes, recipe.samples, recipe.point_seeds)
    for case in (
        replace(ring, name="ring, latent", at="input"),
        cases.shaped_points(table, "D-ring-shaped", "ring, shaped D", ring, None),
        cases.swiss_roll(table, recipe.roll, recipe.roll_steps),
    ):
        yield from sweep(table, case, recipe.point_sizes, recipe.samples, recipe.point_seeds)
    for images in (DIGITS, MNIST) if run.data is not None else (DIGITS,):
        loaded, steps = images.load(run.data if images is MNIST else None), recipe.classifier_steps or images.classifier_steps
        own = run.cells(recipe.but(name=images.name))  # each set has a classifier of its own
        judge = trained_judge(own, images.classifier, loaded, seed=seed, steps=steps)
        case = cases.images(images, loaded.train, judge)
        yield from sweep(table, case, recipe.image_sizes, recipe.images, recipe.image_seeds)


def sweep(table: Table, case: Case, sizes: Sequence[float], samples: int, seeds: int) -> Iterator[Row]:
    """Rows of a case: its proposals as they are, then every control and step size; sampling seeds seed, seed + 1, ..."""
    plans: list[tuple[str, float | None]] = [("none", None), *((c, size) for c in CONTROLS for size in sizes)]
    for control, size in plans:
        moved = ("fixed", 1.0, 0) if size is None else (control, size, table.recipe.max_steps)
        refiner = case.refiner(*moved, fr.stopping.MedianOfReal())
        facts: Row = {"set": case.name, "at": case.at, "control": control, "step_size": size}
        for seed in range(table.seed, table.seed + seeds):
            yield table.kept(
                {**facts, "sampling_seed": seed, "samples": samples},
                lambda seed=seed, r=refiner: _measured(case, r, samples, seed),  # type: ignore[misc]
            )


def _measured(case: Case, refiner: fr.Refiner, samples: int, seed: int) -> Made:
    out = refiner.sample(samples, seed=seed)
    report = fr.diagnose_steps(out, refiner.sampler)
    return {}, {
        **case.measure(out.images), "mean_steps": float(out.steps.double().mean()), "falls": report.falls,
        "reached": report.reached, "nonfinite": report.nonfinite, "gain": report.gain, "stable": report.stable,
        "step_sizes_reached": report.step_sizes, "backend": out.report["backend"],
    }  # fmt: skip


def claims(rows: Sequence[Row]) -> list[Row]:
    """What is claimed of every set and figure of merit; two values count as alike within ``Quality.alike``."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        for q in QUALITIES[name]:
            fixed, ours = (curve(rows, "step_size", q.key, set=name, control=control) for control in CONTROLS)
            raw = curve(rows, "step_size", q.key, set=name, control="none")[None]
            best_fixed, worst_fixed = min(fixed.values(), key=q.loss), max(fixed.values(), key=q.loss)
            best, worst = min(ours.values(), key=q.loss), max(ours.values(), key=q.loss)
            exceptions = [size for size in ours if q.loss(ours[size]) > q.loss(fixed[size]) + q.bound]
            below = [size for size in ours if q.loss(ours[size]) > q.loss(raw) + q.bound]
            facts: Row = {"set": name, "quality": q.key}
            of, margin = f"{name}, {q.label}", q.margin
            found += [
                claim(f"{of}: backtracking's worst is within {margin} of its best",
                      q.loss(worst) <= q.loss(best) + q.bound, **facts, best=best, worst=worst),
                claim(f"{of}: fixed steps' worst is worse than backtracking's worst by more than {margin}",
                      q.loss(worst_fixed) > q.loss(worst) + q.bound, **facts, fixed_best=best_fixed, fixed_worst=worst_fixed,
                      worst=worst),
                claim(f"{of}: backtracking's best is within {margin} of fixed steps' best, or better",
                      q.loss(best) <= q.loss(best_fixed) + q.bound, **facts, fixed_best=best_fixed, best=best),
                claim(f"{of}: at no step size is backtracking worse than fixed steps by more than {margin}",
                      not exceptions, **facts, exceptions=exceptions),
                claim(f"{of}: at no step size is backtracking worse than no refinement by more than {margin}",
                      not below, **facts, raw=raw, exceptions=below),
            ]  # fmt: skip
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """No paper has the figures: each set's worst over the step sizes, of both controls, by seed."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        q = QUALITIES[name][0]
        for control in CONTROLS:
            mine = [row for row in rows if row["set"] == name and row["control"] == control]
            seeds = dict.fromkeys((row["seed"], row["sampling_seed"]) for row in mine)
            worst = [max((r[q.key] for r in mine if (r["seed"], r["sampling_seed"]) == s), key=q.loss) for s in seeds]
            headline = name in ("ring, shaped D", "MNIST")
            found.append(against(f"{name}, {control}, worst step size", q.label, None, worst, q.better, headline=headline))
    return found


def draw(run: Run, rows: Sequence[Row]) -> None:
    """A PNG: a row of panels for each set, its figures of merit and mean steps by step size."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    height = 1.6 * len(names) + 0.6
    figure, axes = plots.subplots(len(names), 3, 8.5 / 3, height / len(names))
    for line_of_axes, name in zip(axes, names, strict=True):
        line_of_axes[0].set_ylabel(name, fontsize=10, fontweight="bold")
        for axis, q in zip(line_of_axes, (*QUALITIES[name], STEPS), strict=True):
            known = [row for row in rows if row.get(q.key) is not None]
            for control, color in zip(CONTROLS, ("C1", "C0"), strict=True):
                points = curve(known, "step_size", q.key, set=name, control=control)
                axis.plot(points.keys(), points.values(), label=control, color=color, marker="o", linewidth=1.5, markersize=3.5)
            for raw in () if q is STEPS else curve(known, "step_size", q.key, set=name, control="none").values():
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
    plots.save(figure, run.outdir / "step-control.png")
