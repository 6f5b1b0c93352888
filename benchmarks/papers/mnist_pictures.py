"""The pictures of the MNIST experiment: [CS] Figures 10 and 11, [CS0] Figures 6, 7 and 9, and the table as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from benchmarks.papers import plane_plot
from benchmarks.papers.image_rows import Row
from benchmarks.papers.mnist_rows import FIXED, Mnist
from benchmarks.papers.result_file import pick
from fastrefine.demo import picture

FIGURES = ("frechet_distance", "classifier_score")


def draw(outdir: Path, run: Mnist, rows: Sequence[Row]) -> None:
    """All of them, as PNG; rows: of the run's own seed."""
    recipe = run.recipe
    early_late, best = [], max(recipe.shaping_stages)
    for checkpoint in sorted({recipe.checkpoints[0], recipe.checkpoints[-1]}):
        for label, name in (("generator", "standard"), ("refined", "refine, shaped")):
            early_late.append((f"{checkpoint}: {label}", run.table.images(run.facts(checkpoint), name)))
    _tiles(outdir / "early-late.png", early_late, run.shaped(recipe.checkpoints[-1], best),
           "MNIST: the generator after so many iterations, and refined by its shaped D; logits of the last row")  # fmt: skip

    layers = [("generator", run.table.images(run.facts(recipe.shown), "standard"))]
    layers += [(f"at {layer}", run.shown("layers", layer)) for layer in recipe.layers]
    _tiles(outdir / "layers.png", layers, run.shaped(recipe.shown, best),
           f"MNIST, iteration {recipe.shown}: the same samples refined at several layers; logits of the last row")  # fmt: skip

    denoised = list(run.denoised().items())
    order = ("real", "noisy", "denoised, unshaped", "denoised, shaped")
    denoised.sort(key=lambda one: order.index(one[0]))
    _tiles(outdir / "denoising.png", denoised, run.pairs[recipe.checkpoints[-1]][1],
           "MNIST: held-out images under faint generated ones, refined as images; logits of the last row")  # fmt: skip

    named = dict.fromkeys(row["name"] for row in rows if row["part"] == "table")
    curves = {
        name: {"x": recipe.checkpoints, "style": _style(name), **_figures(rows, part="table", name=name)} for name in named
    }
    plane_plot.curves(outdir / "checkpoints.png", FIGURES, curves, "iterations of the GAN")
    curve = {"x": pick(rows, "iterations", part="shaping"), **_figures(rows, part="shaping")}
    plane_plot.curves(outdir / "shaping.png", FIGURES, {f"checkpoint {recipe.shown}": curve}, "iterations of shaping")


def _figures(rows: Sequence[Row], **where: str) -> dict[str, list[float]]:
    return {key: pick(rows, key, **where) for key in FIGURES}


def _style(name: str) -> dict[str, str]:
    """One colour for the two controls of a way, fixed steps dashed."""
    colours = {"standard": "black", "DRS": "C0", "MH": "C1", "refine, unshaped": "C2", "refine, shaped": "C3"}
    plain = name.removesuffix(FIXED)
    return {"color": colours.get(plain, "C4"), "linestyle": "-" if plain == name else "--"}


def _tiles(path: Path, rows: Sequence[tuple[str, Tensor]], discriminator: nn.Module, title: str) -> None:
    logits = discriminator(rows[-1][1]).detach().flatten()
    notes = [f"{value:.1f}" for value in logits]
    picture.comparison(path, [(label, picture.pixels(images)) for label, images in rows], notes, title, side=48)
    Image.open(path).convert("L").save(path, optimize=True)
