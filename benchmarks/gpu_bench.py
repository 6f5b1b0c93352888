"""The speed table on a GPU: ``python -m benchmarks.gpu_bench`` (``make gpu-bench``); README.md beside this says what is in it.

python -m benchmarks.gpu_bench                          the default rows, most important first, within 440 seconds
python -m benchmarks.gpu_bench --dry-run                what would run; no GPU
python -m benchmarks.gpu_bench --device cpu --workloads mlp2d --precisions float32 --output /tmp/x.json
python -m benchmarks.gpu_bench --commit SHA --output FOLDER/NAME.json     no .git here, results elsewhere
python -m benchmarks.gpu_bench --table FILE... [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import functools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_rows, gpu_table
from benchmarks.gpu_machine import DTYPES, ROOT, copy_bandwidth, device_name, facts, slug, synchronize
from benchmarks.gpu_measure import measure
from benchmarks.gpu_rows import Budget, Row
from benchmarks.gpu_sides import Bench, Scale
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
BUILD = ROOT / "build"  # what is no result goes where git does not look
HANG_SECONDS = 540


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(option: str, default: Sequence[str], known: Sequence[str], help: str) -> None:
        parser.add_argument(option, nargs="+", default=list(default), choices=list(known), help=f"{help} (default: {default})")

    names("--workloads", gpu_rows.DEFAULT_WORKLOADS, list(WORKLOADS), "networks")
    names("--cuts", ("first",), ("input", "first", "middle", "output"), "what is refined")
    names("--precisions", gpu_rows.DEFAULT_PRECISIONS, list(DTYPES), "precisions")
    names("--drivers", (), ("host", "graph", "loop", "auto"), "ours; by default graph, on a CPU host")
    names("--stops", gpu_rows.STOPS[:2], gpu_rows.STOPS, "all steps; a threshold reached half way; a random last step")
    names("--samplers", ("collaborative",), gpu_rows.SAMPLERS, "update rules; the baselines are written for the first")
    parser.add_argument("--num-slots", type=int, help="ours (default: the best of a few)")
    parser.add_argument("--samples", type=int, help="images of a timed run of ours (default: by the rate)")
    parser.add_argument("--steps", type=int, help=f"steps per image (default {gpu_rows.K}; on a CPU 4)")
    parser.add_argument("--repetitions", type=int, help="rounds (default 3)")
    budget = (
        "seconds for everything: peaks, choosing sizes, compiling B2, rows (default 440, imports apart; a hang ends at 540)"
    )
    parser.add_argument("--budget", type=float, default=440, help=budget)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu: a stand-in that tries the command")
    parser.add_argument("--no-b2", action="store_true", help="without torch.compile; always so on a CPU")
    parser.add_argument("--compile", action="store_true", help="ours with compile=True")
    parser.add_argument("--commit", metavar="SHA", help="what the rows name as commit: needed where the files have no .git")
    output = "JSON file, beside which NAME.run.json lies (default benchmarks/results/<gpu>.json; stand-in: build/)"
    parser.add_argument("--output", type=Path, metavar="FOLDER/NAME.json", help=output)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print these rows as Markdown and stop")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="with --table: draw the ratios too")
    found = parser.parse_args(given)
    found.drivers = found.drivers or (["host"] if found.device == "cpu" else ["graph"])
    return found


def planned(given: argparse.Namespace) -> list[Row]:
    return gpu_rows.rows(given.workloads, given.cuts, given.samplers, given.precisions, given.drivers, given.stops)


def plan(given: argparse.Namespace) -> str:
    """The rows in order with their FLOPs and expected seconds, as Markdown."""
    lines = [
        f"Budget {given.budget:.0f} s; half of it for compiling B2. Seconds are expected from assumed rates, not measured.", "",
        "| workload | at | precision | driver | stop | GFLOP per evaluation | seconds | sum |", "|" + "---|" * 8,
    ]  # fmt: skip
    total = 0.0
    for row in planned(given):
        seconds = gpu_rows.expected_seconds(row, given.repetitions or Scale.repetitions)
        total += seconds
        flops = gpu_rows.work(*row.pair_key).evaluation / 1e9
        lines.append(
            f"| {row.workload} | {row.cut} | {row.precision} | {row.driver} | {row.stop} | {flops:.3g} | {seconds:.0f} | "
            f"{total:.0f}{'' if total <= given.budget else ' (over the budget)'} |"
        )
    return "\n".join(lines)


class Recorder:
    """The files of results, rewritten after every row: what was cut short loses nothing."""

    def __init__(self, path: Path, results: dict[str, Any]):
        self.path, self.results = path, results
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        gpu_table.save(self.path, self.results)


def run_rows(
    rows: Sequence[Row], measure: Callable[[Row], dict[str, Any]], budget: Budget, recorder: Recorder, repetitions: int,
    alive: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Measure what fits, in order; a row that fails is recorded with its error, one that does not fit with its reason.

    alive: raises when the device takes no more work, which ends the run.
    """
    results = recorder.results
    results["not_run"] = [{**row.facts(), "reason": "not reached"} for row in rows]
    recorder.write()
    broken = None
    for row in rows:
        need, left = budget.forecast(row, repetitions), budget.left
        entry = results["not_run"].pop(0)
        if broken or need > left:
            short = f"budget (it needs about {need:.0f} s, {max(left, 0):.0f} s are left)"
            results["not_run"].append({**entry, "reason": broken or short})
            continue
        label = " ".join(str(entry[key]) for key in ("workload", "at", "precision", "driver", "stop"))
        print(f"{label} ...", end=" ", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            with budget.measuring(row, repetitions):
                results["rows"].append(measure(row))
            print(summary(results["rows"][-1]), file=sys.stderr, flush=True)
        except Exception as error:  # whatever one row meets must not lose the others
            text = f"{type(error).__name__}: {str(error)[:500]}"
            results["failed"].append({**entry, "error": text, "row_seconds": time.perf_counter() - began})
            del results["failed"][-1]["reason"]
            print(f"FAILED: {text}", file=sys.stderr, flush=True)
            try:
                alive()
            except Exception as lost:
                broken = f"the device takes no more work: {str(lost)[:200]}"
        results["seconds"] = budget.seconds - budget.left
        recorder.write()
    recorder.write()


def summary(row: dict[str, Any]) -> str:
    """A row in one line, for who watches."""
    ratios = ", ".join(f"{n} {row[f'ratio_{n}']:.2f}x" for n in ("b0", "b1", "b2") if row.get(f"ratio_{n}") is not None)
    return f"{row['images_per_second']:.4g} images/s, floor {row['floor_fraction']:.2f}, {ratios}; {row['row_seconds']:.0f} s"


def bench(given: argparse.Namespace) -> dict[str, Any]:
    """Measure, and the results as written."""
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --dry-run prints the plan, --device cpu tries the command on a small scale")
    torch.backends.cudnn.benchmark = True  # shapes never change; the choice is made while both sides warm up
    budget = Budget(given.budget, time.perf_counter)
    given_scale = {"steps": given.steps, "repetitions": given.repetitions, "samples": given.samples}
    given_scale["num_slots"] = (given.num_slots,) if given.num_slots else None
    base = Scale.stand_in() if device.type == "cpu" else Scale()
    scale = Scale(**{**vars(base), **{k: v for k, v in given_scale.items() if v is not None}})
    named = RESULTS / f"{slug(device_name(device))}.json" if device.type == "cuda" else BUILD / "gpu-stand-in.json"
    given.output = given.output or named
    command = shlex.join(["python", "-m", "benchmarks.gpu_bench", *given.arguments])
    machine = facts(device, given.commit)
    measuring = Bench(device, budget, scale, not given.no_b2 and device.type == "cuda", given.compile)
    results: dict[str, Any] = {
        "kind": "fastrefine gpu_bench", "machine": machine, "command": command, "budget": given.budget,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "stand_in": device.type == "cpu", "peaks": {}, "rows": [], "failed": [], "not_run": [],
    }  # fmt: skip
    recorder = Recorder(given.output, results)
    for precision in given.precisions:
        measuring.peak(precision)
    results["peaks"] = measuring.peaks()
    results["copy_bytes_per_second"] = copy_bandwidth(device, 1024 if device.type == "cuda" else 16)

    def alive() -> None:
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    # a hang ends, and says where it was, before whatever started this ends it (10 minutes are usual); every row is written
    faulthandler.dump_traceback_later(min(1.1 * max(budget.left, 30), HANG_SECONDS), exit=True)
    try:
        one = functools.partial(measure, measuring, command=command, machine=machine)
        run_rows(planned(given), one, budget, recorder, scale.repetitions, alive)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    given.arguments = sys.argv[1:] if arguments is None else list(arguments)
    if given.table:
        print(gpu_table.report(given.table, given.plot))
        return 0
    if given.dry_run:
        print(plan(given))
        return 0
    results = bench(given)
    print(gpu_table.table(results))
    print(f"Written: {given.output}", file=sys.stderr)
    return 1 if results["failed"] or not results["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
