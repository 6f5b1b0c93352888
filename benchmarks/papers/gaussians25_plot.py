"""Pictures of the experiment on 25 Gaussians: samples of every sampler, and how their chains approach the law."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 3000
Curves = Mapping[str, Mapping[int, Mapping[str, float]]]  # sampler -> K -> what is drawn


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
    """Against K: high quality and mean energy, the law's dashed, and how far the mode shares are from the law's (0).

    A row for each law and its chains.
    """
    plt = _pyplot()
    panels = {
        "high_quality": "high quality",
        "mean_energy": "mean energy",
        "share_distance": "largest distance of a mode's share",
    }
    figure, axes = plt.subplots(len(titles), len(panels), figsize=(12, 3.2 * len(titles)), squeeze=False)
    for row, (key, title) in zip(axes, titles.items(), strict=True):
        for axis, (quantity, label) in zip(row, panels.items(), strict=True):
            for name, curve in curves[key].items():
                steps = sorted(curve)
                axis.plot(steps, [curve[k][quantity] for k in steps], marker=".", linewidth=1, markersize=4, label=name)
            axis.axhline(laws[key].get(quantity, 0.0), color="black", linestyle="--", linewidth=1, label="the law")
            axis.set_xscale("symlog", linthresh=10)
            axis.set(xlabel="K", ylabel=label)
            shown: list[int] = []
            for k in sorted({k for curve in curves[key].values() for k in curve}):
                if not shown or k > 1.6 * shown[-1]:  # nearer ones would be printed over each other
                    shown.append(k)
            axis.set_xticks(shown, [str(k) for k in shown], fontsize=7)
            axis.minorticks_off()
            axis.set_title(title, fontsize=9)
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=75)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
