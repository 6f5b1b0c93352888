"""The engine: a fixed batch of slots kept full, from proposals by sample id to outputs in order of sample id.

What happens to one latent: the prefix turns it into an activation (``fill``), a slot takes it, every ``step`` evaluates
and moves it until it retires to its output row, and once its whole block has retired the tail renders it (``harvest``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastrefine import drivers, ops, slots
from fastrefine.pool import Block, Proposals
from fastrefine.result import Result
from fastrefine.slots import Rule
from fastrefine.target import Target

WINDOW_BYTES = 2**28  # output window: how far admitted ids may run ahead of the oldest unfinished one


@dataclass
class Progress:
    """Counts of a run, updated after every step; survives a restart with fewer slots."""

    evaluations: int = 0
    slot_steps: int = 0
    finished: int = 0
    delivered: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # backend, driver, precision, threads, num_slots

    def report(self) -> dict[str, Any]:
        """The dict that users see as ``Result.report``."""
        return {
            "evaluations": self.evaluations,
            "slot_steps": self.slot_steps,
            "slot_efficiency": self.evaluations / self.slot_steps if self.slot_steps else 1.0,
            "seconds": self.seconds,
            "images_per_second": self.delivered / self.seconds if self.seconds > 0 else 0.0,
            **self.facts,
        }


class Run:
    """One pass over the proposals with one target; ``parts`` yields a Result for each block of ids, in order."""

    def __init__(
        self, proposals: Proposals, target: Target, rule: Rule, backend: str, driver: drivers.HostLoop,
        progress: Progress, on_step: Callable[[int, int], None] | None = None,
    ):  # fmt: skip
        self.proposals, self.target, self.rule = proposals, target, rule
        self.backend, self.driver, self.progress, self.on_step = backend, driver, progress, on_step
        size, features = target.num_slots, max(1, _numel(target.generator.shape))
        window = size * (proposals.max_steps + 2)
        affordable = WINDOW_BYTES // (features * proposals.dtype.itemsize + target.generator.row_bytes)
        blocks = max(4, min(len(proposals.indices) + 1, -(-min(window, affordable) // size)))
        self.window = blocks * size
        self.slots, self.pool, self.outputs = slots.allocate(
            size, features, 2 * size, self.window, rule, proposals.dtype, proposals.device, proposals.source.labels
        )
        self.waiting: dict[int, Block] = {}  # blocks admitted to the pool and not yet harvested
        self.unfilled = iter(proposals.indices)
        self.next_block = next(self.unfilled, None)
        self.pool.counters[slots.NEXT] = self.pool.counters[slots.END] = proposals.first_id
        self.counters = self.pool.counters.tolist()
        self.pool_context: tuple[Tensor, ...] = ()
        self.context: tuple[Tensor, ...] = ()

    def parts(self) -> Iterator[Result]:
        """Step until drained; time spent by the consumer between parts is not counted."""
        started, before = time.perf_counter(), self.progress.seconds
        for index in self.proposals.indices:
            while not self._complete(index):
                self.fill()
                self.step()
            part = self.harvest(index)
            self.progress.delivered += len(part)
            self.progress.seconds = before + time.perf_counter() - started
            yield replace(part, report=self.progress.report())
            started, before = time.perf_counter(), self.progress.seconds

    def fill(self) -> None:
        """Keep at least one proposal ready for every slot, within the window of the oldest unfinished block."""
        size = self.target.num_slots
        while self.next_block is not None and self.counters[slots.END] - self.counters[slots.NEXT] < size:
            if self.waiting and (self.next_block - next(iter(self.waiting)) + 1) * size > self.window:
                return
            block = self.proposals.block(self.next_block)
            self.waiting[block.index] = block
            ids = torch.arange(size, device=self.proposals.device)[block.admitted] + block.base
            rows = ids % len(self.pool.threshold)
            for name in ("activation", "threshold", "last_step", "reference_logit"):
                getattr(self.pool, name)[rows] = getattr(block, name)[block.admitted]
            if self.pool.label is not None and block.labels is not None:
                self.pool.label[rows] = block.labels[block.admitted]
            self._fill_context(rows, block)
            self.pool.counters[slots.END] = self.counters[slots.END] = block.base + block.admitted.stop
            self.next_block = next(self.unfilled, None)

    def _step_context(self, block: Block) -> tuple[Tensor, ...]:
        """The tail's context, then the labels where the discriminator takes them."""
        if not self.target.discriminator.takes_labels:
            return block.context
        assert block.labels is not None
        return (*block.context, block.labels)

    def _fill_context(self, rows: Tensor, block: Block) -> None:
        given = self._step_context(block)
        if not self.pool_context:
            self.pool_context = tuple(c.repeat(2, *[1] * (c.dim() - 1)) for c in given)
            self.context = tuple(c.clone() for c in given)
        for own, new in zip(self.pool_context, given, strict=True):
            own[rows] = new[block.admitted]

    def step(self) -> None:
        """Evaluate every slot, then observe, retire or propose, refill; empty slots compute along harmlessly."""
        if self.counters[slots.LIVE] == 0:
            ops.refine_step(self.slots, None, self.pool, self.outputs, self.rule, backend=self.backend)
            self._follow()
            self.counters = self.pool.counters.tolist()
            return
        self.counters = self.driver.advance(self._advance, self.pool)
        self.progress.slot_steps += self.target.num_slots
        self.progress.evaluations += self.counters[slots.EVALUATIONS] - self._seen[0]
        self.progress.finished += self.counters[slots.FINISHED] - self._seen[1]
        self._seen = (self.counters[slots.EVALUATIONS], self.counters[slots.FINISHED])
        if self.on_step is not None:
            self.on_step(self.counters[slots.ITERATIONS], self.progress.finished)

    _seen = (0, 0)

    def _advance(self) -> None:
        own = self.slots
        at_end = bool((own.step >= own.last_step).logical_or_(own.sample_id < 0).all())
        evaluate = self.target.forward if at_end else self.target.evaluate
        evaluation = evaluate(own.activation, self.context)
        ops.refine_step(own, evaluation, self.pool, self.outputs, self.rule, backend=self.backend)
        self._follow()

    def _follow(self) -> None:
        """Contexts follow the proposals that slots took."""
        if self.context:
            taken = (self.slots.source >= 0).nonzero()[:, 0]
            for own, pool in zip(self.context, self.pool_context, strict=True):
                own[taken] = pool[self.slots.source[taken]]

    def _complete(self, index: int) -> bool:
        block = self.waiting.get(index)
        return block is not None and bool((self.outputs.status[self._rows(block, block.admitted)] >= 0).all())

    def _rows(self, block: Block, part: slice) -> slice:
        """Output rows of a part of a block; the window is a whole number of blocks, so they are consecutive."""
        base = block.base % self.window
        return slice(base + part.start, base + part.stop)

    def harvest(self, index: int) -> Result:
        """Render a finished block and free its rows."""
        block, generator, out = self.waiting.pop(index), self.target.generator, self.outputs
        asked, rows = block.asked, self._rows(block, block.asked)
        a = block.activation.clone()
        a[block.admitted] = out.activation[self._rows(block, block.admitted)]  # lock-step neighbours matter too
        shaped = a.view(len(a), *generator.shape)
        images = generator.render(shaped, block.context)[asked]
        latents = shaped if generator.cut.at == "input" else block.latents
        status = out.status[rows].to(torch.int8)
        out.status[self._rows(block, block.admitted)] = slots.PENDING
        return Result(
            images=images, logits=out.logit[rows].clone(), initial_logits=out.initial_logit[rows].clone(),
            steps=out.steps[rows].clone(), status=status, ids=torch.arange(block.start, block.stop),
            latents=latents[asked].clone(), activations=shaped[asked].clone(),
            logit_falls=out.logit_falls[rows].clone(), labels=None if block.labels is None else block.labels[asked],
            acceptance=None, scale="critic" if self.target.discriminator.scale == "critic" else "logit",
            report={},
        )  # fmt: skip


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product
