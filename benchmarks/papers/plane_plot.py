"""Pictures of the experiments in the plane: densities of samples, and figures over the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

BINS, SMOOTH = 160, 1.2  # of a density panel; standard deviation of its kernel in bins


def densities(path: Path, panels: Mapping[tuple[str, str], Tensor], limit: float) -> None:
    """A PNG of kernel density estimates: (row, column) -> samples (n, 2); axes go from -limit to limit."""
    from scipy.ndimage import gaussian_filter

    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    figure, axes = subplots(len(rows), len(columns), 1.5)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axis = axes[i, j]
            axis.set(xticks=[], yticks=[])
            if (row, column) in panels:
                x = panels[row, column].numpy()
                count, *_ = np.histogram2d(x[:, 1], x[:, 0], BINS, ((-limit, limit),) * 2)
                axis.imshow(np.sqrt(gaussian_filter(count, SMOOTH)), origin="lower", cmap="magma")
            if i == 0:
                axis.set_title(column, fontsize=8, pad=3)
            if j == 0:
                axis.set_ylabel(row, fontsize=8)
    figure.tight_layout(pad=0.3, h_pad=0.3, w_pad=0.3)
    figure.subplots_adjust(top=1 - 0.2 / figure.get_figheight())  # the layout leaves no room over images
    save(figure, path)


def curves(path: Path, panels: Sequence[str], lines: Mapping[str, Mapping[str, Any]], xlabel: str) -> None:
    """A PNG with a panel for each figure of merit.

    lines: name -> {"x": values, figure of merit: values, "sd": {figure of merit: values}, "style": matplotlib's keywords}.
    """
    figure, axes = subplots(1, len(panels), 3.3, 2.6)
    for axis, key in zip(axes[0], panels, strict=True):
        for name, line in lines.items():
            if key not in line:
                continue
            style = {"marker": ".", "linewidth": 1.2, **line.get("style", {})}
            axis.errorbar(line["x"], line[key], yerr=line.get("sd", {}).get(key), label=name, **style)
        axis.set_title(key, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    save(figure, path)


def subplots(rows: int, columns: int, width: float, height: float | None = None) -> tuple[Any, Any]:
    """A figure of (rows, columns) axes, each so many inches large."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, (height or width) * rows), squeeze=False)


def save(figure: Any, path: Path, colours: int = 64) -> None:
    """A figure as a PNG with a palette, which is several times smaller; closes the figure."""
    import matplotlib.pyplot as plt

    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    plt.close(figure)
