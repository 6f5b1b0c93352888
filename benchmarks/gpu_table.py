"""The results of benchmarks.gpu_bench as Markdown, with the goals beside them, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MET, MISSED = "met", "**missed**"
COLUMNS = (
    "workload", "at", "sampler", "precision", "driver", "stop", "slots", "images/s", "B0", "B1", "B2", "floor",
    "efficiency / bound", "mean steps", "syncs per step", "memory MB", "goals",
)  # fmt: skip
LEGEND = (
    "B0, B1, B2: how many times as fast as each baseline, median of rounds in one run; B0 in float32 (in tf32 rows with TF32), "
    "B1 and B2 in the row's precision. floor: FLOPs of the evaluations / the measured matrix-product peak, as a part of the "
    "time taken. stop none: all images take all steps; median: a logit that half of a pilot's images have after half of the "
    "steps; uniform: a random last step for each image."
)


def goals(row: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(name, measured, wanted, met) for each goal that the design sets for a row on a GPU."""
    found: list[tuple[str, float | None, float]] = []
    fixed, plain = row["stop"] == "none", row["sampler"] == "collaborative"
    if fixed and plain:
        found.append(("B0", row["ratio_b0"], 10.0 if row["precision"] in ("bfloat16", "float16") else 4.0))
        found.append(("B2", row["ratio_b2"], 1.1))
    elif plain:
        found.append(("B2", row["ratio_b2"], 2.0))
    if row.get("ideal_gain") is not None:
        found.append(("gain", row.get("gain"), 0.9 * row["ideal_gain"]))
    floors = {"sngan32": 0.45, "dcgan64": 0.35}
    if fixed and row["precision"] == "bfloat16" and row["workload"] in floors:
        found.append(("floor", row["floor_fraction"], floors[row["workload"]]))
    found.append(("slots", row["slot_efficiency"] / row["greedy_bound"], 0.98))
    judged = [(name, value, wanted, value >= wanted) for name, value, wanted in found if value is not None]
    syncs = row["host_syncs_per_step"]
    return judged if syncs is None else [*judged, ("syncs", syncs, 1 / 32, syncs <= 1 / 32)]


def table(results: dict[str, Any]) -> str:
    """One file's results as Markdown; what failed or was not run is listed under it."""
    machine = results["machine"]
    peaks = ", ".join(f"{name} {peak['flops_per_second'] / 1e12:.4g}" for name, peak in results["peaks"].items())
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, CUDA {machine['cuda']}, commit "
        f"{machine['commit'][:10]}{'+' * machine['commit'].endswith('+')}, {results['datetime'][:10]}: `{results['command']}`",
        "",
        f"Measured peak, TFLOP/s: {peaks}. {LEGEND}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_cells(row, not results.get("stand_in"))) + " |" for row in results["rows"]),
    ]
    reasons = [
        f"- {name} of {_label(row)}: {reason}" for row in results["rows"] for name, reason in row.get("missing", {}).items()
    ]
    reasons += [f"- {_label(row)}: failed: {row['error']}" for row in results["failed"]]
    reasons += [f"- {_label(row)}: not run: {row['reason']}" for row in results["not_run"]]
    if results.get("stand_in"):
        lines.insert(0, "**A stand-in on a CPU, to try the command: no figure here says anything.**\n")
    return "\n".join([*lines, *(["", "Missing:", *reasons] if reasons else [])]) + "\n"


def _label(row: dict[str, Any]) -> str:
    return " ".join(row[key] for key in ("workload", "at", "sampler", "precision", "driver", "stop"))


def _cells(row: dict[str, Any], judge: bool) -> list[str]:
    verdicts = [
        f"{name} {_number(value)} {'<=' if name == 'syncs' else '>='} {_number(wanted)}: {MET if met else MISSED}"
        for name, value, wanted, met in goals(row)
    ]
    return [
        *(row[key] for key in ("workload", "at", "sampler", "precision", "driver", "stop")), str(row["num_slots"]),
        _number(row["images_per_second"]), *(_ratio(row[f"ratio_{name}"]) for name in ("b0", "b1", "b2")),
        _number(row["floor_fraction"]), f"{row['slot_efficiency']:.3f} / {row['greedy_bound']:.3f}",
        f"{row['mean_steps']:.1f} of {row['K']}", _number(row["host_syncs_per_step"]), _number(row["peak_memory_mb"]),
        "; ".join(verdicts) if judge else "-",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def save(path: Path, results: dict[str, Any]) -> None:
    """The rows into ``path``, a list; what else is known of the run beside it, into <name>.run.json."""
    rest = {key: value for key, value in results.items() if key != "rows"}
    for target, content in ((path, results["rows"]), (path.with_suffix(".run.json"), rest)):
        part = target.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(target)


def load(path: Path) -> dict[str, Any]:
    """What ``save`` was given."""
    return {**json.loads(path.with_suffix(".run.json").read_text()), "rows": json.loads(path.read_text())}


def report(files: Sequence[Path], plot_to: Path | None) -> str:
    """Tables of several files one after another; with ``plot_to`` their ratios drawn into it."""
    results = [load(file) for file in files]
    if plot_to is not None:
        plot(results, plot_to)
    return "\n".join(table(each) for each in results)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Ratios to B0, B1 and B2 as bars, by workload and precision, one panel per stop."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for each in results for row in each["rows"] if row["sampler"] == "collaborative"]
    stops = [stop for stop in ("none", "median", "uniform") if any(row["stop"] == stop for row in rows)]
    figure, panels = plt.subplots(len(stops) or 1, 1, figsize=(9, 3.2 * (len(stops) or 1)), squeeze=False)
    for axis, stop in zip(panels[:, 0], stops, strict=False):
        shown = [row for row in rows if row["stop"] == stop]
        for place, name in enumerate(("b0", "b1", "b2")):
            bars = [(x + 0.27 * (place - 1), row[f"ratio_{name}"]) for x, row in enumerate(shown) if row[f"ratio_{name}"]]
            axis.bar([x for x, _ in bars], [height for _, height in bars], 0.25, label=name.upper())
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(shown)), [f"{row['workload']}\n{row['at']}\n{row['precision']}" for row in shown], fontsize=7)
        axis.set_ylabel("times as fast")
        axis.set_title({"none": "all steps for all", "median": "median stop", "uniform": "random last step"}[stop], fontsize=10)
        axis.legend(fontsize=8)
    figure.suptitle(", ".join(sorted({row["gpu"] for row in rows})), fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
