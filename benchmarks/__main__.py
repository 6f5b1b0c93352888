"""Speed: ``python -m benchmarks run | report | hardware``; README.md beside this says what is in the results."""

from __future__ import annotations

import datetime
import faulthandler
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import compare, profiling, report, rows
from benchmarks.machine import DTYPES, RESULTS, ROOT, copy_bandwidth, facts, folder, synchronize, write_json
from benchmarks.measure import Bench, Budget, measure
from benchmarks.rows import Row
from benchmarks.workloads import WORKLOADS

TINY = ROOT / "build" / "benchmarks"  # what is no result goes where git does not look
COMPARED = ROOT / "build" / "compare"
GRACE = 10  # seconds between asking a step to end and ending it
OVERTIME = 55  # seconds beyond the budget after which rows and profile are taken to hang
PRODUCT = ("workloads", "cuts", "precisions", "stops", "drivers", "samplers", "slots")  # options, in the order of Row's fields
SHOWN = 3000  # characters of a step's output
FAILED_ROWS, LOST = 1, 3  # exit codes: some row failed; the device takes no more work


@click.group()
def main() -> None:
    """Speed of refinement against the loops of benchmarks/baselines.py."""


def several(name: str, known: Sequence[str] | None = None, **more: Any) -> Callable[[Any], Any]:
    """An option that may be given several times; without one, the rows that the machine gets by default."""
    return click.option(f"--{name}", f"{name}s", multiple=True, type=click.Choice(list(known)) if known else int, **more)


def on_device(command: Any) -> Any:
    """--device, --tiny, --commit."""
    for option in (
        click.option("--commit", help="What the results name as commit: needed where the files have no .git."),
        click.option("--tiny", is_flag=True, help="Tiny networks and runs, to try the command; no result."),
        click.option("--device", type=click.Choice(("cpu", "cuda")), default="cuda", show_default=True),
    ):
        command = option(command)
    return command


def found(device: str) -> torch.device:
    """The device, or an error that says what is possible without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("no GPU here: run --plan prints the rows, --device cpu measures a CPU, with --tiny in a minute")
    return torch.device(device)


@main.command()
@on_device
@several("workload", list(WORKLOADS), help="Networks.")
@several("cut", rows.CUTS, help="What is refined [default: first].")
@several("precision", list(DTYPES))
@several("stop", rows.STOPS)
@several("driver", ("auto", "host", "graph", "loop"), help="Ours [default: auto].")
@several("sampler", rows.SAMPLERS, help="Update rules; the baselines are written for the first.")
@several("slot", help="Slots of ours [default: the best of a few].")
@click.option("--batch", "batches", multiple=True, type=int, help="Of the baselines [default: the best of 64, 256, 1024].")
@click.option("--steps", type=int, help="Per image [default: 20 on a CPU, 50 on a GPU].")
@click.option("--rounds", type=int, help="[default: 3]")
@click.option("--threads", type=int, help="Ours and the baselines' [default: 1 on a CPU].")
@click.option("--budget", type=float, help="Seconds for everything [default: 400 on a GPU, 220 on a CPU].")
@click.option(
    "--b2/--no-b2", default=None, help="Whether the compiled loop is raced [default: on a GPU]; a minute for each row."
)
@click.option("--compile", "compile_ours", is_flag=True, help="Ours with compile=True.")
@click.option("--profile", is_flag=True, help="Then profile the row furthest below its goals.")
@click.option("--go-on", is_flag=True, help="Only rows that the output does not have, failed ones apart.")
@click.option("--plan", is_flag=True, help="Print the rows and stop.")
@click.option("--output", type=click.Path(path_type=Path), help="[default: benchmarks/results/...]")
@click.option("--pytest-benchmark", "theirs", type=click.Path(path_type=Path), help="The same rows in the form of "
              "pytest-benchmark [default: build/benchmarks/pytest-benchmark-<device>.json].")  # fmt: skip
def run(
    device: str, tiny: bool, output: Path | None, theirs: Path | None, plan: bool, profile: bool, **given: Any
) -> None:  # fmt: skip
    """Measure rows, the most important first, and write every one as it comes."""
    wanted = planned(device, tiny, **{k: given[k] for k in PRODUCT})
    if plan:
        click.echo("\n".join(row.label for row in wanted))
        return
    place = found(device)
    if device == "cpu" or given["threads"]:
        torch.set_num_threads(given["threads"] or 1)
    torch.backends.cudnn.benchmark = True  # shapes never change; the choice is made while both sides warm up
    scale = rows.TINY if tiny else rows.CPU if device == "cpu" else rows.GPU
    b2 = device == "cuda" if given["b2"] is None else given["b2"]
    scale = replace(
        scale, compile=scale.compile and b2, own_sizes=scale.own_sizes and not given["batches"],
        **{name: given[name] for name in ("steps", "rounds", "batches") if given[name]},
    )  # fmt: skip
    budget = Budget(given["budget"] or (400.0 if device == "cuda" else 220.0))
    path = output or default_output(place, tiny)
    bench = Bench(place, scale, budget, given["compile_ours"])
    machine = facts(place, given["commit"])
    record: dict[str, Any] = {
        "kind": report.KIND, "machine": machine, "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "tiny": tiny,
        "steps": scale.steps, "peaks": {}, "rows": [], "failed": [], "not_run": [],
    }  # fmt: skip
    if given["go_on"] and path.exists():
        before = report.load(path)
        record |= {key: before[key] for key in ("rows", "failed", "peaks")}
        done = {report.label(row) for row in (*before["rows"], *before["failed"])}
        wanted = [row for row in wanted if row.label not in done]
    record["copy_bytes_per_second"] = copy_bandwidth(place, 1024 if place.type == "cuda" else 16)
    for precision in dict.fromkeys(row.precision for row in wanted):
        record["peaks"][precision] = bench.peak(precision)
    if device == "cuda":  # a hang ends, and says where it was
        faulthandler.dump_traceback_later(budget.seconds + OVERTIME, exit=True)
    broken = run_rows(wanted, lambda row: measure(bench, row), budget, record, path, lambda: synchronize(place))
    if profile and not broken and (worst := report.worst(record)):
        row = Row(**{name: worst[name] for name in Row.__dataclass_fields__})
        click.echo(profiling.table(profiling.profile(bench, row, worst["num_slots"], path.with_name("profile.json"))))
    faulthandler.cancel_dump_traceback_later()
    click.echo(report.table(record))
    click.echo(f"Written: {path}", err=True)
    if record["rows"]:
        as_theirs = theirs or TINY / f"pytest-benchmark-{device}.json"
        as_theirs.parent.mkdir(parents=True, exist_ok=True)
        write_json(as_theirs, report.as_pytest_benchmark(record))
        click.echo(f"Written: {as_theirs}, the same as pytest-benchmark writes it", err=True)
    sys.exit(LOST if broken else FAILED_ROWS if record["failed"] or not record["rows"] else 0)


def planned(device: str, tiny: bool, **given: Sequence[Any]) -> list[Row]:
    """The machine's own rows, or all combinations of what was asked for."""
    if not any(given.values()):
        wanted = rows.cpu_rows() if device == "cpu" and not tiny else rows.gpu_rows()
    else:
        default: dict[str, tuple[Any, ...]] = {
            "workloads": ("dcgan32",), "cuts": ("first",), "precisions": ("float32",), "stops": ("none",),
            "drivers": ("auto",), "samplers": ("collaborative",), "slots": (None,),
        }  # fmt: skip
        wanted = rows.product([given[name] or default[name] for name in PRODUCT])
    return rows.tiny(wanted, device) if tiny else wanted


def default_output(device: torch.device, tiny: bool) -> Path:
    """A GPU's results lie in a folder of their own."""
    if tiny:
        return TINY / "speed.json"
    return folder(device) / "speed.json" if device.type == "cuda" else RESULTS / f"cpu-{folder(device).name}.json"


def run_rows(
    wanted: Sequence[Row], measure: Callable[[Row], dict[str, Any]], budget: Budget, record: dict[str, Any], path: Path,
    alive: Callable[[], None] = lambda: None,
) -> str | None:  # fmt: skip
    """Measure what fits, in order, and write after each: why the device takes no more work, or None.

    A row that fails is recorded with its error, one that does not fit with its reason. alive: raises when the device is lost.
    """
    record["not_run"] = [{**row.facts(), "reason": "not reached"} for row in wanted]
    broken: str | None = None
    for row in wanted:
        entry = record["not_run"].pop(0)
        if broken or not budget.has_room_for_a_row():
            reason = broken or f"budget: {max(budget.left, 0):.0f} s are left, a row takes {budget.longest_row:.0f} s"
            record["not_run"].append({**entry, "reason": reason})
            continue
        del entry["reason"]
        click.echo(f"{row.label} ...", nl=False, err=True)
        record["failed"].append({**entry, "error": "it did not end"})  # until it did: a crash loses nothing
        write_json(path, record)
        try:
            measured = measure(row)
            record["failed"].pop()
            record["rows"].append(measured)
            click.echo(f" {report.summary(measured, record['machine'])}", err=True)
        except Exception as error:  # whatever one row meets must not lose the others
            record["failed"][-1]["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            click.echo(f" FAILED: {record['failed'][-1]['error']}", err=True)
            try:
                alive()
            except Exception as lost:
                broken = f"the device takes no more work: {str(lost)[:200]}"
        write_json(path, record)
    write_json(path, record)
    return broken


@main.command("report")
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
def show(files: tuple[Path, ...]) -> None:
    """Print records as Markdown, with the goals beside each row [default: those in benchmarks/results]."""
    for file in files or report.committed():
        click.echo(report.table(report.load(file)))


@main.command()
@on_device
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder [default: benchmarks/results/<gpu>]")
def hardware(device: str, tiny: bool, commit: str | None, output: Path | None) -> None:
    """All that a GPU must tell, within 10 minutes: facts, checks, rows, a profile; each written as it comes."""
    place = found(device)
    target = (output or (TINY if tiny else folder(place))).resolve()
    target.mkdir(parents=True, exist_ok=True)
    same = [f"--device={device}", *["--tiny"] * tiny, *([f"--commit={commit}"] if commit else [])]
    speed = [sys.executable, "-m", "benchmarks", "run", *same, "--profile", f"--output={target / 'speed.json'}"]
    budget, codes = Budget(590), {}

    def step(name: str, limit: float, *command: str) -> None:
        began = budget.left
        codes[name] = ended(command, min(limit, budget.left - GRACE), target / f"{name}.log")
        click.echo(f"== {name}: exit code {codes[name]} after {began - budget.left:.0f} s", err=True)

    step("doctor", 30, sys.executable, "-m", "fastrefine", "doctor")
    step("check", 200, "make", "gpu-check", f"PYTHON={sys.executable}", f"CHECKED={target}")
    step("speed", 370, *speed, "--budget=310")
    if codes["speed"] not in (0, FAILED_ROWS):  # a crash: the rows that are left, in a new process
        step("speed-again", budget.left, *speed, "--go-on", f"--budget={max(budget.left - 60, 1):.0f}")
    click.echo(f"Written: {target}; exit codes: {codes}")
    sys.exit(any(codes.values()))


@main.command("compare")
@click.argument("base")
@click.option("--head", default="HEAD", show_default=True, help="The other revision. What is not committed is not measured.")
@click.option("--cases", type=click.Path(exists=True, path_type=Path), default=compare.CASES,
              help="A file of functions bench_NAME(), which prepare a run and return it [default: ours].")  # fmt: skip
@click.option("--starts", type=click.IntRange(min=1), default=6, show_default=True, help="Pairs of processes.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of each pair, in turn.")
@click.option("--threshold", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Slower by more fails.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=COMPARED, help="[default: build/compare]")
def compare_(base: str, head: str, cases: Path, starts: int, rounds: int, threshold: float, output: Path) -> None:
    """Build BASE and HEAD, time them in turn, and print HEAD's seconds over BASE's with intervals.

    Exit code 1 where a case is slower by more than the threshold. The seconds go into base.json and head.json as
    pytest-benchmark writes them.
    """
    output = output.resolve()
    try:
        built = {side: compare.unpacked(Path.cwd(), revision, output) for side, revision in (("base", base), ("head", head))}
        found = compare.compared({side: tree for side, (_, tree) in built.items()}, cases, starts, rounds, click.echo)
    except compare.Failed as error:
        raise click.ClickException(str(error)) from error
    if not found:
        raise click.ClickException(f"{cases} has no function bench_NAME() that both revisions run")
    for side, (commit, _) in built.items():
        machine = {**facts(torch.device("cpu")), "commit": commit}
        write_json(output / f"{side}.json", compare.as_pytest_benchmark(found, side, commit, machine))
    click.echo(compare.table(found, threshold))
    sys.exit(any(one.slower(threshold) for one in found))


def ended(command: Sequence[str], limit: float, log: Path) -> int:
    """Exit code of a command, 124 where it was ended after ``limit`` seconds; its output is kept, and its end shown."""
    given = ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{max(limit, 1):.0f}", *command]  # pytest then reports
    with log.open("w") as kept:  # no pipe: what a command left running would hold it open
        code = subprocess.run(
            given, stdout=kept, stderr=subprocess.STDOUT, cwd=ROOT, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        ).returncode  # fmt: skip
    click.echo(log.read_text(errors="replace")[-SHOWN:])
    return code


if __name__ == "__main__":
    main()
