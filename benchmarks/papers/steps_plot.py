"""The trade-off of `steps`: quality against mean steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers import plane_plot
from benchmarks.papers.cases import CONTROLS, Quality, curve

COLOURS = {"fixed": "C1", "backtracking": "C0"}
STYLES = {  # by rule: marker, line
    "K steps": ("o", "-"), "hazard": ("x", ":"), "median stop": ("*", ""), "reference sample": ("D", ""),
}  # fmt: skip


def draw(path: Path, rows: Sequence[Mapping[str, Any]], qualities: Mapping[str, Sequence[Quality]]) -> None:
    """A PNG from rows, a result.json's too: a column of panels for each set, one for each of its figures of merit."""
    height = max(len(of) for of in qualities.values())
    figure, axes = plane_plot.subplots(height, len(qualities), 2.9, 2.6)
    for column, (name, of) in enumerate(qualities.items()):
        for axis, q in zip(axes[:, column], of, strict=True):
            _panel(axis, [row for row in rows if row["set"] == name and row.get(q.key) is not None], q)
        axes[0, column].set_title(name.replace(", ", "\n"), fontsize=9, fontweight="bold")
        axes[-1, column].set_xlabel("mean steps", fontsize=8)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=len(qualities), fontsize=8, frameon=False)
    lines = 2 * len(STYLES) / len(qualities)  # of the legend
    figure.tight_layout(pad=0.5, rect=(0, 0.05 * lines, 1, 1))
    plane_plot.save(figure, path)


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], q: Quality) -> None:
    for control in CONTROLS:
        for rule, (marker, line) in STYLES.items():
            where = {"control": control, "rule": rule}
            x, y = (list(curve(rows, "parameter", key, **where).values()) for key in ("mean_steps", q.key))
            size = 11 if marker == "*" else 4.5
            axis.plot(
                x, y, label=f"{rule}, {control}", color=COLOURS[control], marker=marker, linestyle=line, markersize=size,
                linewidth=1.3, markeredgecolor="0.2" if not line else None, markeredgewidth=0.6 if not line else 1.2,
            )  # fmt: skip
    axis.set_ylabel(f"{q.label}, {q.better} is better", fontsize=8)
    if q.relative:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.3g}")
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_formatter("{x:.3g}" if high < 10 * low else "")
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.3)
