"""Both sides of a row: networks, loops, latents and stops; their best sizes; whether their results agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks import gpu_rows
from benchmarks.baselines import ExpertLoop, PeersLoop, Refined
from benchmarks.gpu_machine import DTYPES, arithmetic, matmul_peak, timed
from benchmarks.gpu_rows import Budget, Row
from benchmarks.workloads import WORKLOADS

FEW = 4  # steps of the runs that choose a size
CHECKED = 64  # samples whose results are compared
# Median over samples of |difference| / |distance that refinement moved the image|, above which a row is wrong. Chaotic
# single samples do not count; images of 16 bits and TF32 products are coarse where little moved.
WRONG = {"float32": 0.05, "tf32": 0.25, "bfloat16": 1.0, "float16": 0.5}


class WrongResults(AssertionError):
    """A rival and ours do not compute the same."""


@dataclass(frozen=True)
class Scale:
    """How much work the measurements may be; ``stand_in`` tries the command on a CPU."""

    steps: int = gpu_rows.K
    repetitions: int = 3
    num_slots: tuple[int, ...] | None = None  # None: gpu_rows.slots_to_try
    batches: tuple[int, ...] | None = None
    samples: int | None = None  # None: from the rate
    checked: int = CHECKED
    peak_size: int = 8192
    b2_mode: str | None = "reduce-overhead"

    @classmethod
    def stand_in(cls) -> Scale:
        """Small enough for any CPU."""
        return cls(4, 1, (8,), (8,), 24, 8, 256, None)


@dataclass
class Bench:
    """The networks, loops, sizes and peaks that rows share, by what they depend on."""

    device: torch.device
    budget: Budget
    scale: Scale = field(default_factory=Scale)
    with_b2: bool = True
    compile_ours: bool = False
    _kept: dict[Any, Any] = field(default_factory=dict)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of ``key``, made at its first use."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def forget_loops(self, row: Row) -> None:
        """Free what only rows of other networks or precisions hold."""
        kept = (row.pair_key, row.precision)
        others = [key for key in self._kept if key[0] == "b2" and key[1:3] != kept]
        for key in others:
            del self._kept[key]
        if others:
            torch.compiler.reset()  # or torch counts the next loop's compilation as one more of the same function
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pair(self, row: Row) -> tuple[nn.Module, nn.Module]:
        make = lambda: tuple(network.to(self.device) for network in WORKLOADS[row.workload].pair())  # noqa: E731
        return self.kept(("pair", row.workload), make)

    def latents(self, row: Row, n: int) -> Tensor:
        """The first n of the workload's latents."""
        key = ("latents", row.workload)
        if len(self._kept.get(key, ())) < n:
            drawn = fr.Normal(WORKLOADS[row.workload].latent).sample(torch.arange(n), 0, torch.float32)
            self._kept[key] = drawn.to(self.device)
        return self._kept[key][:n]

    def peak(self, precision: str) -> float:
        found = self.kept(("peak", precision), lambda: matmul_peak(precision, self.device, self.scale.peak_size))
        return found["flops_per_second"]

    def peaks(self) -> dict[str, Any]:
        """The measured peaks so far, by precision."""
        return {key[1]: value for key, value in self._kept.items() if key[0] == "peak"}

    # -- both sides

    def refiner(self, row: Row) -> fr.Refiner:
        """Ours for this row, prepared once; results stay on the device, as the baselines' do."""
        step = WORKLOADS[row.workload].step_size
        sampler: Any = {
            "collaborative": lambda: fr.Collaborative(step, control="fixed"), "backtracking": lambda: fr.Collaborative(step),
            "dgflow": lambda: fr.DGflow(step), "dot": lambda: fr.DOT(step), "ddls": lambda: fr.DDLS(step),
            "mala": lambda: fr.MALA(step), "hmc": lambda: fr.HMC(step, leapfrog=math.gcd(10, self.scale.steps)),
        }[row.sampler]()  # fmt: skip
        own: dict[str, Any] = {"compile": True} if self.compile_ours else {}
        stop = {"none": lambda: None, "median": lambda: self.threshold(row), "uniform": fr.stopping.UniformStep}[row.stop]()
        return fr.Refiner(
            *self.pair(row), sampler, at=row.module, max_steps=self.scale.steps, driver=row.driver, precision=row.precision,
            stop=stop, device=self.device, output_device=self.device,
            prior=fr.Normal(WORKLOADS[row.workload].latent), **own,
        )  # fmt: skip

    def loop(self, kind: type, row: Row, batch: int, steps: int | None = None, **own: Any) -> Any:
        if kind is not PeersLoop:
            own["precision"] = DTYPES[row.precision]
        workload = WORKLOADS[row.workload]
        return kind(*self.pair(row), row.module, workload.step_size, self.scale.steps if steps is None else steps, batch, **own)

    def threshold(self, row: Row) -> float:
        """Of the median stop: the median logit of a pilot's samples after half of the steps, found by B1 in float32.

        The networks are untrained, so real images would say nothing; with this the mean is about half of the steps.
        """

        def pilot() -> float:
            step = WORKLOADS[row.workload].step_size
            loop = ExpertLoop(*self.pair(row), row.module, step, self.scale.steps // 2, self.scale.checked)
            with arithmetic("float32"):
                return float(loop(self.latents(row, 4 * self.scale.checked)).logits.median())

        return self.kept(("threshold", row.pair_key), pilot)

    def stop(self, row: Row, n: int) -> dict[str, Any]:
        """The row's stop as the baselines take it, for the first n latents."""
        if row.stop == "uniform":
            return {"last_step": fr.stopping.UniformStep().draw(torch.arange(n), 0, self.scale.steps)[1]}
        return {"threshold": self.threshold(row)} if row.stop == "median" else {}

    # -- sizes

    def best_slots(self, row: Row, refiner: fr.Refiner) -> tuple[int, float]:
        """(slots with the least time per sample of a short run, seconds of one of its steps)."""

        def few(size: int) -> float:
            refiner.num_slots, refiner.max_steps = size, FEW
            run = partial(refiner.refine, self.latents(row, 2 * size))
            if run().report["num_slots"] != size:  # the engine goes on with fewer
                raise torch.cuda.OutOfMemoryError
            return timed(run, self.device)[0] / (2 * (FEW + 1))

        def choose() -> tuple[int, float]:
            steps = self._try(few, self.scale.num_slots or gpu_rows.slots_to_try(row.workload))
            return min(steps.items(), key=lambda item: item[1] / item[0])

        key = ("slots", row.pair_key, row.precision, row.driver, row.sampler)
        try:
            return self.kept(key, choose)
        finally:
            refiner.max_steps = self.scale.steps

    def best_batch(self, kind: type, row: Row, precision: str) -> int:
        """The batch with the least time per sample: a few steps without a stop, the whole way with one.

        Of batches that are within 2 % of the best the smallest, whose rounds are shortest.
        """

        def few(batch: int) -> float:
            stop = self.stop(row, batch)
            run = partial(self.loop(kind, row, batch, None if stop else FEW), self.latents(row, batch), **stop)
            run()
            return timed(run, self.device)[0] / batch

        def choose() -> int:
            seconds = self._try(few, self.scale.batches or gpu_rows.batches_to_try(row.workload))
            return min(batch for batch, each in seconds.items() if each <= 1.02 * min(seconds.values()))

        return self.kept(("batch", kind, row.pair_key, precision, row.stop), choose)

    def _try(self, cost: Callable[[int], float], sizes: tuple[int, ...]) -> dict[int, float]:
        """cost of every size that fits the memory."""
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

    # -- results

    def check(self, row: Row, loop: Any, ours: fr.Result, theirs: Refined, start: Tensor) -> dict[str, Any]:
        """How far ours lie from a baseline's results; WrongResults where they differ after FEW steps already.

        Whole trajectories may be chaotic: rounding grows. Then a few steps, without the stop, tell right from wrong.
        """
        facts = self.compare(row, ours, theirs, start)
        if self.agrees(row, facts):
            return facts
        refiner, steps = self.refiner(replace(row, stop="none")), loop.max_steps
        refiner.max_steps = loop.max_steps = FEW
        refiner.num_slots = ours.report["num_slots"]
        try:
            z = self.latents(row, loop.batch)
            short = self.compare(row, refiner.refine(z), Refined(*(t[: len(start)] for t in loop(z))), start)
        finally:
            loop.max_steps = steps
        if not self.agrees(row, short):
            raise WrongResults(f"ours and a baseline differ: {facts}, after {FEW} steps {short}")
        return {**facts, "chaotic": True, f"after_{FEW}_steps": short}

    def agrees(self, row: Row, facts: dict[str, Any]) -> bool:
        """Whether rounding explains the differences of ``compare``."""
        # images of 16 bits are rounded to 2^-8: no disagreement where refinement moved less
        coarse = DTYPES[row.precision].itemsize == 2 and facts["distance_median"] <= 2**-7
        return (facts["deviation_median"] <= WRONG[row.precision] or coarse) and facts["steps_equal"] >= 0.5

    def compare(self, row: Row, ours: fr.Result, theirs: Refined, start: Tensor) -> dict[str, Any]:
        """Differences of images, logits and steps; of images also in parts of what refinement moved them."""
        n = len(theirs.images)
        wanted, found = theirs.images.float().flatten(1), ours.images[:n].float().flatten(1)
        moved = (wanted - start[:n].float().flatten(1)).norm(dim=1)
        apart = (found - wanted).norm(dim=1)
        steps = (ours.steps[:n].to(self.device).long() - theirs.steps.long()).abs() <= 1
        both = steps & (theirs.steps > 0)
        return {
            "distance_median": float(apart.median()) / wanted.shape[1] ** 0.5,  # root mean square over an image
            "deviation_max": float((found - wanted).abs().max()),
            "deviation_median": float((apart[both] / moved[both].clamp(min=1e-12)).median()) if bool(both.any()) else 0.0,
            "logit_deviation_max": float((ours.logits[:n].to(self.device) - theirs.logits).abs().max()),
            "steps_equal": float(steps.double().mean()),
        }

    def start(self, row: Row, n: int) -> Tensor:
        """Images before refinement."""
        with torch.no_grad(), arithmetic("float32"):
            return self.pair(row)[0](self.latents(row, n))
