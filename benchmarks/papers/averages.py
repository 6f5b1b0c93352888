"""The rows of an experiment as one table: means and standard deviations over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.papers.result_file import spread

Row = dict[str, Any]
ROWS, FIGURES = 40, 10  # of a table at most
NONE = "–"


def number(value: Any, digits: int = 4) -> str:
    """A figure as text; a dash for one that is missing or no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def mean_sd(mean: Any, sd: Any) -> str:
    """mean ± sd, or the mean alone."""
    return number(mean) + (f" ± {number(sd, 2)}" if NONE not in (number(sd), number(mean)) else "")


def tables(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]], list[str]]]:
    """A table for each value of the column "set"; one where there is none."""
    return [table([row for row in rows if row.get("set") == name]) for name in dict.fromkeys(row.get("set") for row in rows)]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, notes) of rows.

    What tells rows apart are their columns of text, the checkpoint, and of the other columns, in their order, as many as
    rows of one seed need to differ. Rows that differ in columns ``*seed`` alone are averaged; a cell has a dash unless all of
    them have the figure, and no deviation where it is the same in all. Notes say what is the same everywhere, and what is
    left out.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.endswith("seed")))
    columns = [c for c in columns if not any(isinstance(row.get(c), list | dict) for row in rows)]
    same = [c for c in columns if len(rows) > 1 and len({row.get(c) for row in rows}) == 1]
    columns = [c for c in columns if c not in same]
    keys = _keys(rows, columns)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(c) for c in keys), []).append(row)
    figures = [c for c in columns if c not in keys]
    header = keys + figures[:FIGURES]
    cells = [
        [*map(label, key), *(_average([row.get(c) for row in group]) for c in header[len(keys) :])]
        for key, group in groups.items()
    ]
    notes = []
    if any(len(group) > 1 for group in groups.values()):
        notes.append("Mean ± standard deviation over seeds.")
    if said := [f"{c} {label(rows[0].get(c))}" for c in same if rows[0].get(c) is not None]:
        notes.insert(0, f"In all rows: {', '.join(said)}.")
    if left := figures[FIGURES:]:
        notes.append(f"Further columns in result.json: {', '.join(left)}.")
    if len(cells) > ROWS:
        notes.append(f"{len(cells) - ROWS} more rows in result.json.")
    return header, cells[:ROWS], notes


def label(value: Any) -> str:
    """Any value of a result.json as short text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(label, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} ({label(v)})" if isinstance(v, dict) else f"{k} {label(v)}" for k, v in value.items())
    return value if isinstance(value, str) else number(value)


def _keys(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """The columns that tell rows apart, in their order."""
    seeds = list(dict.fromkeys(k for row in rows for k, v in row.items() if k.endswith("seed") and not isinstance(v, list)))
    text = [c for c in columns if c == "checkpoint" or any(isinstance(row.get(c), str) for row in rows)]
    others = [c for c in columns if c not in text]
    for count in range(len(others) + 1):
        keys = text + others[:count]
        if len({tuple(row.get(c) for c in seeds + keys) for row in rows}) == len(rows):
            return [c for c in columns if c in keys]
    return text


def _average(values: Sequence[Any]) -> str:
    if len(set(values)) == 1:
        return label(values[0])
    if any(not isinstance(v, int | float) for v in values):
        return NONE
    return mean_sd(*spread([float(v) for v in values]))
