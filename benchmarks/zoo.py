"""``python -m benchmarks.zoo [FOLDER]``: pairs as other people wrote them, against the loops of ``baselines``, on a CPU.

FOLDER holds public checkouts (``zoo_pairs``); without it only the networks of ``fastrefine.models`` are measured. Each pair
is refined at the input, at an inner place and at the output, for several numbers of samples, K steps for all, in one thread.
A run that would take too long has fewer steps, and then fewer samples. At the inner place it is also measured what it saves
that samples which have reached a threshold leave their slots.
Both sides run in one process in turn, each at its best batch; figures are medians of CPU time.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import io
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.baselines import CompiledForward, CompiledLoop, ExpertLoop, Hooked, PeersLoop, Refined
from benchmarks.machine import DTYPES, RESULTS, arithmetic, facts, write_json
from benchmarks.zoo_pairs import OURS, PUBLIC, ZooPair, known_again

KIND = "fastrefine zoo"
NUMBERS = (8, 64, 1024)
BATCHES = (64, 256, 1024)
SHARE = 0.1  # of the largest activation: how far the largest gradient moves an activation in one step
STOPPED = (8, 48, 200)  # slots, and fewest and most samples, of the runs with a threshold
FEW = 2  # steps after which results must agree where whole trajectories do not
WRONG = {"float32": 1e-2, "bfloat16": 0.5}  # median over samples of the largest difference, in parts of the largest value


class WrongResults(AssertionError):
    """A loop and ours do not compute the same."""


@dataclass(frozen=True)
class Limits:
    """How much is measured."""

    steps: int = 50
    fewest: int = 10  # steps
    numbers: tuple[int, ...] = NUMBERS
    seconds: float = 0.5  # of one run, about; fewer steps, then fewer samples, where they would take longer
    rounds: tuple[int, int] = (3, 9)
    precision: str = "float32"
    compile: bool = False  # B2 too, and ours with a compiled step, for the fewest samples


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of this process, what ``run`` returned)."""
    began = time.process_time()
    value = run()
    return time.process_time() - began, value


class Place:
    """One pair at one place: its loops and refiner, made once, for all numbers of samples."""

    def __init__(self, pair: ZooPair, networks: tuple[nn.Module, nn.Module], at: str, limits: Limits):
        self.pair, self.networks, self.at, self.limits = pair, networks, at, limits
        self.cut = functools.partial(Hooked, generate=pair.generate, discriminate=pair.logits, names=tuple(pair.labels(1)))
        self.step_size = self._step_size()
        self.refiner: fr.Refiner | None = None
        self.layout, self.seconds = self._layout()  # of B1; seconds of one of its steps for one sample

    def given(self, n: int) -> tuple[Tensor, ...]:
        """Latents and labels of n samples."""
        return self.pair.latents(n), *self.pair.labels(n).values()

    def loop(self, kind: Callable[..., Any], batch: int, steps: int, **own: Any) -> Any:
        """A baseline on copies of its own."""
        if kind is not PeersLoop:
            own = {"precision": DTYPES[self.limits.precision], **own}
        return kind(*copy.deepcopy(self.networks), self.at, self.step_size, steps, batch, cut=self.cut, **own)

    def _step_size(self) -> float:
        """So large that samples move, so small that few are chaotic."""
        cut = self.cut(*copy.deepcopy(self.networks), self.at)
        with torch.no_grad():
            a, *context = cut.prefix(*self.given(8))
        a = a.detach().requires_grad_()
        logits = cut(a, *context)[1]
        (grad,) = torch.autograd.grad(torch.nn.functional.softplus(-logits).sum(), a)
        return SHARE * float(a.detach().abs().max() / grad.abs().max().clamp(min=1e-20))

    def _layout(self) -> tuple[bool, float]:
        """(whether B1 is faster in channels_last, CPU seconds of one step for one sample)."""
        n, found, reference = 16, {}, self.loop(PeersLoop, 16, FEW)(*self.given(16))
        for channels_last in (False, True):
            try:
                loop = self.loop(ExpertLoop, n, FEW, channels_last=channels_last)
                off = difference(loop(*self.given(n)), reference)["off_median"]
            except RuntimeError:  # parameters of another rank, or a view that the layout forbids
                if not channels_last:
                    raise
                continue
            if off <= WRONG[self.limits.precision]:
                found[channels_last] = min(clock(lambda loop=loop: loop(*self.given(n)))[0] for _ in range(3))
        if not found:
            raise WrongResults(f"B1 differs from B0 by {off:.1e} of the largest value after {FEW} steps")
        best = min(found, key=lambda layout: found[layout])
        return best, found[best] / n / (FEW + 1)

    def number(self, wanted: int) -> tuple[int, int]:
        """(samples, steps) of a run that ends in time: as many of both as fit, but 8 samples and ``fewest`` steps at least."""
        limits = self.limits
        fewest = min(limits.fewest, limits.steps)
        fits = limits.seconds / (self.seconds * (fewest + 1))
        n = wanted if fits >= wanted or wanted <= 8 else max(8, 1 << max(int(fits).bit_length() - 1, 0))
        return n, max(fewest, min(limits.steps, int(limits.seconds / (self.seconds * n)) - 1))

    def numbers(self) -> Iterator[tuple[int, int, int]]:
        """(wanted samples, measured samples, steps) without repeats."""
        done: set[int] = set()
        for wanted in self.limits.numbers:
            n, steps = self.number(wanted)
            if n not in done:
                yield wanted, n, steps
            done.add(n)

    def ours(self, slots: int | None, steps: int) -> fr.Refiner:
        if self.refiner is None:
            held: dict[str, Any] = {}
            if self.pair.coupling != "refuse":
                with torch.no_grad():
                    real = self.pair.generate(self.networks[0], self.pair.latents(64), **self.pair.labels(64))
                held = {"coupling": self.pair.coupling, "real": real, "real_labels": self.pair.labels(64).get("labels")}
            self.refiner = fr.Refiner(
                *self.networks, fr.Collaborative(self.step_size, control="fixed"), at=self.at, max_steps=steps,
                generate=self.pair.generate, discriminate=self.pair.discriminate, precision=self.limits.precision,
                discriminator_output=self.pair.output, **held,
            )  # fmt: skip
        return self.refiner.replaced(num_slots=slots, max_steps=steps)

    def row(self, wanted: int, n: int, steps: int) -> dict[str, Any]:
        """The row of n samples and so many steps as it is written."""
        sizes = [size for size in BATCHES if size <= n] if n > BATCHES[0] else [n]
        given, labels = self.given(n), self.pair.labels(n).get("labels")
        runs: dict[str, Any] = {}
        batches, missing = {}, {}
        own = {"channels_last": self.layout}
        kinds: dict[str, Any] = {"b0": (PeersLoop, {}), "b1": (ExpertLoop, own)}
        for name, (kind, more) in kinds.items():
            loops = {size: self.loop(kind, size, steps, **more) for size in sizes}
            batches[name] = best(loops, lambda loop: loop(*given))
            runs[name] = functools.partial(loops[batches[name]], *given)
        compiled = self.limits.compile and wanted == min(self.limits.numbers)
        if compiled:
            loop, missing = self._compiled(batches["b1"], steps, *given)
            runs |= {"b2": functools.partial(loop, *given)} if loop else {}
        forget_peak()
        before = memory("VmRSS")
        slots = sizes if n > BATCHES[0] else [None]
        refiners = {size: self.ours(size, steps) for size in slots}
        firsts = {size: clock(lambda r=r: r.refine(given[0], labels=labels)) for size, r in refiners.items()}
        peak = memory("VmHWM")
        chosen = best(refiners, lambda r: r.refine(given[0], labels=labels))
        runs["ours"] = functools.partial(refiners[chosen].refine, given[0], labels=labels)
        if compiled and "b2" in runs:
            ours = refiners[chosen].replaced(compile=True)
            ours.refine(given[0], labels=labels)
            runs["compiled"] = functools.partial(ours.refine, given[0], labels=labels)
        seconds = self._race(runs)
        ratios = {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in runs if name.startswith("b")}
        if "compiled" in runs:
            ratios["ratio_compiled_b2"] = ratio(seconds["b2"], seconds["compiled"])
        first, out = firsts[chosen]
        checked = difference(out, runs["b1"]())
        if checked["off_median"] > WRONG[self.limits.precision]:
            checked |= self._after_few(refiners[chosen], given, labels)
        report = out.report
        return {
            "pair": self.pair.name, "checkout": self.pair.checkout, "at": self.at, "n": n, "wanted_n": wanted,
            "precision": self.limits.precision, "K": steps, "step_size": self.step_size, **ratios,
            "images_per_second": n / statistics.median(seconds["ours"]), "seconds": seconds,
            "preparation_seconds": max(0.0, first - statistics.median(seconds["ours"])),
            "peak_memory_mb": None if before is None or peak is None else max(0.0, peak - before),
            "num_slots": report["num_slots"], "b1_channels_last": self.layout,
            **{f"{name}_batch": size for name, size in batches.items()}, **checked, "missing": missing,
            "plain_step_seconds": self.seconds * n,
            **{key: report.get(key) for key in ("ladder", "repeatable", "route", "driver", "backend")},
        }  # fmt: skip

    def stopped(self) -> dict[str, Any]:
        """CPU seconds of fixed steps over those with a threshold that half of the samples reach in half of the steps.

        bound: what the steps saved would give, (K + 1) / (mean steps + 1).
        """
        limits, (slots, least, most) = self.limits, STOPPED
        fits = 10 * limits.seconds / self.seconds  # evaluations of a sample
        n = max(least, min(most, int(fits / (limits.fewest + 1)) // slots * slots))
        steps = max(limits.fewest, min(limits.steps, int(fits / n) - 1))
        fixed, given, labels = self.ours(slots, steps), self.given(n), self.pair.labels(n).get("labels")
        threshold = float(fixed.refine(given[0], labels=labels, snapshots=[steps // 2]).snapshots[steps // 2].logits.median())
        stopping = fixed.replaced(stop=threshold)
        runs = {
            name: functools.partial(r.refine, given[0], labels=labels) for name, r in (("fixed", fixed), ("ours", stopping))
        }
        mean, seconds = float(runs["ours"]().steps.double().mean()), self._race(runs)
        found = {
            "K": steps, "n": n, "num_slots": slots, "mean_steps": mean, "factor": ratio(seconds["fixed"], seconds["ours"]),
            "bound": (steps + 1) / (mean + 1),
        }  # fmt: skip
        return found if self.pair.coupling != "refuse" else found | self._stopped_loops(stopping, threshold, n, steps)

    def _stopped_loops(self, stopping: fr.Refiner, threshold: float, n: int, steps: int) -> dict[str, Any]:
        """Loops that end a batch when all its samples have reached the threshold, and ours, each at its best batch."""
        given, labels, missing = self.given(n), self.pair.labels(n).get("labels"), {}
        sizes = sorted({STOPPED[0], min(BATCHES[0], n)})
        refiners = {size: stopping.replaced(num_slots=size) for size in sizes}
        loops = {size: self.loop(ExpertLoop, size, steps, channels_last=self.layout) for size in sizes}
        slots = best(refiners, lambda r: r.refine(given[0], labels=labels))
        batch = best(loops, lambda loop: loop(*given, threshold=threshold))
        runs: dict[str, Any] = {
            "ours": functools.partial(refiners[slots].refine, given[0], labels=labels),
            "b1": functools.partial(loops[batch], *given, threshold=threshold),
        }
        if self.limits.compile:
            loop, missing = self._compiled(batch, steps, *given, threshold=threshold)
            runs |= {"b2": functools.partial(loop, *given, threshold=threshold)} if loop else {}
        mean, seconds = float(runs["b1"]().steps.double().mean()), self._race(runs)
        ratios = {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in runs if name != "ours"}
        return {"best_slots": slots, "b1_batch": batch, "b1_mean_steps": mean, "missing": missing, **ratios}

    def _compiled(self, batch: int, steps: int, *given: Tensor, **own: Any) -> tuple[Any, dict[str, str]]:
        """(B2, or None; why each kind that does not compile does not), after a run."""
        missing = {}
        for kind in (CompiledLoop, CompiledForward):
            try:
                loop = self.loop(kind, batch, steps, channels_last=self.layout)
                loop(*given, **own)
                return loop, missing
            except Exception as error:  # torch.compile may fail in any way: the row says how
                missing[kind.__name__] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None, missing

    def _race(self, runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """CPU seconds of every run, in turn."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        least, most = self.limits.rounds
        while (done := len(seconds["ours"])) < most:
            if done >= least and sum(map(sum, seconds.values())) > self.limits.seconds:
                break
            for name, run in runs.items():
                seconds[name].append(clock(run)[0])
        return seconds

    def _after_few(self, refiner: fr.Refiner, given: tuple[Tensor, ...], labels: Tensor | None) -> dict[str, Any]:
        """Whole trajectories may be chaotic, for rounding grows: then a few steps tell right from wrong."""
        ours = refiner.replaced(max_steps=FEW).refine(given[0], labels=labels)
        found = difference(ours, self.loop(ExpertLoop, len(given[0]), FEW, channels_last=self.layout)(*given))
        if found["off_median"] > WRONG[self.limits.precision]:
            raise WrongResults(f"ours and B1 differ after {FEW} steps: {found}")
        return {f"{key}_after_{FEW}": value for key, value in found.items()}


def best(choices: dict[Any, Any], run: Callable[[Any], Any]) -> Any:
    """The choice that ran fastest, each warmed up once."""
    if len(choices) == 1:
        return next(iter(choices))
    for choice in choices.values():
        run(choice)
    return min(choices, key=lambda key: clock(lambda: run(choices[key]))[0])


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: median over rounds."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def difference(found: fr.Result | Refined, wanted: Refined) -> dict[str, float]:
    """Largest and median over samples of the largest difference of an image, in parts of the largest value."""
    images, reference = found.images.float().flatten(1), wanted.images.float().flatten(1)
    apart = (images - reference).abs().amax(1) / reference.abs().max().clamp(min=1e-30)
    return {"off": float(apart.max()), "off_median": float(apart.median())}


def forget_peak() -> None:
    """Let the system's record of the largest memory begin anew, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(what: str) -> float | None:
    """VmRSS or VmHWM of this process in MB, on Linux."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    return next(int(line.split()[1]) / 1024 for line in path.read_text().splitlines() if line.startswith(what))


def measure(pair: ZooPair, zoo: Path | None, limits: Limits, at: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a pair as they come; of a place that cannot be measured a row with its ``error``."""
    quiet = contextlib.redirect_stdout(io.StringIO())  # some networks print while they are built
    with quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = pair.load(zoo)
    places = ("input", pair.place, "output") if pair.coupling == "refuse" else (pair.place,)
    for place in at or places:
        facts = {"pair": pair.name, "checkout": pair.checkout, "at": place}
        try:
            with warnings.catch_warnings(), arithmetic("float32"), known_again():
                warnings.simplefilter("ignore")
                found = Place(pair, networks, place, limits)
                if pair.coupling != "refuse":
                    yield facts | {"stopped": found.stopped()}
                    continue
                for count, numbers in enumerate(found.numbers()):
                    extra = {"stopped": found.stopped()} if place == pair.place and not count else {}
                    yield found.row(*numbers) | extra
        except Exception as error:  # one pair must not lose the others
            yield {**facts, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def summary(row: dict[str, Any]) -> str:
    """A row in one line."""
    name = f"{row['pair']:<22} {row['at']:<20}"
    if "error" in row:
        return f"{name} {row['error']}"
    if "n" not in row:
        return f"{name} {_stopped(row['stopped'])}"
    ratios = "  ".join(
        f"{key.removeprefix('ratio_').upper()} {value:5.2f}x" for key, value in row.items() if key.startswith("ratio_")
    )
    dropped = [entry["rung"] for entry in row["ladder"] if not entry["kept"]]
    without = "; without " + ", ".join(dropped) if dropped else ""
    if stopped := row.get("stopped"):
        without += f"; {_stopped(stopped)}"
    return (
        f"{name} n {row['n']:>4} K {row['K']:>2}  {ratios}  {row['images_per_second']:>8.0f} images/s  "
        f"slots {row['num_slots']:>3}  prepared in {row['preparation_seconds']:4.1f} s  off {row['off']:.0e}{without}"
    )


def _stopped(row: dict[str, Any]) -> str:
    over = ", ".join(f"{key.removeprefix('ratio_').upper()} {row[key]:.2f}x" for key in ("ratio_b1", "ratio_b2") if key in row)
    return f"with a threshold {row['factor']:.2f}x of {row['bound']:.2f}x" + f" ({over})" * bool(over)


def _same(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row was measured of."""
    return row["pair"], row["at"], row.get("n"), row.get("precision")


@click.command()
@click.argument("zoo", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--pair",
    "names",
    multiple=True,
    help="Only pairs whose name holds this; the output keeps all rows that are not measured again.",
)
@click.option("--at", multiple=True, help="Only at these places [default: input, an inner one, output].")
@click.option("--n", "numbers", multiple=True, type=int, help="Samples [default: 8, 64, 1024].")
@click.option("--steps", default=Limits.steps, show_default=True, help="Of every sample, at most.")
@click.option(
    "--seconds", default=Limits.seconds, show_default=True,
    help="Of one run, about: fewer steps (10 at least), then fewer samples, where it is longer.",
)  # fmt: skip
@click.option("--precision", type=click.Choice(tuple(WRONG)), default="float32", show_default=True)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="For the fewest samples, race B2, the compiled loop, and ours with a compiled step, too.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="[default: benchmarks/results/zoo-cpu.json, or models-cpu.json]"
)
def main(
    zoo: Path | None, names: tuple[str, ...], at: tuple[str, ...], numbers: tuple[int, ...], steps: int, seconds: float,
    precision: str, compiled: bool, output: Path | None,
) -> None:  # fmt: skip
    """Speed on networks as their authors wrote them, from a folder ZOO of checkouts; each row is written as it comes."""
    torch.set_num_threads(1)
    limits = Limits(steps, numbers=numbers or NUMBERS, seconds=seconds, precision=precision, compile=compiled)
    path = output or RESULTS / ("zoo-cpu.json" if zoo else "models-cpu.json")
    command = shlex.join(["python", "-m", "benchmarks.zoo", *("ZOO" if part == str(zoo) else part for part in sys.argv[1:])])
    record: dict[str, Any] = {
        "kind": KIND, "machine": facts(torch.device("cpu")), "command": command,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": [], "failed": [],
        "held": [],
    }  # fmt: skip
    pairs = [p for p in (*(PUBLIC if zoo else ()), *OURS) if not names or any(name in p.name for name in names)]
    if names and path.exists():
        before = json.loads(path.read_text())
        record |= {key: before.get(key, []) for key in ("rows", "failed", "held")}
    for pair in pairs:
        try:
            for row in measure(pair, zoo, limits, at):
                row["commit"] = record["machine"]["commit"]
                for key in ("rows", "failed", "held"):  # an earlier run's row of the same
                    record[key] = [old for old in record[key] if _same(old) != _same(row)]
                record["failed" if "error" in row else "rows" if "n" in row else "held"].append(row)
                click.echo(summary(row))
                write_json(path, record)
        except Exception as error:  # a checkout that is missing or does not import
            record["failed"].append({"pair": pair.name, "at": "-", "error": f"{type(error).__name__}: {str(error)[:300]}"})
            click.echo(summary(record["failed"][-1]))
    write_json(path, record)
    click.echo(f"Written: {path}", err=True)
    sys.exit(0 if record["rows"] else 1)


if __name__ == "__main__":
    main()
