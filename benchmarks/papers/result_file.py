"""The file an experiment leaves: its rows, what they claim, and on what they were measured."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastrefine as fr
from benchmarks.machine import commit, cpu_flags

Row = dict[str, Any]
FALSE_ALARM = 0.05  # of a claim that seeds decide, at most


def write(outdir: Path, experiment: str, *, cores: int = 1, **content: Any) -> dict[str, Any]:
    """Writes ``outdir``/result.json: ``content`` (rows, seeds, recipe, reduced, claims, ...), commit, hardware, versions.

    A line for each row and claim; floats to six significant digits, None where they are not finite.
    """
    record = plain({
        "experiment": experiment,
        **content,
        "commit": commit(),
        "hardware": {"cpu": cpu_flags()[0], "cores": cores},
        "versions": {"fastrefine": fr.__version__, "torch": torch.__version__, "python": platform.python_version()},
    })  # fmt: skip
    outdir.mkdir(parents=True, exist_ok=True)
    part = outdir / "result.json.part"
    part.write_text(_text(record))
    part.replace(outdir / "result.json")
    return record


def claim(text: str, holds: bool, **figures: Any) -> Row:
    """A claim with the figures that decide it."""
    return {"claim": text, "holds": bool(holds), **figures}


def by_seeds(text: str, wins: Sequence[bool], **figures: Any) -> Row:
    """A claim that a paired sign test decides, with the figures of each seed. wins: of each seed, whether it holds there.

    It holds where it is true in so many of the seeds that chance, at one half for each, reaches that in FALSE_ALARM of all
    cases at most: in 9 of 10, in 5 of 5. Fewer than five seeds cannot reach it; then all of them are needed. "false_alarm" is
    the share of the cases in which chance reaches what is needed.
    """
    n = len(wins)
    chances = [sum(math.comb(n, j) for j in range(k, n + 1)) / 2**n for k in range(n + 1)]  # of at least k
    needed = next((k for k in range(n + 1) if chances[k] <= FALSE_ALARM), n)
    found = {"seeds_won": f"{sum(wins)} of {n}", "needed": needed, "false_alarm": chances[needed]}
    return claim(text, sum(wins) >= needed, **found, **figures)


def against(
    case: str, metric: str, published: float | None, values: Sequence[float], better: str, *, headline: bool = False
) -> Row:
    """A published figure beside ours: mean and standard deviation over seeds, and ours minus the published one.

    better: "higher" | "lower" | "near". published: None where no paper has the figure. headline: goes into the summary. Without
    values, of rows that were not run, "seeds" is 0: the record leaves it out.
    """
    mean, sd = spread(values)
    row = {"case": case, "metric": metric, "published": published, "ours": mean, "sd": sd, "seeds": len(values)}
    return {**row, "difference": None if published is None else mean - published, "better": better, "headline": headline}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation), the latter None of one value; the mean of none is no number."""
    finite = all(math.isfinite(v) for v in values)
    return (statistics.fmean(values) if values else math.nan), statistics.stdev(values) if finite and len(values) > 1 else None


def pick(rows: Iterable[Row], key: str, **where: Any) -> list[float]:
    """Values of a column in the rows that match, in their order; None counts as infinite."""
    found = [row[key] for row in rows if all(row.get(name) == value for name, value in where.items())]
    return [math.inf if value is None else float(value) for value in found]


def mean(rows: Iterable[Row], key: str, **where: Any) -> float:
    """Mean of a column over the rows that match."""
    return statistics.fmean(pick(rows, key, **where))


def plain(value: Any) -> Any:
    """``value`` for JSON: floats to six significant digits, None for those that it does not know, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _text(record: Mapping[str, Any]) -> str:
    parts = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            found = "[\n  " + ",\n  ".join(json.dumps(v) for v in value) + "\n ]"
        elif isinstance(value, dict):
            found = "{\n  " + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        else:
            found = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {found}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
