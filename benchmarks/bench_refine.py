"""Refinement on a CPU against the loops in baselines.py: fixed steps at equal results, bfloat16, and a random stop.

K = 20, control="fixed". Timing never asserts; that the results are equal is asserted before anything is timed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrefine as fr
from benchmarks.baselines import CompiledLoop, ExpertLoop, PeersLoop
from benchmarks.measure import Race, Run
from benchmarks.workloads import WORKLOADS, Workload

K, ROUNDS = 20, 5
ENOUGH = 256  # samples of a round: shorter ones measure what else the machine does
FEW = 2  # steps of the runs that choose a batch


class Entry:
    """A workload at a cut and a precision, and who can run it with any number of steps and batch."""

    def __init__(self, name: str, cut: str, precision: str):
        self.workload: Workload = WORKLOADS[name]
        self.at, self.precision, self.dtype = self.workload.cuts[cut], precision, getattr(torch, precision)
        self.generator, self.discriminator = self.workload.pair()
        self.facts = {"workload": name, "cut": cut}

    def refiner(self, num_slots: int, steps: int = K, stop: fr.stopping.StopRule | None = None) -> fr.Refiner:
        sampler = fr.Collaborative(self.workload.step_size, control="fixed")
        return fr.Refiner(
            self.generator, self.discriminator, sampler, at=self.at, max_steps=steps, stop=stop,
            prior=fr.Normal(self.workload.latent), num_slots=num_slots, precision=self.precision,
        )  # fmt: skip

    def baseline(self, kind: Callable[..., Any], batch: int, steps: int = K) -> Any:
        own = {} if kind is PeersLoop else {"precision": self.dtype}
        return kind(self.generator, self.discriminator, self.at, self.workload.step_size, steps, batch, **own)

    def latents(self, n: int) -> Tensor:
        return fr.Normal(self.workload.latent).sample(torch.arange(n), 0, torch.float32)

    def sizes(self, race: Race) -> tuple[list[int], list[int], int]:
        """The batches in which B0 and B1 may be best, and our slots."""

        def few(kind: Callable[..., Any]) -> Callable[[int], Run]:
            return lambda size: partial(self.baseline(kind, size, FEW), self.latents(size))

        def ours(size: int) -> Run:
            return partial(self.refiner(size, FEW).refine, self.latents(size))

        return race.best_sizes(few(PeersLoop)), race.best_sizes(few(ExpertLoop)), race.best_sizes(ours)[0]


def compiled(entry: Entry, batches: list[int], quick: bool, **stop: Any) -> tuple[dict[int, Any], str | None]:
    """(B2 by batch, each called once with ``stop``, None), or ({}, the reason why it cannot run here)."""
    if quick:
        return {}, "--quick"
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return {}, "no C++ compiler"
    loops = {batch: entry.baseline(CompiledLoop, batch) for batch in batches}
    try:
        for batch, loop in loops.items():
            loop(entry.latents(batch), **stop)
    except Exception as error:  # torch.compile may fail in any way: the row says how
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return loops, None


def assert_equal_results(found: Any, wanted: Any, precision: str, moved: Tensor) -> None:
    """Images agree to a small part of the distance that refinement moved them."""
    tolerance = {"float32": 1e-2, "bfloat16": 0.5}[precision] * moved.abs().max()
    assert (found.images - wanted.images).abs().max() <= tolerance
    assert (found.logits - wanted.logits).abs().max() <= {"float32": 1e-3, "bfloat16": 0.1}[precision]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", ["first", "output"])
def bench_fixed_steps(race: Race, quick: bool, cut: str, precision: str) -> None:
    """DCGAN-32, K steps for all: B0 in float32, B1 and B2 at the row's precision."""
    entry = Entry("dcgan32", cut, precision)
    b0_batches, b1_batches, num_slots = entry.sizes(race)
    z = entry.latents(max(*b0_batches, *b1_batches, num_slots, ENOUGH))
    refiner = entry.refiner(num_slots)
    b2, missing = compiled(entry, b1_batches, quick)
    rivals: dict[str, dict[int, Any]] = {
        "ratio_b0": {batch: entry.baseline(PeersLoop, batch) for batch in b0_batches},
        "ratio_b1": {batch: entry.baseline(ExpertLoop, batch) for batch in b1_batches},
        **({"ratio_b2": b2} if b2 else {}),
    }
    result, wanted = refiner.refine(z), rivals["ratio_b0"][b0_batches[0]](z)
    moved = wanted.images - entry.refiner(num_slots, 0).refine(z).images
    assert_equal_results(result, wanted, precision, moved)
    runs: dict[str, dict[int, Run]] = {}
    for name, loops in rivals.items():
        for loop in loops.values():
            assert_equal_results(loop(z), wanted, precision, moved)
        runs[name] = {batch: partial(loop, z) for batch, loop in loops.items()}
    ratios = race.run(lambda: refiner.refine(z), runs, ROUNDS)
    race.record(result, K, **entry.facts, **ratios, b2_missing=missing, stop="none")


def bench_random_stop(race: Race, quick: bool) -> None:
    """Small network, n = 200 x slots (quick: 50 x), a uniform last step for each sample: the gain over K steps for all."""
    entry, num_slots = Entry("dcgan16", "first", "float32"), 64
    z = entry.latents((50 if quick else 200) * num_slots)
    stopping, fixed = entry.refiner(num_slots, stop=fr.stopping.UniformStep()), entry.refiner(num_slots)
    result, _ = stopping.refine(z), fixed.refine(z[:num_slots])
    ratios = race.run(lambda: stopping.refine(z), {"gain": {num_slots: lambda: fixed.refine(z)}}, ROUNDS)
    evaluations = result.steps.double().mean().item() + 1
    race.record(result, K, **entry.facts, **ratios, ideal_gain=(K + 1) / evaluations, stop="uniform")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def bench_random_stop_against_batches(race: Race, quick: bool, precision: str) -> None:
    """DCGAN-32 at the first block, the same last steps for B1 and B2, which end a batch when all its samples stopped."""
    entry = Entry("dcgan32", "first", precision)
    num_slots = 64
    z = entry.latents((4 if quick else 20) * num_slots)
    rule = fr.stopping.UniformStep()
    last_step = rule.draw(torch.arange(len(z)), 0, K)[1]
    refiner = entry.refiner(num_slots, stop=rule)
    b1 = entry.baseline(ExpertLoop, num_slots)
    b2, missing = compiled(entry, [num_slots], quick, last_step=last_step[:num_slots])
    result, wanted = refiner.refine(z), b1(z, last_step=last_step)
    assert torch.equal(result.steps.long(), wanted.steps)
    moved = wanted.images - entry.refiner(num_slots, 0).refine(z).images
    assert_equal_results(result, wanted, precision, moved)
    rivals = {"ratio_b1": {num_slots: b1}, **({"ratio_b2": b2} if b2 else {})}
    runs: dict[str, dict[int, Run]] = {
        name: {batch: partial(loop, z, last_step=last_step) for batch, loop in loops.items()} for name, loops in rivals.items()
    }
    ratios = race.run(lambda: refiner.refine(z), runs, ROUNDS)
    race.record(result, K, **entry.facts, **ratios, b2_missing=missing, stop="uniform")
