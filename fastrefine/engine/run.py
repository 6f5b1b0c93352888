"""One run of the engine: a fixed batch of slots is kept full, from proposals by sample id to results in order of sample id.

What happens to one latent: the prefix turns it into an activation, which waits in the pool (``fill``). A slot takes it, and
every step evaluates and moves it until it retires to its output row (``launch``). Once the host has seen that every sample
of its block has retired (``read``), the tail renders the block, and the images leave for the output device (``delivery``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastrefine.engine import drivers
from fastrefine.engine.delivery import Delivery
from fastrefine.engine.idle import IdleMachines, key_of
from fastrefine.engine.machine import Machine
from fastrefine.engine.pacing import Pacing, window_blocks
from fastrefine.engine.proposals import Block, Proposals
from fastrefine.engine.transfer import Transfer
from fastrefine.networks.target import Target
from fastrefine.ops import slots
from fastrefine.ops.slots import Rule
from fastrefine.result import Progress, Result


class Run:
    """One pass over the proposals with one target; ``parts`` yields a Result for each block of ids, in order."""

    def __init__(
        self, proposals: Proposals, target: Target, rule: Rule, backend: str, driver: drivers.Driver, progress: Progress,
        output_device: torch.device, idle: IdleMachines, on_step: Callable[[int, int], None], may_fall_back: bool,
    ):  # fmt: skip
        self.proposals, self.size, self.progress, self.on_step, self.idle = proposals, target.num_slots, progress, on_step, idle
        self.waiting: dict[int, tuple[Block, int]] = {}  # blocks in pool and slots, and how many readings were requested before
        self.unread: deque[tuple[int, Transfer]] = deque()  # counters and status on their way to the host, numbered
        self.requested = 0  # readings so far
        self.unfilled = iter(proposals.indices)
        self.next_block = next(self.unfilled, None)
        self.end = proposals.first_id  # the first id that is not in the pool yet
        self.stream = torch.cuda.current_stream(proposals.device) if proposals.device.type == "cuda" else None
        self.side = torch.cuda.Stream(proposals.device) if self.stream is not None and driver.lag else None
        first = proposals.block(proposals.indices[0])
        self._allocate(target, rule, backend, driver, first, may_fall_back)
        self.delivery = Delivery(self.machine, output_device, self.side, self.driver.lag)
        self.admit(first)

    def _allocate(
        self, target: Target, rule: Rule, backend: str, driver: drivers.Driver, first: Block, may_fall_back: bool
    ) -> None:
        """Machine, driver and pacing: an idle machine whose captured step fits, or a new one; ready for its first block."""
        proposals, a = self.proposals, first.activation
        assert a is not None
        count = len(proposals.indices)  # runs of about this length share a captured step
        count = 1 << count.bit_length() if driver.lag else count
        context = *first.context, *target.discriminator.call.values(first.inputs)
        carried = target.carried(a, context, backend == "triton" and bool(target.view_of(a.dtype)))
        kept = self.size * target.generator.row_bytes + sum(value.nbytes for value in (*carried, *first.context))
        block_bytes = a.nbytes * (1 + len(rule.snapshots)) + kept
        window, pool = window_blocks(driver, count, proposals.max_steps, block_bytes, proposals.device)
        rows = window * self.size, pool * self.size
        self.key = key_of(rule, backend, first)
        self.machine = self.idle.take(target, self.key, *rows) or Machine(target, rule, backend, *rows, first)
        self.machine.reset(rule, proposals.first_id)
        early, last = proposals.stop.early, rule.sampler.traits.needs_last_gradient
        forward = not (early or last) and target.route == "flat"
        self.driver = drivers.prepare(driver, self.machine, forward, may_fall_back)
        self.progress.facts |= target.report() | {"driver": self.driver.name}
        self.machine.reset(rule, proposals.first_id)  # a capture runs steps on the empty slots
        known = [self.end, self.end, 0, 0, 0, 0, 0, 0]
        self.pacing = Pacing(self.driver, self.size, proposals.max_steps, early, last, forward, known)

    @property
    def more(self) -> bool:
        """Whether proposals are still to come into the pool."""
        return self.next_block is not None

    @property
    def room(self) -> bool:
        """Whether there is a next block, and it fits into the output window of the oldest unfinished one."""
        if self.next_block is None or not self.waiting:
            return self.next_block is not None
        return (self.next_block - next(iter(self.waiting)) + 1) * self.size <= self.machine.window

    def parts(self) -> Iterator[Result]:
        """Step until all samples are delivered; time that the consumer spends between parts is not counted."""
        started, before = time.perf_counter(), self.progress.seconds
        try:
            while self.waiting or self.more or self.delivery.parcels:
                self.fill()
                self.launch()
                self.read()
                for part, waited in self.delivery.arrived(self.requested, bool(self.waiting) or self.more):
                    self.progress.host_syncs += waited
                    self.progress.delivered += len(part)
                    self.progress.seconds = before + time.perf_counter() - started
                    yield replace(part, report=self.progress.report())
                    started, before = time.perf_counter(), self.progress.seconds
        except GeneratorExit:  # the consumer stopped early, maybe on another stream
            self.idle.keep(self.machine, self.key, self.stream)
            raise
        self.idle.keep(self.machine, self.key, self.stream)

    def admit(self, block: Block) -> None:
        """Put a block of proposals into the pool."""
        self.machine.admit(block)
        if self.proposals.source.choice is not None:
            self.progress.proposed += self.proposals.source.proposals * (block.admitted.stop - block.admitted.start)
        if block.admitted == slice(0, block.size):
            block = replace(block, activation=None)
        self.waiting[block.index] = (block, self.requested)
        self.end = block.base + block.admitted.stop
        self.next_block = next(self.unfilled, None)

    def fill(self) -> None:
        """Fill the pool, within the output window. Rows that were freed since the last reading stay unused."""
        # two blocks are enough to begin with: the rest comes while the first steps run
        enough = self.machine.pool_rows if self.requested else 2 * self.size
        while self.room and self.end - self.pacing.known[slots.NEXT] + self.size <= enough:
            self.admit(self.proposals.block(self.next_block))  # type: ignore[arg-type]

    def launch(self) -> None:
        """Start as many steps as the known counters allow, and a reading of what they lead to."""
        if self.pacing.stands and not self.unread:
            if self.end > self.pacing.known[slots.NEXT]:
                self.machine.refill()
                self._request([])
            return
        if self.pacing.stands and self.driver.stops_itself:
            return
        steps = self.pacing.steps(self.end, self.more, self.room)
        if steps > 0:
            schedule = self.pacing.schedule(steps)
            self.driver.launch(self.machine, schedule, self.size if self.room else 0)
            self._request(schedule)

    def _request(self, schedule: list[bool]) -> None:
        """Read counters and status as they are after what was launched so far."""
        self.requested += 1
        seen = [self.machine.pool.counters, self.machine.outputs.status]
        self.unread.append((self.requested, Transfer(seen, torch.device("cpu"))))
        self.pacing.in_flight.append(schedule)

    def read(self) -> None:
        """Take in the readings that are old enough, and harvest the blocks that they show to be complete."""
        keep, pacing = self.driver.lag, self.pacing
        if keep:
            over = pacing.stands and self.driver.stops_itself
            idle = not pacing.steps_in_flight or pacing.steps(self.end, self.more, self.room) <= 0
            keep = 0 if over or idle or pacing.drains(self.end, self.more) else keep
        while len(self.unread) > keep:
            number, values = self.unread.popleft()
            pacing.in_flight.popleft()
            counters, status = values.wait()
            self._account(counters.tolist())
            while self.waiting and self._complete(next(iter(self.waiting)), number, status):
                self.delivery.harvest(self.waiting.pop(next(iter(self.waiting)))[0], self.requested)

    def _complete(self, index: int, number: int, status: Tensor) -> bool:
        block, since = self.waiting[index]  # an earlier reading says nothing about the rows of this block
        return number > since and bool((status[self.machine.rows(block, block.admitted)] >= 0).all())

    def _account(self, counters: list[int]) -> None:
        before, self.pacing.known = self.pacing.known, counters
        if self.progress.add(counters, before, self.size):
            self.on_step(counters[slots.ITERATIONS], self.progress.finished)
