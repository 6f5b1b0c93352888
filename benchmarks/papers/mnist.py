"""[CS] 4.2 on MNIST: a GAN at three checkpoints, every way to sample from it, and what shaping and the layer do to it.

Refinement at the 7x7x128 map, twice: by fixed steps with momentum as published, and with backtracking until the median real
logit; each with D as it is and with D shaped. Besides, [CS] Figures 10 (iterations of shaping) and 11 (layers), [CS0] Figures
6 and 7 (early and late generator) and 9 (denoising). Frechet distance and classifier score are of a classifier trained here:
their values do not compare with the published ones, what refinement changes in them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.papers import plots
from benchmarks.papers.image_networks import INFO_TRAINING
from benchmarks.papers.mnist_rows import AT, FIXED, Mnist
from benchmarks.papers.result_file import Row, against, claim, pick
from benchmarks.papers.run import Recipe, Run
from fastrefine import datasets
from fastrefine.datasets import Images

# Rate of shaping and step size were chosen on checkpoint 1000 of seed 0. momentum_steps: the published step size at each
# checkpoint, here of each sample's own gradient (the public code takes it of the mean over its batch of 64). step_size: of
# backtracking, at first. shown: the checkpoint that shaping and layers are looked at. shaping_stages: numbers of iterations
# after which the shaped D is kept; each stage goes on from the last one, with fresh moments of Adam. layers: where [CS] Figure
# 11 refines. width, hidden: of the networks. denoised: images.
FULL = Recipe(
    training=INFO_TRAINING, checkpoints=(200, 1000, 4200), classifier_steps=2500, at=AT, max_steps=20, step_size=5.0,
    shaping_batch=64, shaping_rate=1e-4, shaping_steps=10, samples=10_000, chain_length=5, reference=1000, num_slots=64,
    precision="bfloat16",
    own=dict(
        momentum_steps=(0.5, 0.3, 0.1), shown=1000, width=64, hidden=1024, fixed_samples=5000, shaping_stages=(100, 250, 500),
        shaping_slots=32, layers=("input", "act1", AT, "act14", "output"), denoising_iterations=150, denoised=1000,
    ),
)  # fmt: skip
QUICK = FULL.but(
    checkpoints=(70,), momentum_steps=(0.3,), shown=70, width=6, hidden=32, classifier_steps=40, max_steps=4,
    fixed_samples=100, shaping_stages=(20,), shaping_batch=24, shaping_rate=2e-3, shaping_steps=3, layers=("output",),
    denoising_iterations=2, denoised=50, training=replace(INFO_TRAINING, batch_size=24, rates=(3e-3, 2e-3), bfloat16=False),
    samples=200, chain_length=2, reference=200, num_slots=50, precision="float32",
)  # fmt: skip
REDUCTIONS = (
    "checkpoints 200, 1000 and 4200 of the published seven up to 5000",
    "10,000 samples in place of 50,000; 5,000 of refinement by fixed steps",
    "20 steps of refinement (the paper's text; its code runs 50)",
    "500 iterations of shaping at rate 1e-4, on batches refined by at most 10 steps; published: 2 epochs (1,900) at 1e-5",
    "one D shaped for each checkpoint, with backtracking, serves both controls",
    "bfloat16 between the outer layers in training, and in the steps of refinement",
    "D without the paper's BatchNorm, as in the public code: with it D, in eval mode after 200 iterations, ranked generated "
    "images above real ones (a real one above a generated one in 27 of 100 pairs)",
)
DISTANCE, SCORE = "frechet_distance", "classifier_score"
# [CS], 50,000 samples: (classifier score or None where the best distance alone is given, Frechet distance)
PUBLISHED: dict[int, dict[str, tuple[Any, float]]] = {
    200: {"standard": (5.69, 61.5), "refine, unshaped": (7.75, 27.1), "refine, shaped": (7.33, 24.3), "DRS": (None, 58.6),
          "MH": (None, 58.5)},
    1000: {"standard": (8.13, 6.07), "refine, unshaped": (8.98, 3.68), "refine, shaped": (8.91, 0.705), "DRS": (None, 6.08),
           "MH": (None, 5.83)},
    4200: {"standard": (8.82, 1.93), "refine, unshaped": (9.21, 2.00), "refine, shaped": (9.29, 0.789), "DRS": (None, 2.05),
           "MH": (None, 2.28)},
}  # fmt: skip


def rows(run: Run, seed: int) -> list[Row]:
    """On MNIST; a quick run on a part of it or, without data, on scikit-learn's digits."""
    one = _mnist(run, seed)
    run.judged(str(seed), one.judge.accuracy)
    return one.rows()


def _mnist(run: Run, seed: int) -> Mnist:
    images = enlarged(datasets.load_digits()) if run.data is None else datasets.load_mnist(run.data)
    return Mnist(run.cells(), run.recipe, seed, fewer(images, 1000) if run.quick else images)


def enlarged(data: Images) -> Images:
    """scikit-learn's 8x8 digits as 28x28 images, for runs without MNIST."""

    def larger(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, size=28, mode="bicubic", align_corners=False).clamp(-1, 1)

    return data._replace(train=larger(data.train), test=larger(data.test))


def fewer(data: Images, n: int) -> Images:
    """The first ``n`` images of each part."""
    return Images(*(part[:n] for part in data))


def claims(rows: Sequence[Row]) -> list[Row]:
    """Of every checkpoint, of shaping and of denoising; each holds where it does in every seed."""
    found, few = [], _equal_number(rows)
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows if row["part"] == "table"):
        for suffix, control, number in (("", "backtracking", ""), (FIXED, "fixed steps", few)):
            raw, own, better = (
                _figures(rows, checkpoint, name, number)
                for name in ("standard", "refine, unshaped" + suffix, "refine, shaped" + suffix)
            )
            found.append(claim(
                f"checkpoint {checkpoint}, {control}: refined by the shaped D, distance and score beat the generator's",
                _all_lower(better[0], raw[0]) and _all_lower(raw[1], better[1]),
                distance=better[0], distance_of_generator=raw[0], score=better[1], score_of_generator=raw[1],
            ))  # fmt: skip
            found.append(claim(
                f"checkpoint {checkpoint}, {control}: the shaped D refines to a lower distance than D as it is",
                _all_lower(better[0], own[0]), distance=better[0], distance_unshaped=own[0],
            ))  # fmt: skip
        ours, drs, mh = (_figures(rows, checkpoint, name, few)[0] for name in ("collaborative", "DRS", "MH"))
        found.append(claim(
            f"checkpoint {checkpoint}: collaborative samples have a lower distance than as many of DRS and of MH",
            _all_lower(ours, drs) and _all_lower(ours, mh), distance=ours, distance_drs=drs, distance_mh=mh,
        ))  # fmt: skip
    iterations = sorted({row["iterations"] for row in rows if row["part"] == "shaping"})
    by = {k: pick(rows, DISTANCE, part="shaping", iterations=k) for k in iterations}
    found.append(claim(
        f"{iterations[-1]} iterations of shaping give a lower distance than none", _all_lower(by[iterations[-1]], by[0]),
        **{f"distance_{k}": values for k, values in by.items()},
    ))  # fmt: skip
    noisy, frozen, denoised = (
        pick(rows, "mse", part="denoising", name=name) for name in ("noisy", "denoised, unshaped", "denoised, shaped")
    )
    found.append(claim(
        "denoised by the shaped D, images are nearer to the clean ones than noisy, and than denoised by D as it is",
        _all_lower(denoised, noisy) and _all_lower(denoised, frozen), mse=denoised, mse_noisy=noisy, mse_unshaped=frozen,
    ))  # fmt: skip
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """What each way changes, beside what it changes in [CS]; for checkpoints that [CS] has."""
    found, few = [], _equal_number(rows)
    for checkpoint, published in PUBLISHED.items():
        raw_score, raw_distance = published["standard"]
        named = [name for name in published if name != "standard"]
        for name in (*named, *(name + FIXED for name in named if name.startswith("refine"))):
            score, distance = published[name.removesuffix(FIXED)]
            number = few if name.endswith(FIXED) or name == "DRS" else ""
            raw, ours = (_figures(rows, checkpoint, one, number) for one in ("standard", name))
            ratios = [a / b for a, b in zip(ours[0], raw[0], strict=True)]
            case, headline = f"MNIST, checkpoint {checkpoint}: {name}", name == "refine, shaped"
            found.append(against(
                case, "FD / FD of the generator", distance / raw_distance, ratios, "lower", headline=headline
            ))  # fmt: skip
            if score is not None:
                gains = [a - b for a, b in zip(ours[1], raw[1], strict=True)]
                found.append(against(case, "CS - CS of the generator", score - raw_score, gains, "higher"))
    return found


def _equal_number(rows: Sequence[Row]) -> str:
    """Ends the keys of figures that all rows of the table have of equally many samples: as many as there are chains."""
    return f"_{int(pick(rows, 'samples', part='table', name='collaborative')[0])}"


def _figures(rows: Sequence[Row], checkpoint: int, name: str, number: str = "") -> tuple[list[float], list[float]]:
    """(distances, scores) of a way at a checkpoint, over seeds."""
    distances, scores = (pick(rows, key + number, part="table", checkpoint=checkpoint, name=name) for key in (DISTANCE, SCORE))
    return distances, scores


def _all_lower(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x < y for x, y in zip(a, b, strict=True))


def draw(run: Run, rows: Sequence[Row]) -> None:
    """[CS] Figures 10 and 11, [CS0] Figures 6, 7 and 9, and the table as curves; of the first seed."""
    one, recipe, outdir = _mnist(run, run.seeds[0]), run.recipe, run.outdir
    first, last, best = recipe.checkpoints[0], recipe.checkpoints[-1], max(recipe.shaping_stages)

    def tiles(name: str, images: dict[str, torch.Tensor], d: torch.nn.Module, title: str) -> None:
        logits = d(list(images.values())[-1]).detach().flatten()
        plots.tiles(outdir / f"{name}.png", images, logits, f"MNIST{title}; logits of the last row")

    wanted = {"generator": "standard", "refined": "refine, shaped"}
    early_late = {
        f"{k}: {label}": one.table.images(one.facts(k), name) for k in sorted({first, last}) for label, name in wanted.items()
    }
    tiles("early-late", early_late, one.shaped(last, best),
          ": the generator after so many iterations, and refined by its shaped D")  # fmt: skip
    layers = {"generator": one.table.images(one.facts(recipe.shown), "standard")}
    layers |= {f"at {layer}": one.small.images(one.layer(layer), "refine, shaped") for layer in recipe.layers}
    tiles("layers", layers, one.shaped(recipe.shown, best),
          f", iteration {recipe.shown}: the same samples refined at several layers")  # fmt: skip
    denoised = one.shown("denoising")
    order = ("real", "noisy", "denoised, unshaped", "denoised, shaped")
    tiles("denoising", {name: denoised[name] for name in order}, one.pairs[last][1],
          ": held-out images under faint generated ones, refined as images")  # fmt: skip

    mine = [row for row in rows if row["seed"] == run.seeds[0]]
    named = dict.fromkeys(row["name"] for row in mine if row["part"] == "table")
    curves = {
        n: {"x": recipe.checkpoints, "style": _style(n), **{k: pick(mine, k, part="table", name=n) for k in (DISTANCE, SCORE)}}
        for n in named
    }
    plots.curves(outdir / "checkpoints.png", (DISTANCE, SCORE), curves, "iterations of the GAN")
    curve = {key: pick(mine, key, part="shaping") for key in ("iterations", DISTANCE, SCORE)}
    lines = {f"checkpoint {recipe.shown}": curve | {"x": curve["iterations"]}}
    plots.curves(outdir / "shaping.png", (DISTANCE, SCORE), lines, "iterations of shaping")


def _style(name: str) -> dict[str, str]:
    """One colour for the two controls of a way, fixed steps dashed."""
    colours = {"standard": "black", "DRS": "C0", "MH": "C1", "refine, unshaped": "C2", "refine, shaped": "C3"}
    way = name.removesuffix(FIXED)
    return {"color": colours.get(way, "C4"), "linestyle": "-" if way == name else "--"}
