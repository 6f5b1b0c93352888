"""Pictures of the experiment on 25 Gaussians: samples of every sampler, and how their chains approach the law."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 3000
Curves = Mapping[str, Mapping[int, Mapping[str, float]]]  # sampler -> K -> high_quality, mean_energy


def samples(path: Path, panels: Mapping[str, np.ndarray]) -> None:
    """Small multiples, one for each name -> samples (n, 2); the first 3,000 of each are drawn."""
    plt = _pyplot()
    columns = min(5, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(2.3 * columns, 2.5 * -(-len(panels) // columns)))
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, (name, x) in zip(np.ravel(axes), panels.items(), strict=False):
        axis.scatter(x[:SHOWN, 0], x[:SHOWN, 1], s=0.4, linewidths=0, color="black")
        axis.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal")
        axis.set_title(name, fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def mixing(path: Path, titles: Mapping[str, str], curves: Mapping[str, Curves], laws: Mapping[str, Mapping[str, Any]]) -> None:
    """High quality and mean energy against K: a row for each law, its chains drawn, the law itself dashed."""
    plt = _pyplot()
    figure, axes = plt.subplots(len(titles), 2, figsize=(9, 2.9 * len(titles)), squeeze=False)
    for row, (key, title) in zip(axes, titles.items(), strict=True):
        for axis, quantity, label in zip(row, ("high_quality", "mean_energy"), ("high quality", "mean energy"), strict=True):
            for name, curve in curves[key].items():
                steps = sorted(curve)
                axis.plot(steps, [curve[k][quantity] for k in steps], marker=".", linewidth=1, markersize=4, label=name)
            axis.axhline(laws[key][quantity], color="black", linestyle="--", linewidth=1, label="the law")
            axis.set_xscale("symlog", linthresh=10)
            axis.set(xlabel="K", ylabel=label)
            axis.set_title(title, fontsize=9)
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=75)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
