"""The table of results: ``python -m benchmarks.table [results.json ...] [--run] [--quick]`` prints Markdown.

Without files it reads benchmarks/results/cpu-*.json. With --run it first runs ``pytest benchmarks`` and writes
benchmarks/results/cpu-<model>.json, the raw pytest-benchmark JSON with machine, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import cpu_model

HERE = Path(__file__).parent
RESULTS = HERE / "results"

COLUMNS = (
    "workload", "cut", "precision", "stop", "images/s", "steps/s", "mean steps", "efficiency / bound", "B0", "B1", "B2",
    "goals",
)  # fmt: skip
MET, MISSED = "met", "**missed**"


def goals(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, measured, wanted at least) of a row's extra_info: the CPU column of the design's table."""
    found: list[tuple[str, float | None, float]] = []
    if row["stop"] == "none":
        found.append(("B0", row.get("ratio_b0"), 1.8 if row["precision"] == "float32" else 4.0))
        found.append(("B2", row.get("ratio_b2"), 0.95))
    else:
        found.append(("B2", row.get("ratio_b2"), 2.0))
        if "ideal_gain" in row:
            found.append(("gain", row.get("gain"), 0.9 * row["ideal_gain"]))
    found.append(("slots", row["slot_efficiency"] / row["greedy_bound"], 0.98))
    return [(name, value, wanted) for name, value, wanted in found if value is not None]


def table(results: dict[str, Any]) -> str:
    """One machine's raw pytest-benchmark JSON as Markdown."""
    machine, commit = results["machine_info"], results["commit_info"]
    rows = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    commands = sorted({row["command"] for row in rows})
    dirty = " with uncommitted changes" if commit.get("dirty") else ""
    lines = [
        f"{machine['cpu_model']} ({', '.join(machine['matrix_units'])}), "
        f"threads: {machine['threads']}, torch {machine['torch']}, "
        f"commit {commit['id'][:10]}{dirty}, {results['datetime'][:10]}: `{'`, `'.join(commands)}`",
        "",
        "B0, B1, B2: how many times as fast as each baseline, from CPU times of the same rounds. gain: of stopping, over K "
        "steps for all.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    verdicts = [
        f"{name} {value:.2f} >= {wanted:.2f}: {MET if value >= wanted else MISSED}" for name, value, wanted in goals(row)
    ]
    return [
        row["workload"], row["cut"], row["precision"], row["stop"], _number(row.get("images_per_second")),
        _number(row.get("refine_steps_per_second")), f"{row['mean_steps']:.1f} of {row['K']}",
        f"{row['slot_efficiency']:.3f} / {row['greedy_bound']:.3f}",
        *(_ratio(row, name) for name in ("ratio_b0", "ratio_b1", "ratio_b2")), "; ".join(verdicts),
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ratio(row: dict[str, Any], name: str) -> str:
    if name in row:
        return f"{row[name]:.2f}x"
    missing = row.get("b2_missing") if name == "ratio_b2" else None
    return f"- ({missing})" if missing else "-"


def run(quick: bool) -> Path:
    """Run the benchmarks; the file of raw results."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"cpu-{re.sub('[^a-z0-9]+', '-', cpu_model().lower()).strip('-')}.json"
    command = [sys.executable, "-m", "pytest", str(HERE), f"--benchmark-json={target}"] + ["--quick"] * quick
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=HERE.parent)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="raw pytest-benchmark JSON (default: results/cpu-*.json)")
    parser.add_argument("--run", action="store_true", help="run the benchmarks first")
    parser.add_argument("--quick", action="store_true", help="with --run: smaller batches, fewer images, no torch.compile")
    given = parser.parse_args()
    files = given.results + ([run(given.quick)] if given.run else [])
    for file in files or sorted(RESULTS.glob("cpu-*.json")):
        print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
