"""Pictures of the experiments: rows of images, densities of samples, figures of merit as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastrefine import pictures

BINS, SMOOTH = 160, 1.2  # of a density panel; standard deviation of its kernel in bins


def tiles(path: Path, rows: Mapping[str, Tensor], notes: Sequence[str] | Tensor, title: str) -> None:
    """A small PNG of images (N, 1 or 3, H, W), a row for each label; notes, e.g. logits, stand under the columns."""
    notes = [f"{float(v):.1f}" for v in notes] if isinstance(notes, Tensor) else notes
    pictures.comparison(path, [(label, pictures.levels(x)) for label, x in rows.items()], notes, title, side=48)
    drawn, grey = Image.open(path), all(x.shape[1] == 1 for x in rows.values())
    (drawn.convert("L") if grey else _palette(drawn, 128)).save(path, optimize=True)


def densities(path: Path, panels: Mapping[tuple[str, str], Tensor], limit: float) -> None:
    """A PNG of kernel density estimates: (row, column) -> samples (n, 2); axes go from -limit to limit."""
    from scipy.ndimage import gaussian_filter

    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    figure, axes = subplots(len(rows), len(columns), 1.5)
    for (i, row), (j, column) in ((a, b) for a in enumerate(rows) for b in enumerate(columns)):
        axes[i, j].set(xticks=[], yticks=[])
        if (row, column) in panels:
            x = panels[row, column].numpy()
            count, *_ = np.histogram2d(x[:, 1], x[:, 0], BINS, ((-limit, limit),) * 2)
            axes[i, j].imshow(np.sqrt(gaussian_filter(count, SMOOTH)), origin="lower", cmap="magma")
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=8, pad=3)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row, fontsize=8)
    figure.tight_layout(pad=0.3, h_pad=0.3, w_pad=0.3)
    figure.subplots_adjust(top=1 - 0.2 / figure.get_figheight())  # the layout leaves no room over images
    save(figure, path)


def points(axis: Any, x: Tensor, limit: float, title: str, colour: str = "black") -> None:
    """Samples (n, 2) into a panel without ticks; axes go from -limit to limit."""
    axis.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=0.8, linewidths=0, color=colour)
    axis.set(xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axis.set_title(title, fontsize=9, pad=3)


def curves(path: Path, panels: Sequence[str], lines: Mapping[str, Mapping[str, Any]], xlabel: str) -> None:
    """A PNG with a panel for each figure of merit.

    lines: name -> {"x": values, figure of merit: values, "sd": {figure of merit: values}, "style": matplotlib's keywords}.
    """
    figure, axes = subplots(1, len(panels), 3.3, 2.6)
    for axis, key in zip(axes[0], panels, strict=True):
        for name, line in lines.items():
            if key in line:
                style = {"marker": ".", "linewidth": 1.2, **line.get("style", {})}
                axis.errorbar(line["x"], line[key], yerr=line.get("sd", {}).get(key), label=name, **style)
        plain(axis, key, xlabel)
    axes[0, -1].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    save(figure, path)


def plain(axis: Any, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Small labels and a grid."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.3)


def subplots(rows: int, columns: int, width: float, height: float | None = None) -> tuple[Any, Any]:
    """A figure of (rows, columns) axes, each so many inches large."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, (height or width) * rows), squeeze=False)


def save(figure: Any, path: Path) -> None:
    """A figure as a PNG with a palette, which is several times smaller; closes the figure."""
    import matplotlib.pyplot as plt

    figure.canvas.draw()
    _palette(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())), 64).save(path, optimize=True)
    plt.close(figure)


def _palette(drawn: Image.Image, colours: int) -> Image.Image:
    return drawn.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
