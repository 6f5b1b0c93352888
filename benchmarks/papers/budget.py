"""Quality for a budget: Frechet distance against evaluations of D for each image. No paper shows it.

Collaborative refinement (nonsaturating, sgd) of the demo's pairs at their recipe's layer, stopped at the median real logit and
after at most K steps. Methods: fixed steps and backtracking with the recipe's step size, Barzilai-Borwein with the scale that
it finds by itself. Discriminators: as it is, and shaped with the same method. An image costs its steps and one evaluation
more. Shaping costs evaluations too, once for each pair: its iterations and batch stand in the demo's recipe. Seeds are
training seeds: of the GAN, of shaping and of sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fastrefine as fr
from benchmarks.papers import cases, plots
from benchmarks.papers.cells import checkpoints, trained_judge
from benchmarks.papers.result_file import Row, claim, mean
from benchmarks.papers.run import Recipe, Run, Table
from fastrefine.demo.gan import Trainer, Training, build, images_of, normal
from fastrefine.demo.judge import Judge
from fastrefine.demo.recipes import DIGITS, MNIST, embedded
from fastrefine.demo.recipes import Recipe as Demo
from fastrefine.metrics import frechet_distance
from fastrefine.models.digits import classify

METRIC, FEATURES = "frechet_distance", "own classifier, penultimate layer"
FIXED, BACKTRACKING, CURVATURE = "fixed steps", "backtracking", "Barzilai-Borwein"
OWN, SHAPED = "as it is", "shaped"
JUDGE = 0  # seeds the one classifier that judges a data set
# shaping_most: the most steps of a batch that D is shaped on, by method; the one of backtracking is the demo's.
FULL = Recipe(
    classifier_steps=DIGITS.classifier_steps, samples=4000,
    own=dict(most=(0, 1, 2, 3, 4, 9, 24, 49), shaping_most={FIXED: 40, BACKTRACKING: 40, CURVATURE: 4}, resamples=40),
)  # fmt: skip
QUICK = FULL.but(
    classifier_steps=100, samples=150, most=(0, 3, 30), shaping_most={BACKTRACKING: 30, CURVATURE: 3}, resamples=5
)  # fmt: skip
REDUCTIONS = ()


def sampler(method: str, step_size: float) -> fr.Collaborative:
    """A method's sampler."""
    if method == CURVATURE:
        return fr.Collaborative()
    return fr.Collaborative(step_size, control="fixed" if method == FIXED else "backtracking")


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Of the digits, and of MNIST where its folder is given."""
    for demo, path in ((DIGITS, None), (MNIST, run.data)):
        if demo is DIGITS or path is not None:
            data, table = demo.load(path), Table(run.cells(), run.recipe, seed)
            judge = trained_judge(table.cells, demo.classifier, data, seed=JUDGE, steps=run.recipe.classifier_steps)
            run.judged(demo.name, judge.accuracy)
            yield from _of_pair(run, table, demo, data.train, judge)


def _of_pair(run: Run, table: Table, demo: Demo, real: Tensor, judge: Judge) -> Iterator[Row]:
    recipe, seed = run.recipe, table.seed
    g, d = embedded(demo) if seed == 0 else _trained(table, demo, real)
    raw: dict[str, float] = {}
    for method, most in recipe.shaping_most.items():

        def refiner(discriminator: Any, steps: int, method: str = method) -> fr.Refiner:
            return fr.Refiner(
                g, discriminator, sampler(method, demo.step_size), at=demo.at, prior=fr.Normal(demo.latent),
                real=real[: demo.reference], stop=fr.stopping.MedianOfReal(), num_slots=demo.num_slots, max_steps=steps,
            )  # fmt: skip

        shaped = table.trained(
            f"{demo.name}-{method}", build(demo.discriminator, 0), refiner(d, min(most, demo.max_steps)), real,
            iterations=12 if run.quick else demo.shaping_iterations, batch=demo.shaping_batch, rate=demo.shaping_rate,
            stop=fr.stopping.MedianOfReal(), betas=(0.5, 0.9),
        )  # fmt: skip
        for name, judge_of in ((OWN, d), (SHAPED, shaped)):
            for steps in recipe.most:
                facts = {"pair": demo.name, "method": method, "discriminator": name, "most_steps": steps}

                def make(judged: Any = judge_of, steps: int = steps) -> tuple[dict[str, Tensor], Row]:
                    out = refiner(judged, steps).sample(recipe.samples, seed=seed)
                    value, low, high = _distance(judge, out.images, recipe.resamples)
                    return {}, {
                        "evaluations": float(out.steps.double().mean()) + 1 if steps else 0.0, "features": FEATURES,
                        "metric": METRIC, "value": value, "low": low, "high": high,
                    }  # fmt: skip

                row = table.kept(facts, make)
                raw.setdefault(demo.name, row["value"])
                yield row | {"relative": row["value"] / raw[demo.name]}


def _trained(table: Table, demo: Demo, real: Tensor) -> tuple[Any, Any]:
    """The early-stopped pair of another training seed."""
    seed, training = table.seed, Training(64, "adam", demo.learning_rate, r1=demo.r1)

    def make() -> Trainer:
        g, d = build(demo.generator, seed), build(demo.discriminator, seed + 100)
        return Trainer(g, d, images_of(real), normal(demo.latent), training, seed)

    return checkpoints(table.cells, f"{demo.name}-{seed}", make, (demo.early_steps,))[demo.early_steps]


def _distance(judge: Judge, images: Tensor, resamples: int) -> tuple[float, float, float]:
    """Frechet distance, and the 5 % and 95 % quantile over resampled images, shifted by the bias of resampling."""
    features = classify(judge.classifier, images)[0]
    value, random = frechet_distance(features, judge.reference), torch.Generator().manual_seed(0)
    drawn = torch.tensor([
        frechet_distance(features[torch.randint(len(features), (len(features),), generator=random)], judge.reference)
        for _ in range(resamples)
    ])  # fmt: skip
    spread = drawn - drawn.mean()
    return value, value + float(spread.quantile(0.05)), value + float(spread.quantile(0.95))


def comparison(rows: Sequence[Row]) -> list[Row]:
    """No paper has these figures."""
    return []


def claims(rows: Sequence[Row]) -> list[Row]:
    """Of shaped discriminators: what the curvature needs for the quality that backtracking has after many steps."""
    found = []
    for pair, share in (("digits", 5), ("mnist", 2)):
        mine = [row for row in rows if row["pair"] == pair and row["discriminator"] == SHAPED]
        if not mine:
            continue
        most = max(row["most_steps"] for row in mine)
        few = max(row["most_steps"] for row in mine if row["most_steps"] <= 4)
        ours, cost = (mean(mine, key, method=CURVATURE, most_steps=few) for key in ("value", "evaluations"))
        theirs, before = (mean(mine, key, method=BACKTRACKING, most_steps=most) for key in ("value", "evaluations"))
        found += [
            claim(
                f"{pair}: {CURVATURE} with at most {few} steps comes within 5 % of {BACKTRACKING} with {most}",
                ours <= 1.05 * theirs, quality=METRIC, ours=ours, theirs=theirs,
            ),
            claim(
                f"{pair}: it costs at most 1/{share} of the evaluations", share * cost <= before, quality="evaluations",
                ours=cost, theirs=before,
            ),
        ]  # fmt: skip
    return found


def draw(run: Run, rows: Sequence[Row]) -> None:
    """The curves of each pair, means over seeds."""
    for pair in dict.fromkeys(row["pair"] for row in rows):
        lines: dict[str, dict[str, Any]] = {}
        for method in run.recipe.shaping_most:
            for name in (OWN, SHAPED):
                mine = [r for r in rows if (r["pair"], r["method"], r["discriminator"]) == (pair, method, name)]
                xs = cases.curve(mine, "most_steps", "evaluations")
                ys = cases.curve(mine, "most_steps", "value")
                lines[f"{method}, D {name}"] = {
                    "x": list(xs.values()), "Frechet distance": list(ys.values()),
                    "style": {"linestyle": "-" if name == SHAPED else ":"},
                }  # fmt: skip
        plots.curves(run.outdir / f"{pair}.png", ("Frechet distance",), lines, "evaluations per image")
