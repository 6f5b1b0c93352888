"""How things are timed: rivals and ours in turn, round by round, so that what disturbs one disturbs all."""

from __future__ import annotations

import heapq
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrefine as fr

Run = Callable[[], Any]


class Race:
    """One benchmark: ``best_sizes`` for each runner, ``run`` them in turn, ``record`` what came out."""

    def __init__(self, benchmark: Any, timer: Callable[[], float], sizes: Sequence[int], command: str):
        self.benchmark, self.timer, self.sizes, self.command = benchmark, timer, sizes, command

    def best_sizes(self, make: Callable[[int], Run]) -> list[int]:
        """The batches of ``sizes`` with the least time per sample, the best first, within a tenth of it.

        ``make(size)`` runs that many samples for a few steps; where short runs cannot tell, ``run`` races several.
        """
        runs = {size: make(size) for size in self.sizes}
        best = dict.fromkeys(runs, float("inf"))
        for round in range(4):
            for size, run in runs.items():
                seconds = self._time(run) / size
                if round:  # the first warms up
                    best[size] = min(best[size], seconds)
        return [size for size in sorted(best, key=best.__getitem__) if best[size] <= 1.1 * min(best.values())]

    def run(self, ours: Run, rivals: Mapping[str, Mapping[int, Run]], rounds: int) -> dict[str, Any]:
        """For each rival the median over rounds of its time / our time in the same round, at its best batch; which; all times.

        rivals: by name, then by batch. All have run before: the caller has compared their results. {} where benchmarks
        are disabled.
        """
        entries = {(name, batch): run for name, by_batch in rivals.items() for batch, run in by_batch.items()}
        times: dict[tuple[str, int], list[float]] = {key: [] for key in entries}

        def rivals_first() -> None:
            for key, rival in entries.items():
                times[key].append(self._time(rival))

        self.benchmark.pedantic(ours, setup=rivals_first, rounds=rounds)
        if self.benchmark.disabled:
            return {}
        own = self.benchmark.stats.stats.data
        ratios = {key: statistics.median(t / o for t, o in zip(times[key], own, strict=True)) for key in entries}
        best = {name: min((ratios[name, batch], batch) for batch in by_batch)[1] for name, by_batch in rivals.items()}
        return {
            **{name: ratios[name, batch] for name, batch in best.items()},
            **{f"{name}_batch": batch for name, batch in best.items()},
            "rival_seconds": {f"{name} {batch}": seconds for (name, batch), seconds in times.items()},
        }

    def record(self, result: fr.Result, max_steps: int, **facts: Any) -> None:
        """``extra_info``: the speed and shape of ``result`` and whatever else is a fact of this row."""
        evaluated = result.steps.long() + 1
        info = {
            "K": max_steps,
            "n": len(result),
            "mean_steps": result.steps.double().mean().item(),
            "slot_efficiency": result.report["slot_efficiency"],
            "greedy_bound": greedy_bound(result.steps, result.report["num_slots"]),
            "num_slots": result.report["num_slots"],
            "precision": result.report["precision"],
            "backend": result.report["backend"],
            "route": result.report["route"],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu_model": cpu_model(),
            "command": self.command,
            **facts,
        }
        if not self.benchmark.disabled:
            seconds = self.benchmark.stats.stats.median
            info["images_per_second"] = len(result) / seconds
            info["refine_steps_per_second"] = float(evaluated.sum() - len(result)) / seconds
        self.benchmark.extra_info.update(info)

    def _time(self, run: Run) -> float:
        started = self.timer()
        run()
        return self.timer() - started


def greedy_bound(steps: Tensor, num_slots: int) -> float:
    """Slot efficiency of list scheduling: each sample (steps + 1 evaluations), in order, to the slot that is free first."""
    free = [0] * num_slots
    for step in steps.tolist():
        heapq.heapreplace(free, free[0] + step + 1)
    longest = max(free)
    return (int(steps.long().sum()) + len(steps)) / (num_slots * longest) if longest else 1.0


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
