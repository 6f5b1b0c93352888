"""Where the time of a row goes: kernels by time, how busy the GPU is, and what a captured step holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import copy_bandwidth, timed, write_json
from benchmarks.measure import FEW, Bench
from benchmarks.rows import Row

OURS = ("refine_apply", "refine_decide", "refine_reduce", "copy_rows")  # the step's kernels
LISTED = 25


def census(graph: torch.cuda.CUDAGraph) -> dict[str, int]:
    """Type of node -> how many the captured graph holds, child graphs included; needs ``keep_graph=True``."""
    from fastrefine import _device_loop  # type: ignore[attr-defined]

    return _device_loop.census(graph.raw_cuda_graph())


def profile(bench: Bench, row: Row, num_slots: int, path: Path) -> dict[str, Any]:
    """Profile a short run of the row, and write what was found into ``path`` after each part."""
    found: dict[str, Any] = {"kind": "fastrefine profile", **row.facts(), "num_slots": num_slots}
    parts = {"kernels": kernels, "drivers": drivers, "census": captured}
    for name, part in parts.items():
        try:
            found[name] = part(bench, row, num_slots)
        except Exception as error:  # one part that fails must not lose the others
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        write_json(path, found)
    return found


def kernels(bench: Bench, row: Row, num_slots: int) -> dict[str, Any]:
    """The kernels of a run by time; busy: their time / that of the run, so that the rest is waiting."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = bench.device.type == "cuda"
    refiner, latents = bench.refiner(row).replaced(num_slots=num_slots), bench.latents(row, 4 * num_slots)
    refiner.refine(latents)
    seconds, result = timed(lambda: refiner.refine(latents), bench.device)
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        refiner.refine(latents)
        if cuda:
            torch.cuda.synchronize(bench.device)
    taken = "self_device_time_total" if cuda else "self_cpu_time_total"
    known = sorted(((e.key, e.count, getattr(e, taken)) for e in seen.key_averages()), key=lambda known: -known[2])
    known = [(key, count, us) for key, count, us in known if us > 0]
    own = [entry for entry in known if any(name in entry[0] for name in OURS)]
    total, steps = sum(us for *_, us in known), max(result.report.get("iterations") or 1, 1)
    found = {
        "seconds": seconds, "steps": steps, "ms_per_step": 1e3 * seconds / steps, "busy": total / 1e6 / seconds,
        "kernels_per_step": sum(count for _, count, _ in known) / steps,
        "share_of_our_kernels": sum(us for *_, us in own) / total,
        "by_time": [
            {"kernel": key[:120], "calls_per_step": count / steps, "us_per_call": us / count, "share": us / total}
            for key, count, us in dict.fromkeys([*known[:LISTED], *own])
        ],
    }  # fmt: skip
    for _, count, us in [entry for entry in own if "refine_apply" in entry[0]][:1]:
        # read activation and gradient, write activation, in float32: what no version can avoid
        least = 3 * 4 * num_slots * result.activations[0].numel()
        found["refine_apply_least_bytes_per_second"] = least / (us / count * 1e-6)
        found["copy_bytes_per_second"] = copy_bandwidth(bench.device, 1024 if cuda else 16)
    return found


def drivers(bench: Bench, row: Row, num_slots: int) -> dict[str, Any]:
    """Milliseconds per step with each driver: what launching from Python costs, and what the device loop saves."""
    found: dict[str, Any] = {}
    for driver in ("host", "graph", "loop") if bench.device.type == "cuda" else ("host",):
        try:
            made = bench.refiner(replace(row, driver=driver, stop="none")).replaced(num_slots=num_slots)
            seconds = {}
            for steps in (FEW, 5 * FEW):  # the difference of two runs leaves filling and rendering out
                refiner = made.replaced(max_steps=steps)
                refiner.refine(latents := bench.latents(row, num_slots))
                seconds[steps] = min(timed(lambda: refiner.refine(latents), bench.device)[0] for _ in range(3))  # noqa: B023
            found[driver] = 1e3 * (seconds[5 * FEW] - seconds[FEW]) / (4 * FEW)
        except Exception as error:  # a driver that cannot run is a finding
            found[driver] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def captured(bench: Bench, row: Row, num_slots: int) -> Any:
    """Nodes of each graph that a run with driver="graph" captures, by type."""
    if bench.device.type != "cuda":
        return "no GPU, so nothing is captured"
    from fastrefine.engine import drivers as engine_drivers

    runtime: Any = engine_drivers.CudaRuntime
    capture, graphs = runtime.capture, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        graphs.append(capture(*args, **kwargs))
        return graphs[-1]

    runtime.capture = recorded
    try:
        refiner = bench.refiner(replace(row, driver="graph")).replaced(num_slots=num_slots)
        refiner.refine(bench.latents(row, num_slots))
    finally:
        runtime.capture = capture
    return [census(graph) for graph in graphs]


def table(found: dict[str, Any]) -> str:
    """What ``profile`` found as Markdown."""
    lines = [f"Profile of {found['label']}, {found['num_slots']} slots", ""]
    if "by_time" in (seen := found.get("kernels", {})):
        lines += [
            f"{seen['ms_per_step']:.3f} ms a step, {seen['kernels_per_step']:.0f} kernels a step, busy {seen['busy']:.0%}, of "
            f"which the step's own kernels {seen['share_of_our_kernels']:.1%}",
            "", "| share | us a call | calls a step | kernel |", "|---|---|---|---|",
        ]  # fmt: skip
        for line in seen["by_time"]:
            share, us, calls = line["share"], line["us_per_call"], line["calls_per_step"]
            lines.append(f"| {share:.1%} | {us:.1f} | {calls:.2f} | `{line['kernel']}` |")
        if "copy_bytes_per_second" in seen:
            rate, copy = seen["refine_apply_least_bytes_per_second"], seen["copy_bytes_per_second"]
            lines += ["", f"refine_apply: {rate / 1e9:.4g} GB/s of the bytes it cannot avoid; a copy: {copy / 1e9:.4g} GB/s"]
    lines += ["", f"ms a step by driver: {found.get('drivers')}", f"nodes of the captured graphs: {found.get('census')}"]
    return "\n".join(lines)
