"""How a row is measured, on a CPU and on a GPU alike: both sides prepared, compared, then timed in turn."""

from __future__ import annotations

import gc
import heapq
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks import rows
from benchmarks.baselines import CompiledLoop, ExpertLoop, PeersLoop, Refined
from benchmarks.machine import DTYPES, arithmetic, matmul_peak, timed
from benchmarks.rows import Row, Scale
from benchmarks.workloads import WORKLOADS

FEW = 4  # steps of the runs that choose a size, and of the comparison when trajectories are chaotic
# Median over samples of |difference| / |distance that refinement moved the image|, above which a row is wrong. Chaotic
# single samples do not count; images of 16 bits and TF32 products are coarse where little moved.
WRONG = {"float32": 0.05, "tf32": 0.25, "bfloat16": 1.0, "float16": 0.5}


class WrongResults(AssertionError):
    """A rival and ours do not compute the same."""


class Rival(NamedTuple):
    """A run of ``images`` samples in a precision; batch: the baseline's, or slots where the rival is ours."""

    run: Callable[[], Any]
    images: int
    precision: str
    batch: int


class Budget:
    """Seconds of the whole command: whether one more row, one more torch.compile, still fits."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter):
        self.seconds, self.clock, self.started = seconds, clock, clock()
        self.longest_row, self.longest_compilation, self.compiling = 15.0, 40.0, 0.0  # guesses before the first

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.seconds - (self.clock() - self.started)

    def has_room_for_a_row(self) -> bool:
        """Whether a row as long as the longest so far would end within the budget."""
        return self.left >= self.longest_row

    def may_compile(self) -> bool:
        """Whether B2 fits and its row still ends within the budget; B2 gets at most half of all seconds."""
        each = self.longest_compilation
        return self.left >= 1.25 * each + self.longest_row and self.compiling + each <= self.seconds / 2

    def compiled(self, seconds: float) -> None:
        """A torch.compile took so long."""
        self.longest_compilation = seconds if not self.compiling else max(self.longest_compilation, seconds)
        self.compiling += seconds


class Bench:
    """The networks, loops, sizes and peaks that rows share, by what they depend on."""

    def __init__(self, device: torch.device, scale: Scale, budget: Budget, compile_ours: bool = False):
        self.device, self.scale, self.budget, self.compile_ours = device, scale, budget, compile_ours
        self.known: dict[Any, Any] = {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of ``key``, made at its first use."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def forget_loops(self, row: Row) -> None:
        """Free the compiled loops of other networks and precisions."""
        others = [key for key in self.known if key[0] == "b2" and key[1:4] != (row.workload, row.cut, row.precision)]
        for key in others:
            del self.known[key]
        if others:
            torch.compiler.reset()  # or torch counts the next loop's compilation as one more of the same function
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pair(self, row: Row) -> tuple[nn.Module, nn.Module]:
        return self.kept(("pair", row.workload), lambda: WORKLOADS[row.workload].pair(device=self.device))

    def latents(self, row: Row, n: int) -> Tensor:
        """The first n of the workload's latents."""
        key = ("latents", row.workload)
        if len(self.known.get(key, ())) < n:
            drawn = fr.Normal(WORKLOADS[row.workload].latent).sample(torch.arange(n), 0, torch.float32)
            self.known[key] = drawn.to(self.device)
        return self.known[key][:n]

    def peak(self, precision: str) -> float:
        """FLOP/s that a matrix product reaches here."""
        return self.kept(("peak", precision), lambda: matmul_peak(precision, self.device, self.scale.peak_size))

    def refiner(self, row: Row) -> fr.Refiner:
        """Ours for this row, prepared once; results stay on the device, as the baselines' do."""
        workload, steps = WORKLOADS[row.workload], self.scale.steps
        size = workload.step_size
        sampler: Any = {
            "collaborative": lambda: fr.Collaborative(size, control="fixed"), "backtracking": lambda: fr.Collaborative(size),
            "dgflow": lambda: fr.DGflow(size), "dot": lambda: fr.DOT(size), "ddls": lambda: fr.DDLS(size),
            "mala": lambda: fr.MALA(size), "hmc": lambda: fr.HMC(size, leapfrog=math.gcd(10, steps)),
        }[row.sampler]()  # fmt: skip
        stop = {"none": lambda: None, "median": lambda: self.threshold(row), "uniform": fr.stopping.UniformStep}[row.stop]()
        return fr.Refiner(
            *self.pair(row), sampler, at=row.module, max_steps=steps, driver=row.driver, precision=row.precision, stop=stop,
            device=self.device, output_device=self.device, prior=fr.Normal(workload.latent),
            compile=self.compile_ours,
        )  # fmt: skip

    def loop(self, kind: type, row: Row, batch: int, steps: int | None = None, **own: Any) -> Any:
        """A baseline for this row."""
        workload = WORKLOADS[row.workload]
        if kind is not PeersLoop:
            own |= {"precision": DTYPES[row.precision], "channels_last": workload.channels_last}
        return kind(*self.pair(row), row.module, workload.step_size, self.scale.steps if steps is None else steps, batch, **own)

    def threshold(self, row: Row) -> float:
        """Of the median stop: the median logit of a pilot's samples after half of the steps, found by B1 in float32.

        The networks are untrained, so real images would say nothing; with this the mean is about half of the steps.
        """

        def pilot() -> float:
            loop = self.loop(ExpertLoop, replace(row, precision="float32"), self.scale.checked, self.scale.steps // 2)
            with arithmetic("float32"):
                return float(loop(self.latents(row, 4 * self.scale.checked)).logits.median())

        return self.kept(("threshold", row.workload, row.cut), pilot)

    def stop(self, row: Row, n: int) -> dict[str, Any]:
        """The row's stop as the baselines take it, for the first n latents."""
        if row.stop == "uniform":
            return {"last_step": fr.stopping.UniformStep().draw(torch.arange(n), 0, self.scale.steps)[1]}
        return {"threshold": self.threshold(row)} if row.stop == "median" else {}

    def slots(self, row: Row, refiner: fr.Refiner) -> tuple[int, float]:
        """(the row's slots or those with the least time per sample of a short run, seconds of one of their steps)."""

        def few(size: int) -> float:
            run = partial(refiner.replaced(num_slots=size, max_steps=FEW).refine, self.latents(row, 2 * size))
            if run().report["num_slots"] != size:  # the engine goes on with fewer
                raise torch.cuda.OutOfMemoryError
            return timed(run, self.device)[0] / (2 * (FEW + 1))

        def choose() -> tuple[int, float]:
            costs = self._try(few, (row.num_slots,) if row.num_slots else self.scale.sized(row)[0])
            return min(costs.items(), key=lambda item: item[1] / item[0])

        return self.kept(("slots", replace(row, stop="none")), choose)

    def batch(self, kind: type, row: Row, precision: str) -> int:
        """The baseline's batch with the least time per sample: a few steps without a stop, the whole way with one.

        Of batches that are within 2 % of the best the smallest, whose rounds are shortest.
        """
        stop = row.stop if kind is not PeersLoop else "none"

        def few(batch: int) -> float:
            given = self.stop(row, batch) if stop != "none" else {}
            run = partial(self.loop(kind, row, batch, None if given else FEW), self.latents(row, batch), **given)
            run()
            return timed(run, self.device)[0] / batch

        def choose() -> int:
            costs = self._try(few, self.scale.sized(row)[1])
            return min(batch for batch, each in costs.items() if each <= 1.02 * min(costs.values()))

        return self.kept(("batch", kind, row.workload, row.cut, precision, stop), choose)

    def _try(self, cost: Callable[[int], float], sizes: tuple[int, ...]) -> dict[int, float]:
        """The cost of every size that fits the memory."""
        found: dict[int, float] = {}
        for size in sizes:
            try:
                found[size] = cost(size)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
        if not found:
            raise RuntimeError(f"out of memory with {sizes[0]} samples")
        return found

    def check(self, row: Row, loop: Any, ours: fr.Result, theirs: Refined) -> dict[str, Any]:
        """How far ours lie from a baseline's results; WrongResults where they differ after FEW steps already.

        Whole trajectories may be chaotic: rounding grows. Then a few steps, without the stop, tell right from wrong.
        """
        with torch.no_grad(), arithmetic("float32"):
            start = self.pair(row)[0](self.latents(row, len(theirs.images)))
        facts = compare(ours, theirs, start)
        if agrees(row, facts):
            return facts
        refiner, steps = self.refiner(replace(row, stop="none")), loop.max_steps
        refiner = refiner.replaced(max_steps=FEW, num_slots=ours.report["num_slots"])
        loop.max_steps = FEW
        try:
            z = self.latents(row, loop.batch)
            short = compare(refiner.refine(z), Refined(*(t[: len(start)] for t in loop(z))), start[: len(z)])
        finally:
            loop.max_steps = steps
        if not agrees(row, short):
            raise WrongResults(f"ours and a baseline differ: {facts}, after {FEW} steps {short}")
        return {**facts, "chaotic": True, f"after_{FEW}_steps": short}


def compare(ours: fr.Result, theirs: Refined, start: Tensor) -> dict[str, Any]:
    """Differences of images, logits and steps; of images also in parts of what refinement moved them from ``start``."""
    n = len(theirs.images)
    wanted, found = theirs.images.float().flatten(1), ours.images[:n].float().flatten(1)
    moved = (wanted - start[:n].float().flatten(1)).norm(dim=1)
    apart = (found - wanted).norm(dim=1)
    steps = (ours.steps[:n].to(wanted.device).long() - theirs.steps.long()).abs() <= 1
    both = steps & (theirs.steps > 0)
    return {
        "distance_median": float(apart.median()) / wanted.shape[1] ** 0.5,  # root mean square over an image
        "deviation_max": float((found - wanted).abs().max()),
        "deviation_median": float((apart[both] / moved[both].clamp(min=1e-12)).median()) if bool(both.any()) else 0.0,
        "logit_deviation_max": float((ours.logits[:n].to(wanted.device) - theirs.logits).abs().max()),
        "steps_equal": float(steps.double().mean()),
    }


def agrees(row: Row, facts: dict[str, Any]) -> bool:
    """Whether rounding explains the differences of ``compare``."""
    # images of 16 bits are rounded to 2^-8: no disagreement where refinement moved less
    coarse = DTYPES[row.precision].itemsize == 2 and facts["distance_median"] <= 2**-7
    return (facts["deviation_median"] <= WRONG[row.precision] or coarse) and facts["steps_equal"] >= 0.5


class Measurement:
    """One row, prepared, compared and warmed up when it is made; then ``race``, then ``facts``."""

    def __init__(self, bench: Bench, row: Row):
        self.bench, self.row, self.scale, self.device = bench, row, bench.scale, bench.device
        self.started = time.perf_counter()
        self.missing: dict[str, str] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.rivals: dict[str, Rival] = {}
        bench.forget_loops(row)
        refiner = bench.refiner(row)
        self.num_slots, step_seconds = bench.slots(row, refiner)
        refiner = refiner.replaced(num_slots=self.num_slots)
        self.first = refiner.refine(bench.latents(row, 2 * self.num_slots))  # what is compared, and tells the rate
        rate = self.num_slots / (step_seconds * (float(self.first.steps.double().mean()) + 1))
        self.n = rows.samples(row, self.scale, self.num_slots, rate)
        self._prepare_rivals()
        self.refiner, self.memory = self._warmed_up(row)
        self.own_seconds: list[float] = []
        self.seconds: dict[str, list[float]] = {name: [] for name in self.rivals}
        self.result: Any = None

    def _warmed_up(self, row: Row) -> tuple[fr.Refiner, float | None]:
        """(a fresh refiner that has refined what is timed once, peak memory in MB of making and running it).

        Fresh, for memory that a capture used and freed counts while it is made only. The very latents that are timed: the
        size of the engine's windows, and so what is captured, depends on their number.
        """
        before, cuda = 0, self.device.type == "cuda"
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)  # of the rivals
        refiner = self.bench.refiner(row).replaced(num_slots=self.num_slots)
        refiner.refine(self.bench.latents(row, self.n))
        return refiner, (torch.cuda.max_memory_allocated(self.device) - before) / 2**20 if cuda else None

    def _prepare_rivals(self) -> None:
        bench, row = self.bench, self.row
        few = min(self.scale.checked, len(self.first))
        for name in row.rivals:
            if name == "b1":
                self._prepare_loop(name, ExpertLoop, row.precision, few)
            elif name == "b0":  # float32 with the row's own TF32 setting
                self._prepare_loop(name, PeersLoop, "tf32" if row.precision == "tf32" else "float32", few)
            elif name == "b2":
                self._prepare_compiled(few)
            else:
                other = replace(row, stop="none") if name == "fixed" else replace(row, driver="graph")
                refiner, _ = self._warmed_up(other)
                run = partial(refiner.refine, bench.latents(row, self.n))
                self.rivals[name] = Rival(run, self.n, row.precision, self.num_slots)
        if row.sampler != "collaborative":
            self.missing = dict.fromkeys(("b0", "b1", "b2"), "the baselines are written for Collaborative(control='fixed')")

    def _prepare_loop(self, name: str, kind: type, precision: str, few: int) -> None:
        bench, row = self.bench, self.row
        with arithmetic(precision):
            batch = bench.batch(kind, row, precision)
            loop, stop = bench.loop(kind, row, few), self._stop(name, few)
            if name == "b1" or row.stop == "none":  # B0 knows no stop: there is nothing to compare
                self.checks[name] = bench.check(row, loop, self.first, loop(bench.latents(row, few), **stop))
            self._add(name, bench.loop(kind, row, batch), batch, precision)

    def _prepare_compiled(self, few: int) -> None:
        """B2 in B1's batch, for each compilation takes a minute; its failure is a reason, not the row's."""
        bench, row = self.bench, self.row
        if not self.scale.compile:
            self.missing["b2"] = "torch.compile was not asked for"
            return
        batch = bench.batch(ExpertLoop, row, row.precision)
        key = ("b2", row.workload, row.cut, row.precision, batch)
        done = (*key, "stop" if row.stop != "none" else "fixed")
        if done not in bench.known and not bench.budget.may_compile():
            self.missing["b2"] = "not run: budget (B2 compiles for the most important rows first)"
            return
        try:
            loop = bench.kept(key, lambda: bench.loop(CompiledLoop, row, batch, mode=self.scale.compile_mode))
            z, stop = bench.latents(row, batch), self._stop("b2", batch)
            with arithmetic(row.precision):
                if done not in bench.known:
                    began = time.perf_counter()
                    loop(z, **stop)
                    bench.budget.compiled(time.perf_counter() - began)
                    bench.known[done] = True
                part = Refined(*(t[: min(few, batch)] for t in loop(z, **stop)))
                self.checks["b2"] = bench.check(row, loop, self.first, part)
                self._add("b2", loop, batch, row.precision)
        except WrongResults as error:
            self.missing["b2"] = f"B2 computes something else: {error}"
        except Exception as error:  # torch.compile may fail in any way: the row says how
            self.missing["b2"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def _stop(self, name: str, n: int) -> dict[str, Any]:
        return {} if name == "b0" else self.bench.stop(self.row, n)

    def _add(self, name: str, loop: Any, batch: int, precision: str) -> None:
        """Time one batch, and take as many as fill the time; with a stop at least four, for batches differ."""
        bench, row = self.bench, self.row

        def run(n: int) -> Callable[[], Any]:
            return partial(loop, bench.latents(row, n), **self._stop(name, n))

        least = 1 if row.stop == "none" or name == "b0" else 4
        seconds, _ = timed(run(batch), bench.device)
        count = 1 if self.scale.exactly else max(least, min(16, round(self.scale.rival_seconds / max(seconds, 1e-3))))
        self.rivals[name] = Rival(run(count * batch), count * batch, precision, batch)

    def race_rivals(self) -> None:
        """One run of every rival."""
        for name, rival in self.rivals.items():
            with arithmetic(rival.precision):
                self.seconds[name].append(timed(rival.run, self.device)[0])

    def race(self) -> None:
        """The rivals and ours in turn, round by round, so that what disturbs one disturbs all; fewer rounds if time is up."""
        began = time.perf_counter()
        for done in range(self.scale.rounds):
            expected = (time.perf_counter() - began) * (done + 1) / max(done, 1)
            if done and expected > min(self.scale.race_seconds, self.bench.budget.left):
                break
            self.race_rivals()
            self.result = None  # or two rounds' results lie on the device at once
            seconds, self.result = timed(self.run, self.device)
            self.own_seconds.append(seconds)

    def run(self) -> fr.Result:
        """Ours, once."""
        return self.refiner.refine(self.bench.latents(self.row, self.n))

    def facts(self) -> dict[str, Any]:
        """The row as it is written."""
        row, result, work = self.row, self.result, rows.work(self.row.workload, self.row.cut)
        rate = self.n / statistics.median(self.own_seconds)
        steps, report = result.steps.double().mean().item(), result.report
        # with fixed steps the last evaluation is forward only
        flops = steps * work.evaluation + (work.forward if row.stop == "none" else work.evaluation)
        found: dict[str, Any] = {
            **row.facts(), "num_slots": self.num_slots, "K": self.scale.steps, "n": self.n, "images_per_second": rate,
            "refine_steps_per_second": rate * steps, **{f"ratio_{name}": self.ratio(name) for name in ("b0", "b1", "b2")},
            "floor_fraction": flops * rate / self.bench.peak(row.precision), "mean_steps": steps,
            "slot_efficiency": report["slot_efficiency"], "greedy_bound": greedy_bound(result.steps, self.num_slots),
            "host_syncs_per_step": report.get("host_syncs_per_step"), "peak_memory_mb": self.memory,
            "stop_threshold": self.bench.threshold(row) if row.stop == "median" else None,
            "stopped_at_once": float((result.steps == 0).double().mean()),
            "ran_all_steps": float((result.steps == self.scale.steps).double().mean()),
            "flops_per_evaluation": work.evaluation, "seconds": self.own_seconds,
            "copy_images_to_cpu_seconds": timed(lambda: result.images.cpu(), self.device)[0],
            "missing": self.missing, "checks": self.checks, "compile": self.bench.compile_ours,
            **{key: report.get(key) for key in ("backend", "route", "split", "fold", "channels_last", "iterations")},
        }  # fmt: skip
        found["driver"] = report.get("driver", row.driver)
        for name, rival in self.rivals.items():
            found |= {f"{name}_batch": rival.batch, f"{name}_images": rival.images, f"{name}_precision": rival.precision}
            found |= {f"{name}_seconds": self.seconds[name], f"ratio_{name}": self.ratio(name)}
        if row.stop != "none":
            found |= {"gain": found.pop("ratio_fixed"), "ideal_gain": (self.scale.steps + 1) / (steps + 1)}
        return found | {"row_seconds": time.perf_counter() - self.started}

    def ratio(self, name: str) -> float | None:
        """Median over rounds of ours' images per second / theirs in the same round."""
        if name not in self.rivals:
            return None
        images = self.rivals[name].images
        return statistics.median(
            (self.n / own) / (images / theirs) for own, theirs in zip(self.own_seconds, self.seconds[name], strict=True)
        )


def measure(bench: Bench, row: Row) -> dict[str, Any]:
    """The row as it is written; raises where ours does not run or computes something else."""
    before = bench.budget.compiling
    found = Measurement(bench, row)
    found.race()
    facts = found.facts()
    seconds = facts["row_seconds"] - (bench.budget.compiling - before)
    bench.budget.longest_row = max(seconds, bench.budget.longest_row)
    return facts


def greedy_bound(steps: Tensor, num_slots: int) -> float:
    """Slot efficiency of list scheduling: each sample (steps + 1 evaluations), in order, to the slot that is free first."""
    free = [0] * num_slots
    for step in steps.tolist():
        heapq.heapreplace(free, free[0] + step + 1)
    longest = max(free)
    return (int(steps.long().sum()) + len(steps)) / (num_slots * longest) if longest else 1.0
