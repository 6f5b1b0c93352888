"""Records of the benchmarks: reading and writing them, their rows as Markdown, and the goals that stand beside them.

A record is ``{"kind": KIND, "machine", "datetime", "command", "peaks", "rows", "failed", "not_run"}``. ``load`` reads what
pytest-benchmark wrote too, whose ``extra_info`` is such a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.compare import timed
from benchmarks.machine import RESULTS

KIND = "fastrefine speed"
MET, MISSED = "met", "**missed**"
COLUMNS = (
    "workload", "cut", "sampler", "precision", "driver", "stop", "slots", "images/s", "steps/s", "B0", "B1", "B2", "floor",
    "efficiency / bound", "mean steps", "syncs per step", "memory MB", "goals",
)  # fmt: skip
LEGEND = (
    "B0, B1, B2: how many times as fast as each baseline, median over rounds of one run; B0 in float32 (in tf32 rows with "
    "TF32) with all steps, B1 and B2 in the row's precision with its stop. floor: FLOPs of the evaluations / the measured "
    "matrix-product peak, as a part of the time taken. gain: of stopping, over all steps for all. stop none: all images take "
    "all steps; median: a logit that half of a pilot's images have after half of the steps; uniform: a random last step for "
    "each image."
)


def load(path: Path) -> dict[str, Any]:
    """A record; one by pytest-benchmark in the same form."""
    found = json.loads(path.read_text())
    if found.get("kind") == KIND:
        return found
    if "benchmarks" not in found:
        raise ValueError(f"{path}: wanted a record of kind {KIND!r} or a file of pytest-benchmark, found {sorted(found)[:6]}")
    machine, commit = found["machine_info"], found["commit_info"]
    own = {
        "device": machine.get("cpu_model") or machine["cpu"]["brand_raw"], "kind": "cpu", "threads": machine["threads"],
        "matrix_units": machine["matrix_units"], "commit": commit["id"] + "+" * bool(commit.get("dirty")),
        "torch": machine["torch"],
    }  # fmt: skip
    rows = [entry["extra_info"] for entry in found["benchmarks"]]
    rows = [{"missing": {"b2": row["b2_missing"]} if row.get("b2_missing") else {}, **row} for row in rows]
    return {
        "kind": KIND, "machine": own, "datetime": found["datetime"], "rows": rows, "peaks": {}, "failed": [], "not_run": [],
        "command": ", ".join(sorted({row["command"] for row in rows})),
    }  # fmt: skip


def as_pytest_benchmark(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the form of pytest-benchmark, which ``load`` reads and ``pytest-benchmark compare`` compares."""
    machine = record["machine"]
    info = {**machine, "cpu_model": machine["device"], "matrix_units": machine.get("matrix_units")}
    found = []
    for row in record["rows"]:
        name = f"bench_refine[{label(row).replace(' ', '-')}]"
        more = {**row, "command": record["command"]}
        found.append(timed(name, f"benchmarks/bench_refine.py::{name}", row["seconds"], more))
    return {
        "machine_info": info, "commit_info": {"id": machine["commit"]}, "benchmarks": found, "datetime": record["datetime"],
        "version": "5.0.0",
    }  # fmt: skip


def committed(folder: Path = RESULTS) -> list[Path]:
    """The records of speed in a folder of results, those of CPUs first."""
    return sorted(folder.glob("cpu-*.json")) + sorted(folder.glob("*/speed.json"))


def goals(row: dict[str, Any], machine: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(name, measured, wanted, met) for each goal that the design sets for a row on this kind of machine."""
    on_gpu, fixed = machine["kind"] == "cuda", row["stop"] == "none"
    half = row["precision"] in ("bfloat16", "float16")
    found: list[tuple[str, float | None, float]] = []
    if row.get("sampler", "collaborative") == "collaborative":
        if fixed:
            amx = "amx_bf16" in machine.get("matrix_units", ())
            of_b0 = (10.0 if half else 4.0) if on_gpu else (4.0 if amx else 3.3) if half else 1.8
            found.append(("B0", row.get("ratio_b0"), of_b0))
        found.append(("B2", row.get("ratio_b2"), 2.0 if not fixed else 1.1 if on_gpu else 1.0))
    if row.get("ideal_gain") is not None:
        found.append(("gain", row.get("gain"), 0.9 * row["ideal_gain"]))
    floors = {"sngan32": 0.45, "dcgan64": 0.35} if on_gpu else {"sngan32": 0.7, "dcgan64": 0.7}
    if fixed and row["workload"] in floors and row["precision"] == ("bfloat16" if on_gpu else "float32"):
        found.append(("floor", row.get("floor_fraction"), floors[row["workload"]]))
    found.append(("slots", row["slot_efficiency"] / row["greedy_bound"], 0.98))
    found.append(("replays", row.get("ratio_graph"), 1.05))  # what keeps the device loop
    judged = [(name, value, wanted, value >= wanted) for name, value, wanted in found if value is not None]
    syncs = row.get("host_syncs_per_step") if on_gpu else None
    return judged if syncs is None else [*judged, ("syncs", syncs, 1 / 32, syncs <= 1 / 32)]


def worst(record: dict[str, Any]) -> dict[str, Any] | None:
    """The row that is furthest below one of its goals of speed, or closest above."""

    def margin(row: dict[str, Any]) -> float:
        speeds = [value / wanted for name, value, wanted, _ in goals(row, record["machine"]) if name not in ("slots", "syncs")]
        return min(speeds, default=float("inf"))

    return min(record["rows"], key=margin, default=None)


def table(record: dict[str, Any]) -> str:
    """One record as Markdown; what failed or was not run is listed under it."""
    machine = record["machine"]
    versions = "".join(f", {name} {machine[name]}" for name in ("triton", "cuda", "driver") if machine.get(name))
    units = f" ({', '.join(machine['matrix_units'])})" if machine["kind"] == "cpu" and machine.get("matrix_units") else ""
    commit = machine["commit"][:10] + " with uncommitted changes" * machine["commit"].endswith("+")
    peaks = ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in record["peaks"].items())
    lines = [
        f"{machine['device']}{units}, threads: {machine['threads']}, torch {machine['torch']}{versions}, commit {commit}, "
        f"{record['datetime'][:10]}: `{record['command']}`",
        "",
        f"Measured peak, TFLOP/s: {peaks}. {LEGEND}" if peaks else LEGEND,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_cells(row, machine, not record.get("tiny"))) + " |" for row in record["rows"]),
    ]
    if record.get("tiny"):
        lines.insert(0, "**A stand-in of tiny runs, to try the command: no figure here says anything.**\n")
    absent: dict[str, list[str]] = {}
    for row in record["rows"]:
        for name, why in row.get("missing", {}).items():
            absent.setdefault(f"{name}: {why}", []).append(label(row))
    reasons = [f"- {why}: {'all rows' if len(of) == len(record['rows']) else '; '.join(of)}" for why, of in absent.items()]
    reasons += [f"- {label(row)}: failed: {row['error']}" for row in record["failed"]]
    reasons += [f"- {label(row)}: not run: {row['reason']}" for row in record["not_run"]]
    return "\n".join([*lines, *(["", "Missing:", *reasons] if reasons else [])]) + "\n"


def label(row: dict[str, Any]) -> str:
    """A row in words."""
    return row.get("label") or " ".join(str(row[key]) for key in ("workload", "cut", "precision", "stop"))


def summary(row: dict[str, Any], machine: dict[str, Any]) -> str:
    """A row in one line, for who watches."""
    names = ("b0", "b1", "b2", "graph")
    ratios = ", ".join(f"{n} {row[f'ratio_{n}']:.2f}x" for n in names if row.get(f"ratio_{n}") is not None)
    missed = ", ".join(name for name, *_, met in goals(row, machine) if not met)
    return (
        f"{row['images_per_second']:.4g} images/s, floor {row['floor_fraction']:.2f}, {ratios}"
        f"{f'; below its goal: {missed}' if missed else ''}; {row['row_seconds']:.0f} s"
    )


def _cells(row: dict[str, Any], machine: dict[str, Any], judge: bool) -> Iterable[str]:
    verdicts = [
        f"{name} {_number(value)} {'<=' if name == 'syncs' else '>='} {_number(wanted)}: {MET if met else MISSED}"
        for name, value, wanted, met in goals(row, machine)
    ]
    return [
        row["workload"], row["cut"], row.get("sampler", "collaborative"), row["precision"], row.get("driver", "host"),
        row["stop"], str(row["num_slots"]), _number(row.get("images_per_second")), _number(row.get("refine_steps_per_second")),
        *(_ratio(row.get(f"ratio_{name}")) for name in ("b0", "b1", "b2")), _number(row.get("floor_fraction")),
        f"{row['slot_efficiency']:.3f} / {row['greedy_bound']:.3f}", f"{row['mean_steps']:.1f} of {row['K']}",
        _number(row.get("host_syncs_per_step")), _number(row.get("peak_memory_mb")), "; ".join(verdicts) if judge else "-",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
