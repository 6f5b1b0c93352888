"""Quick timings of what the design assumed: ``python -m benchmarks.gpu_probe [--limit SECONDS] [--output FILE.json]``.

Milliseconds per engine step by driver, slots and precision; bytes per second of the step's kernels; copies to and from the
device. Single rounds on small runs: leads, not results, which benchmarks.gpu_bench makes. The file is
rewritten after each part, so that a run that is ended keeps what it found.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastrefine as fr
from benchmarks.gpu_machine import copy_bandwidth, timed, write_json
from benchmarks.workloads import WORKLOADS

SHORT, LONG = 10, 30  # the difference of two runs leaves filling and rendering out
STEP_KERNELS = ("refine_apply", "refine_decide", "refine_reduce", "copy_rows")


class Probe:
    """Runs of one workload; ``found`` is what is written, also when time ran out on the way."""

    def __init__(self, device: str, workload: str, deadline: float, write: Callable[[dict[str, Any]], None]):
        self.device, self.deadline = torch.device(device), deadline
        self.workload = WORKLOADS[workload]
        self.pair = tuple(network.to(device) for network in self.workload.pair())
        self.found: dict[str, Any] = {"workload": workload, "steps": [], "kernels": {}, "copies": {}}
        self.write = write

    def refiner(self, driver: str, precision: str, **own: Any) -> fr.Refiner:
        sampler = fr.Collaborative(self.workload.step_size, control="fixed")
        return fr.Refiner(
            *self.pair, sampler, at=self.workload.cuts["first"], prior=fr.Normal(self.workload.latent), driver=driver,
            precision=precision, output_device=self.device, **own,
        )  # fmt: skip

    def steps(self, driver: str, precision: str, sizes: list[int], **own: Any) -> None:
        """Milliseconds per step for each number of slots."""
        refiner = None
        for size in sizes:
            line: dict[str, Any] = {"driver": driver, "precision": precision, "num_slots": size, **own}
            self.found["steps"].append(line)
            if time.perf_counter() > self.deadline:
                line["error"] = "not reached: time"
                self.write(self.found)
                continue
            try:
                refiner = refiner or self.refiner(driver, precision, **own)
                line["ms_per_step"] = 1e3 * self._difference(refiner, size)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            self.write(self.found)

    def _difference(self, refiner: fr.Refiner, size: int) -> float:
        refiner.num_slots, seconds = size, {}
        for steps in (SHORT, LONG):
            refiner.max_steps = steps
            refiner.sample(size)
            seconds[steps] = statistics.median(timed(lambda: refiner.sample(size), self.device)[0] for _ in range(3))
        return (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)

    def kernels(self, size: int, precision: str) -> None:
        """Time per call of the step's own kernels and of the slowest others, from the profiler; bytes they must move."""
        from torch.profiler import ProfilerActivity, profile

        refiner = self.refiner("host", precision, num_slots=size, max_steps=SHORT)
        features = refiner.sample(size).activations[0].numel()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            refiner.sample(size)
        events = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
        own = [e for e in events if any(name in e.key for name in STEP_KERNELS)]
        listed = [
            {"kernel": e.key[:90], "calls": e.count, "us_per_call": e.device_time_total / e.count, "us": e.device_time_total}
            for e in [*own, *[e for e in events if e not in own][:12]]
        ]
        self.found["kernels"] = {"num_slots": size, "features": features, "precision": precision, "by_time": listed}
        apply = next((e for e in own if "refine_apply" in e.key), None)
        if apply is not None:
            # read activation and gradient, write activation, in float32: what no version can avoid
            rate = 3 * 4 * size * features / (apply.device_time_total / apply.count * 1e-6)
            self.found["kernels"]["refine_apply_least_bytes_per_second"] = rate

    def copies(self, megabytes: int) -> None:
        """Bytes per second host to device, device to host (pageable, pinned) and on the device (read plus written)."""
        size, found = megabytes * 2**20, self.found["copies"]
        found["on the device"] = copy_bandwidth(self.device, megabytes)
        if self.device.type != "cuda":
            return
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        for name, here in (("pageable", torch.zeros(size, dtype=torch.uint8)),
                           ("pinned", torch.zeros(size, dtype=torch.uint8).pin_memory())):  # fmt: skip
            for label, source, target in (("to the device", here, there), ("to the host", there, here)):
                seconds = [timed(lambda: target.copy_(source), self.device)[0] for _ in range(4)][1:]  # noqa: B023
                found[f"{label}, {name}"] = size / statistics.median(seconds)


def run(device: str, limit: float, write: Callable[[dict[str, Any]], None], compiled: bool = False) -> None:
    """Everything, the most telling first, ``write`` after each part; on a CPU a stand-in. compiled: only compile=True."""
    on_gpu = device == "cuda"
    torch.backends.cudnn.benchmark = True
    probe = Probe(device, "dcgan64" if on_gpu else "mlp2d", time.perf_counter() + limit, write)
    driver, precision = ("graph", "bfloat16") if on_gpu else ("host", "float32")
    if compiled:  # alone: torch.compile's max-autotune may take minutes
        probe.steps(driver, precision, [512 if on_gpu else 8], compile=True)
        return
    sizes = [512, 128, 2048] if on_gpu else [8]
    parts = {"copies": lambda: probe.copies(256 if on_gpu else 4), "kernels": lambda: probe.kernels(2048, "bfloat16")}
    for name in ("copies", "kernels") if on_gpu else ("copies",):
        try:
            parts[name]()
        except Exception as error:
            probe.found[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        write(probe.found)
    precisions = ("bfloat16", "tf32", "float32") if on_gpu else ("float32",)
    for precision, driver in itertools.product(precisions, ("graph", "host") if on_gpu else ("host",)):
        probe.steps(driver, precision, sizes)
    if on_gpu:
        probe.steps("loop", "bfloat16", [512])


def table(found: dict[str, Any]) -> str:
    """What ``run`` found as Markdown."""
    lines = [
        f"{found['workload']}, at the first block",
        "",
        "| driver | precision | slots | ms per step |",
        "|---|---|---|---|",
    ]
    for line in found["steps"]:
        value = f"{line['ms_per_step']:.3f}" if "ms_per_step" in line else line["error"]
        driver = line["driver"] + ", compiled" * bool(line.get("compile"))
        lines.append(f"| {driver} | {line['precision']} | {line['num_slots']} | {value} |")
    for name, value in found["copies"].items():
        lines.append(f"- {name}: {value if isinstance(value, str) else f'{value / 1e9:.3g} GB/s'}")
    kernels = found["kernels"]
    rate = kernels.get("refine_apply_least_bytes_per_second")
    if rate is not None:
        lines.append(f"- refine_apply: {rate / 1e9:.4g} GB/s of the bytes it cannot avoid")
    if "error" in kernels:
        lines.append(f"- kernels: {kernels['error']}")
    for kernel in kernels.get("by_time", []):
        lines.append(f"- {kernel['us_per_call']:.1f} us x {kernel['calls']}: {kernel['kernel']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_probe", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which nothing new begins (default 90)")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--compile", action="store_true", help="only the step with compile=True")
    given = parser.parse_args()
    found: dict[str, Any] = {}

    def write(now: dict[str, Any]) -> None:
        found.update(now)
        if given.output:
            write_json(given.output, now)

    try:
        run(given.device, given.limit, write, given.compile)
    except KeyboardInterrupt:
        print("ended by a signal: what was found until then")
    if found:
        print(table(found))
    return 1 if not any("ms_per_step" in line for line in found.get("steps", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
