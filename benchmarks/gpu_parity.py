"""Do all drivers give the same bits, and the reference's results? ``python -m benchmarks.gpu_parity [--output FILE.json]``.

Same shapes, so bitwise equality is demanded between drivers and between two runs of one, under deterministic=True: by default
cuDNN may choose an algorithm that adds in any order, and equality is only reported. Against float64 on the CPU a few steps
must agree within a tolerance. Whether a sample's bits stay the same among other companions is reported, not demanded: on a
GPU that is a property of cuDNN's and cuBLAS's kernels. Every model gets its first precision before any gets its second; what
time did not reach is told as skipped. The file is rewritten after each precision of a model.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.gpu_machine import write_json
from benchmarks.gpu_small import SKIPPED
from benchmarks.workloads import WORKLOADS
from fastrefine.models import SNGANDiscriminator, SNGANGenerator

N, SLOTS, STEPS, CLASSES = 60, 16, 10, 4
FEW = 3  # steps of the comparison with float64
# Largest difference from float64 after FEW steps, as a part of the largest value.
TOLERANCE = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 2e-1}


def conditional() -> tuple[nn.Module, nn.Module]:
    """A small class-conditional SNGAN: per-sample context travels with the slots."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        g, d = SNGANGenerator(features=16, num_classes=CLASSES), SNGANDiscriminator(features=16, num_classes=CLASSES)
    return g.eval(), d.eval()


# name -> (networks, shape of a latent, cut, labels?)
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], int, str, bool]] = {
    "mlp2d": (WORKLOADS["mlp2d"].pair, 2, WORKLOADS["mlp2d"].cuts["first"], False),
    "dcgan16": (WORKLOADS["dcgan16"].pair, 32, WORKLOADS["dcgan16"].cuts["first"], False),
    "conditional sngan": (conditional, 128, "blocks.0", True),
}


class Switched(fr.stopping.StopRule):
    """A logit from which on samples retire, or None, that may change between runs: nothing is prepared anew for it."""

    logit: float | None = None

    @property
    def early(self) -> bool:  # type: ignore[override]
        return self.logit is not None

    def draw(self, ids: Tensor, seed: int, max_steps: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rule = fr.stopping.FixedSteps() if self.logit is None else fr.stopping.Threshold(self.logit)
        return rule.draw(ids, seed, max_steps, labels)


class Case:
    """A model on a device in a precision, prepared once for each kind of algorithms, to be run by any driver with any stop."""

    def __init__(self, model: str, device: str, precision: str):
        make, latent, at, labelled = MODELS[model]
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.latents = fr.Normal(latent).sample(torch.arange(N), 0, dtype)
        self.labels = torch.arange(N) % CLASSES if labelled else None
        self.precision, self.stop = precision, Switched()
        pair = [network.to(device, dtype) for network in make()]
        sampler = fr.Collaborative(0.1, control="fixed")
        first = fr.Refiner(*pair, sampler, at=at, stop=self.stop, num_slots=SLOTS, precision=precision)
        self.refiners = {False: first}  # by deterministic

    def run(
        self, driver: str, ids: slice = slice(None), deterministic: bool = False, stop: float | None = None, steps: int = STEPS
    ) -> fr.Result:
        """The samples ``ids`` of the case."""
        if deterministic not in self.refiners:  # what is captured depends on it
            self.refiners[deterministic] = self.refiners[False].replaced(deterministic=deterministic)
        refiner, self.stop.logit = self.refiners[deterministic], stop
        refiner.driver, refiner.max_steps = driver, steps
        labels = None if self.labels is None else self.labels[ids]
        return refiner.refine(self.latents[ids], labels=labels, first_id=ids.start or 0)


def difference(found: fr.Result, wanted: fr.Result) -> dict[str, Any]:
    """Largest differences of two results of the same samples."""

    def largest(a: Tensor, b: Tensor) -> float:
        return float((a.double().cpu() - b.double().cpu()).abs().max())

    bitwise = all(torch.equal(getattr(found, k), getattr(wanted, k)) for k in ("images", "logits", "steps"))
    return {
        "bitwise": bitwise, "images": largest(found.images, wanted.images), "logits": largest(found.logits, wanted.logits),
        "steps": int(largest(found.steps, wanted.steps)),
    }  # fmt: skip


def compare(
    line: dict[str, Any], found: Callable[[], fr.Result], wanted: fr.Result | Exception, demanded: bool
) -> dict[str, Any]:  # fmt: skip
    """A line of the report with what came out; demanded: whether other bits are a failure, or only told."""
    line = {**line, "demanded": demanded}
    try:
        if isinstance(wanted, Exception):
            raise wanted
        line |= difference(found(), wanted)
    except Exception as error:  # a driver that cannot run is a finding, and the others go on
        return line | {"error": f"{type(error).__name__}: {str(error)[:300]}", "ok": False}
    return line | {"ok": line["bitwise"] or not demanded}


def attempt(run: Callable[[], fr.Result]) -> fr.Result | Exception:
    try:
        return run()
    except Exception as error:
        return error


Lines = list[dict[str, Any]]


class Checks:
    """All comparisons on a device; what they share is made once."""

    def __init__(self, device: str, drivers: list[str]):
        self.device, self.drivers = device, drivers
        self.case = functools.cache(Case)
        self.threshold, self.exact = functools.cache(self._threshold), functools.cache(self._exact)

    def _threshold(self, model: str) -> float:
        """A logit that half of the samples reach in half of the steps."""
        pilot = attempt(lambda: self.case(model, self.device, "float32").run("host", steps=STEPS // 2))
        return float(pilot.logits.median()) if isinstance(pilot, fr.Result) else 0.0

    def _exact(self, model: str, precision: str) -> fr.Result:
        """FEW steps on the CPU."""
        with fr.use_backend("reference"):
            return Case(model, "cpu", precision).run("host", steps=FEW)

    def against_float64(self, model: str, precision: str) -> dict[str, Any]:
        """FEW steps on the device against float64 on the CPU, and against the CPU's float32 beside it."""
        driver = self.drivers[-1]
        line: dict[str, Any] = {
            "check": "float64 on the CPU",
            "case": f"{model} {driver}",
            "precision": precision,
            "stop": False,
        }
        try:
            exact, cpu = self.exact(model, "float64"), self.exact(model, "float32")
            found = self.case(model, self.device, precision).run(driver, steps=FEW)
        except Exception as error:
            return line | {"error": f"{type(error).__name__}: {str(error)[:300]}", "ok": False}
        line |= {**difference(found, exact), "cpu_float32_logits": difference(cpu, exact)["logits"]}
        scale = max(float(exact.images.abs().max()), 1e-6), max(float(exact.logits.abs().max()), 1.0)
        return line | {"ok": max(line["images"] / scale[0], line["logits"] / scale[1]) <= TOLERANCE[precision]}

    def bits(self, model: str, precision: str) -> Lines:
        """Drivers against host, one driver twice, and one among other companions; default algorithms without a stop only."""
        lines: Lines = []
        case, last = self.case(model, self.device, precision), self.drivers[-1]
        for stop, deterministic in ((None, False), (None, True), (self.threshold(model), True)):
            under = "deterministic" if deterministic else "default"

            def run(driver: str, ids: slice = slice(None)) -> fr.Result:
                return case.run(driver, ids, deterministic, stop)  # noqa: B023

            def add(
                check: str, told: str, found: Callable[[], fr.Result], wanted: fr.Result | Exception, demanded: bool
            ) -> None:  # fmt: skip
                label = f"{model}: {told}, {under} algorithms"  # noqa: B023
                line = {"check": check, "case": label, "precision": precision, "stop": stop is not None}  # noqa: B023
                lines.append(compare(line, found, wanted, demanded))

            host = attempt(lambda: run("host"))
            for driver in self.drivers:
                add("drivers", f"{driver} and host", lambda: run(driver), host, deterministic)  # noqa: B023
            again = attempt(lambda: run(last))
            add("again", f"{last} twice", lambda: run(last), again, deterministic)
            part = again.select(slice(21, None)) if isinstance(again, fr.Result) else again
            add("other companions", last, lambda: run(last, slice(21, None)), part, False)
        return lines


def check(
    device: str, models: list[str], drivers: list[str], precisions: list[str], deadline: float, write: Callable[[Lines], None]
) -> Lines:
    """All comparisons until the deadline (time.perf_counter); what it left out is a line that is skipped."""
    lines, checks = [], Checks(device, drivers)
    for precision, model in itertools.product(precisions, models):
        if time.perf_counter() > deadline:
            lines.append({"check": "time", "case": model, "precision": precision, "skipped": "time is up", "ok": True})
        else:
            lines += [*checks.bits(model, precision), checks.against_float64(model, precision)]
        write(lines)
    return lines


def table(lines: Lines) -> str:
    """The lines as Markdown."""
    head = ("check", "case", "precision", "stop", "bitwise", "images", "logits", "steps", "ok")
    rows = []
    for line in lines:
        cells = [f"{line[k]:.2g}" if isinstance(line.get(k), float) else str(line.get(k, "-")) for k in head[:-1]]
        ok = "ok" if line.get("bitwise", True) or line["check"].startswith("float64") else "differs, which is allowed"
        ok = f"skipped: {line['skipped']}" if "skipped" in line else ok
        rows.append("| " + " | ".join([*cells, ok if line["ok"] else f"**{line.get('error', 'differs')}**"]) + " |")
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


def summary(lines: Lines) -> str:
    """What was demanded and what was only reported, in two lines."""
    told = [line for line in lines if line.get("demanded") is False]
    kept = {
        what: (sum(line.get("bitwise", False) for line in some), len(some))
        for what, some in (
            ("between drivers and runs under default algorithms", [x for x in told if x["check"] != "other companions"]),
            ("among other companions", [x for x in told if x["check"] == "other companions"]),
        )
    }
    reported = "; ".join(f"{what} in {equal} of {asked}" for what, (equal, asked) in kept.items())
    bad, skipped = sum(not line["ok"] for line in lines), [f"{x['case']} {x['precision']}" for x in lines if "skipped" in x]
    late = f"; SKIPPED, for time was up: {', '.join(skipped)}" if skipped else ""
    return (
        f"Equal bits, only reported (cuDNN may choose algorithms that add in any order): {reported}\n"
        f"{len(lines) - len(skipped)} comparisons, {bad} not ok; bits are demanded between drivers and runs under "
        f"deterministic=True{late}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parity", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu: host against host in float32, to try the command")
    parser.add_argument("--drivers", nargs="+", help="compared with host (default: graph loop)")
    parser.add_argument("--precisions", nargs="+", help="default: float32 tf32 bfloat16")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which no new case begins (default 150)")
    parser.add_argument("--output", type=Path, help="JSON")
    given = parser.parse_args()
    on_cpu = given.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)  # small networks
    drivers = given.drivers or (["host"] if on_cpu else ["loop", "graph"])
    precisions = given.precisions or (["float32"] if on_cpu else list(TOLERANCE))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it of deterministic algorithms
    lines: Lines = []

    def write(now: Lines) -> None:
        lines[:] = now
        if given.output:
            write_json(given.output, now)

    try:
        check(given.device, given.models, drivers, precisions, time.perf_counter() + given.limit, write)
    except KeyboardInterrupt:
        lines.append({"check": "time", "case": "the rest", "error": "ended by a signal", "ok": False})
    print(table(lines))
    print(summary(lines))
    return 1 if any(not line["ok"] for line in lines) else SKIPPED if all("skipped" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
