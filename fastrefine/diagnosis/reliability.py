"""The reliability diagram of a diagnosis or a calibration, drawn with matplotlib (the extra "plot")."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrefine.diagnosis.calibration import Calibration, Diagnosis
from fastrefine.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, BLUE, ORANGE = "0.6", "#1f77b4", "#d95f02"


def reliability_plot(found: Diagnosis | Calibration, path: str | Path | None = None, ax: Axes | None = None) -> Figure:
    """Share of real images against mean s(d) in each bin; below it a histogram of s(d) ([MHGAN] Fig. 3, Guo et al. 2017).

    found: a diagnosis, or a calibration, whose "before" and "after" are drawn. The bars are standard deviations of the
    shares. path: the figure is written there, in the format of its suffix. ax: draw on these axes instead of a new figure.
    Raises InputError for anything else, and without matplotlib.

    Example: ``fr.reliability_plot(fr.diagnose(real_logits, out), "reliability.png")``
    """
    if isinstance(found, Calibration):
        shown = {"before": (found.before, GREY), f"after {found.method}": (found.after, BLUE)}
    elif isinstance(found, Diagnosis):
        shown = {"": (found, BLUE)}
    else:
        raise InputError(f"reliability_plot draws a Diagnosis or a Calibration, got {type(found).__name__}")
    try:
        from matplotlib.figure import Figure
        from mpl_toolkits.axes_grid1 import make_axes_locatable  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("reliability_plot needs matplotlib: pip install fastrefine[plot]") from None
    figure: Any = Figure(figsize=(4.8, 6), dpi=150) if ax is None else ax.figure
    if ax is None:
        ax = figure.add_subplot()
    ax.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    for name, (diagnosis, color) in shown.items():
        _curve(ax, diagnosis, color, name)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", ylabel="share of real images")
    ax.tick_params(labelbottom=False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, frameon=False, fontsize="small")  # above the dots
    below = make_axes_locatable(ax).append_axes("bottom", size="25%", pad=0.1, sharex=ax)
    _histogram(below, *list(shown.values())[-1])
    below.set(xlabel="predicted probability of being real")
    if path is not None:
        figure.savefig(path, bbox_inches="tight")
    return figure


def _curve(ax: Axes, diagnosis: Diagnosis, color: str, name: str) -> None:
    """Dots whose area grows with the share of the images in their bin."""
    x, y, count = diagnosis.bin_predicted, diagnosis.bin_share, diagnosis.bin_real + diagnosis.bin_fake
    near = (y * count + 1) / (count + 2)  # so that a share of 0 or 1 among few images has a deviation too
    spread = np.where(count > 0, np.sqrt(near * (1 - near) / (count + 2)), np.nan)
    text = f"ECE {diagnosis.ece:.3f}, Z {diagnosis.z:.1f}, Brier {diagnosis.brier:.3f}"
    text = f"{name}: {text}" if name else text
    ax.errorbar(x, y, spread, color=color, linewidth=1, elinewidth=0.8, capsize=2, alpha=0.6)
    ax.scatter(x, y, 4 + 120 * count / count.sum(), color=color, label=text, clip_on=False, zorder=3)


def _histogram(ax: Axes, diagnosis: Diagnosis, color: str) -> None:
    edges = np.linspace(0, 1, len(diagnosis.bin_real) + 1)
    generated, real = (count / count.sum() for count in (diagnosis.bin_fake, diagnosis.bin_real))
    ax.stairs(generated, edges, color=ORANGE, fill=True, alpha=0.5, label="generated")
    ax.stairs(real, edges, color=color, label="real")
    ax.set(ylim=(0, None), ylabel="images")
    ax.legend(frameon=False, fontsize="x-small")
