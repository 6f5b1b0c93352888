"""How one row is measured: both sides prepared and compared, then timed in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_rows
from benchmarks.baselines import CompiledLoop, ExpertLoop, PeersLoop, Refined
from benchmarks.gpu_machine import arithmetic, synchronize, timed
from benchmarks.gpu_rows import Row
from benchmarks.gpu_sides import Bench, WrongResults
from benchmarks.measure import greedy_bound

MACHINE_KEYS = ("commit", "torch", "triton", "cuda", "gpu")


def measure(bench: Bench, row: Row, command: str, machine: dict[str, Any]) -> dict[str, Any]:
    """All keys of a row of the results; raises where ours does not run or computes something else."""
    bench.forget_loops(row)
    found = Measurement(bench, row)
    synchronize(bench.device)
    return {**row.facts(), **found.facts(), "command": command, **{k: machine[k] for k in MACHINE_KEYS}}


class Measurement:
    """One row: prepared, compared, warmed up and timed in the constructor's order; ``facts`` says what came out."""

    def __init__(self, bench: Bench, row: Row):
        self.bench, self.row, self.scale = bench, row, bench.scale
        self.started, self.missing = time.perf_counter(), {}
        self.work = gpu_rows.work(*row.pair_key)
        self._prepare_ours()
        self.rivals: dict[str, tuple[Callable[[], Any], int, str]] = {}  # name -> (run, images of a run, precision)
        self.batches: dict[str, int] = {}
        self.checks: dict[str, dict[str, float]] = {}
        if row.sampler == "collaborative":
            self._prepare_rivals()
        else:
            reason = "the baselines are written for Collaborative(control='fixed')"
            self.missing = dict.fromkeys(("b0", "b1", "b2"), reason)
        self._warm_up()
        self._race()

    def _prepare_ours(self) -> None:
        """Choose slots; refine 2 x slots once, which tells the rate and is what is compared."""
        bench, row = self.bench, self.row
        refiner = bench.refiner(row)
        self.num_slots, step_seconds = bench.best_slots(row, refiner)
        refiner.num_slots = self.num_slots
        self.checked = first = refiner.refine(bench.latents(row, 2 * self.num_slots))
        evaluations = float(first.steps.double().mean()) + 1
        rate = self.num_slots / (step_seconds * evaluations)
        self.n = self.scale.samples or gpu_rows.samples(row, self.num_slots, rate)
        self.latents = bench.latents(row, self.n)

    def _warm_up(self) -> None:
        """Prepare anew and refine what is timed once untimed, recording the peak memory of both.

        Anew, for memory that a capture used and freed counts while it is made only. The engine's machine (windows, pool)
        depends on the number of blocks and on max_steps: a shorter run makes and captures another one, and round 1 would pay
        for that of the timed run.
        """
        device, before = self.bench.device, 0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)  # of the rivals
        self.refiner = self.bench.refiner(self.row)
        self.refiner.num_slots = self.num_slots
        self.refiner.refine(self.latents)
        self.memory = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None

    def _prepare_rivals(self) -> None:
        bench, row = self.bench, self.row
        few = min(self.scale.checked, len(self.checked))
        start, z = bench.start(row, few), bench.latents(row, few)
        with arithmetic(row.precision):
            loop = bench.loop(ExpertLoop, row, few)
            self.checks["b1"] = bench.check(row, loop, self.checked, loop(z, **bench.stop(row, few)), start)
            batch = bench.best_batch(ExpertLoop, row, row.precision)
            self._add("b1", bench.loop(ExpertLoop, row, batch), batch, row.precision)
        if row.stop == "none":
            for precision in gpu_rows.b0_precisions(row):
                name = "b0" if precision == gpu_rows.b0_precisions(row)[0] else f"b0_{precision}"
                with arithmetic(precision):
                    size = bench.best_batch(PeersLoop, row, precision)
                    loop = bench.loop(PeersLoop, row, few)
                    self.checks[name] = bench.check(row, loop, self.checked, loop(z), start)
                    self._add(name, bench.loop(PeersLoop, row, size), size, precision)
        self._prepare_b2(batch, start)

    def _prepare_b2(self, batch: int, start: Tensor) -> None:
        """Compiled at B1's best batch, while half of the budget lasts; its failure is a reason, not the row's."""
        bench, row = self.bench, self.row
        if not bench.with_b2:
            self.missing["b2"] = "--no-b2"
            return
        key = ("b2", row.pair_key, row.precision, batch)
        stop = bench.stop(row, batch)
        done = (*key, bool(stop))
        rest = bench.budget.forecast(row, self.scale.repetitions)  # without it the row still ends within the budget
        if done not in bench._kept and not bench.budget.may_compile(rest):
            self.missing["b2"] = "not run: budget (B2 compiles for the most important rows first)"
            return
        try:
            loop = bench.kept(key, lambda: bench.loop(CompiledLoop, row, batch, mode=self.scale.b2_mode))
            with arithmetic(row.precision):
                whole = bench.latents(row, batch)
                if done not in bench._kept:
                    with bench.budget.compilation():
                        loop(whole, **stop)
                    bench._kept[done] = True
                part = loop(whole, **stop)
                few = min(len(start), batch)
                part = Refined(*(t[:few] for t in part))
                self.checks["b2"] = bench.check(row, loop, self.checked, part, start[:few])
                self._add("b2", loop, batch, row.precision)
        except WrongResults as error:
            self.missing["b2"] = f"B2 computes something else: {error}"
        except Exception as error:  # torch.compile may fail in any way: the row says how
            self.missing["b2"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def _add(self, name: str, loop: Any, batch: int, precision: str) -> None:
        """Time one batch, and take as many as make about half a second; with a stop at least four, for batches differ."""
        bench, row = self.bench, self.row
        run = partial(loop, bench.latents(row, batch), **bench.stop(row, batch))
        seconds, _ = timed(run, bench.device)
        count = max(1 if row.stop == "none" else 4, min(16, round(0.5 / max(seconds, 1e-3))))
        n = batch * (1 if self.scale.samples else count)
        self.rivals[name] = partial(loop, bench.latents(row, n), **bench.stop(row, n)), n, precision
        self.batches[name] = batch

    def _race(self) -> None:
        """Ours and the rivals in turn, round by round; fewer rounds where the row takes much longer than expected."""
        bench, device = self.bench, self.bench.device
        self.own_seconds: list[float] = []
        self.seconds: dict[str, list[float]] = {name: [] for name in self.rivals}
        limit = min(max(2 * gpu_rows.expected_seconds(self.row, self.scale.repetitions), 30.0), max(bench.budget.left, 0.0))
        began = time.perf_counter()
        self.result: Any = None
        for done in range(self.scale.repetitions):
            if done and (time.perf_counter() - began) * (done + 1) / done > limit:
                break
            for name, (run, _, precision) in self.rivals.items():
                with arithmetic(precision):
                    self.seconds[name].append(timed(run, device)[0])
            self.result = None  # or two rounds' results lie on the device at once
            seconds, self.result = timed(lambda: self.refiner.refine(self.latents), device)
            self.own_seconds.append(seconds)
        self.transfer, _ = timed(lambda: self.result.images.cpu(), device)

    def facts(self) -> dict[str, Any]:
        """What was measured, without the row's own keys and the machine's."""
        row, result, work = self.row, self.result, self.work
        rate = self.n / statistics.median(self.own_seconds)
        steps = result.steps.double().mean().item()
        # with fixed steps the last evaluation is forward only
        flops = steps * work.evaluation + (work.forward if row.stop == "none" else work.evaluation)
        report = result.report
        syncs, iterations = report.get("host_syncs_per_step"), report.get("iterations")
        found: dict[str, Any] = {
            "num_slots": self.num_slots, "images_per_second": rate, "refine_steps_per_second": rate * steps,
            **{f"ratio_{name}": self._ratio(name) for name in ("b0", "b1", "b2")},
            "floor_fraction": flops * rate / self.bench.peak(row.precision),
            "slot_efficiency": report["slot_efficiency"],
            "greedy_bound": greedy_bound(result.steps, self.num_slots), "mean_steps": steps,
            "host_syncs_per_step": syncs, "peak_memory_mb": self.memory, "K": self.scale.steps, "n": self.n,
            "stop_threshold": self.bench.threshold(row) if row.stop == "median" else None,
            "stopped_at_once": float((result.steps == 0).double().mean()),
            "ran_all_steps": float((result.steps == self.scale.steps).double().mean()),
            "flops_per_evaluation": work.evaluation, "repetitions": len(self.own_seconds), "seconds": self.own_seconds,
            "copy_images_to_cpu_seconds": self.transfer, "iterations": iterations, "missing": self.missing,
            "checks": self.checks, "compile": self.bench.compile_ours,
            **{key: report.get(key) for key in ("backend", "route", "split", "fold", "channels_last")},
        }  # fmt: skip
        for name, (_, images, precision) in self.rivals.items():
            found |= {f"{name}_batch": self.batches[name], f"{name}_images": images, f"{name}_precision": precision}
            found |= {f"{name}_seconds": self.seconds[name], f"ratio_{name}": self._ratio(name)}
        found |= self._against_fixed_steps(rate, steps)
        return found | {"row_seconds": time.perf_counter() - self.started}

    def _ratio(self, name: str) -> float | None:
        """Median over rounds of ours' images per second / theirs."""
        if name not in self.rivals:
            return None
        images = self.rivals[name][1]
        return statistics.median(
            (self.n / own) / (images / theirs) for own, theirs in zip(self.own_seconds, self.seconds[name], strict=True)
        )

    def _against_fixed_steps(self, rate: float, steps: float) -> dict[str, Any]:
        """Rows with a stop take the rates of B0 and of ours without it from the row that timed them in this run."""
        row, rates = self.row, self.bench._kept
        keys = {
            "fixed": ("rate", row.pair_key, row.precision, row.driver, row.sampler, self.bench.compile_ours),
            "b0": ("rate b0", row.pair_key, gpu_rows.b0_precisions(row)[0]),
        }
        if row.stop == "none":
            rates[keys["fixed"]] = rate
            if "b0" in self.rivals:
                rates[keys["b0"]] = self.rivals["b0"][1] / statistics.median(self.seconds["b0"])
            return {}
        found: dict[str, Any] = {"ideal_gain": (self.scale.steps + 1) / (steps + 1), "gain": None}
        if keys["fixed"] in rates:
            found["gain"] = rate / rates[keys["fixed"]]
        else:
            self.missing["gain"] = "the same row without a stop was not measured in this run"
        if row.sampler == "collaborative":
            if keys["b0"] in rates:
                found |= {"ratio_b0": rate / rates[keys["b0"]], "b0_from": "the row without a stop, same run"}
            else:
                self.missing["b0"] = "the same row without a stop was not measured in this run"
        return found
