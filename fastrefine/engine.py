"""The engine: a fixed batch of slots kept full, from proposals by sample id to outputs in order of sample id.

What happens to one latent: the prefix turns it into an activation (``fill``), a slot takes it, every step evaluates and
moves it (``launch``) until it retires to its output row; once the host has seen that its whole block has retired
(``read``), the tail renders it (``harvest``) and it leaves for the output device while further steps run (``deliver``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrefine import drivers, slots
from fastrefine.machine import Machine, key_of
from fastrefine.pool import Block, Proposals
from fastrefine.result import Result, Snapshot
from fastrefine.slots import Rule
from fastrefine.target import Target
from fastrefine.transfer import Transfer, send

MEMORY = 2**33  # bytes that the limits below are parts of; on a GPU its own memory
WINDOW_SHARE = 32  # output window, 1/32: how far admitted ids may run ahead of the oldest unfinished
POOL_SHARE = 32  # proposals that wait
POOL_BLOCKS = 32  # at most, of proposals ready for a driver that reads counters late
FIRST_CHUNK = 8  # steps before it is known how fast samples finish
DRAIN_CHUNK = 8  # steps between reads when the end may come at any step


@dataclass
class Progress:
    """Counts of a run, updated whenever the counters are read; survives a restart with fewer slots."""

    evaluations: int = 0
    slot_steps: int = 0
    iterations: int = 0
    host_syncs: int = 0  # reads of the counters, and images that had to be waited for
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
            "iterations": self.iterations,
            "host_syncs_per_step": self.host_syncs / self.iterations if self.iterations else 0.0,
            "seconds": self.seconds,
            "images_per_second": self.delivered / self.seconds if self.seconds > 0 else 0.0,
            **self.facts,
        }


class Waiting(NamedTuple):
    """A block in the pool or in the slots."""

    block: Block
    since: int  # reads requested before it was admitted say nothing about its rows


class Reading(NamedTuple):
    """Counters and status on their way to the host."""

    number: int
    schedule: list[bool]  # of the steps launched since the reading before
    values: Transfer


class Delivery(NamedTuple):
    """A rendered block on its way to the output device."""

    number: int  # readings requested before it
    result: Result  # its tensors are those of ``values``
    values: Transfer


class Run:
    """One pass over the proposals with one target; ``parts`` yields a Result for each block of ids, in order."""

    def __init__(
        self, proposals: Proposals, target: Target, rule: Rule, backend: str, driver: drivers.Driver, progress: Progress,
        output_device: torch.device, on_step: Callable[[int, int], None] | None = None, may_fall_back: bool = False,
    ):  # fmt: skip
        self.proposals, self.target, self.rule, self.backend = proposals, target, rule, backend
        self.driver, self.progress, self.on_step, self.may_fall_back = driver, progress, on_step, may_fall_back
        self.output_device, self.size = output_device, target.num_slots
        self.stops_early = proposals.stop.early
        self.waiting: dict[int, Waiting] = {}  # blocks that were admitted and are not yet harvested
        self.unread: deque[Reading] = deque()
        self.deliveries: deque[Delivery] = deque()
        self.requested = 0
        self.unfilled = iter(proposals.indices)
        self.next_block = next(self.unfilled, None)
        self.end = proposals.first_id  # of the ids in the pool
        self.known = [self.end, self.end, 0, 0, 0, 0, 0, 0]  # counters as last read
        on_gpu = proposals.device.type == "cuda"
        self.stream = torch.cuda.current_stream(proposals.device) if on_gpu else None
        self.side = torch.cuda.Stream(proposals.device) if on_gpu and driver.lag else None

    def parts(self) -> Iterator[Result]:
        """Step until drained; time spent by the consumer between parts is not counted."""
        assert self.next_block is not None
        first = self.proposals.block(self.next_block)
        self.machine = self._machine(first)
        started, before = time.perf_counter(), self.progress.seconds
        try:
            self._admit(first)
            while self.waiting or self.next_block is not None or self.deliveries:
                self.fill()
                self.launch()
                self.read()
                for part in self.deliver():
                    self.progress.delivered += len(part)
                    self.progress.seconds = before + time.perf_counter() - started
                    yield replace(part, report=self.progress.report())
                    started, before = time.perf_counter(), self.progress.seconds
        except GeneratorExit:  # outside the stream of the run
            self.target.keep(self.machine, self.stream)
            raise
        self.target.keep(self.machine, self.stream)

    def _machine(self, first: Block) -> Machine:
        """An idle machine with a captured step that fits, or a new one; ready for its first block."""
        driver, count = self.driver, len(self.proposals.indices)
        if driver.lag:
            count = 1 << count.bit_length()  # runs of about this length share a captured step
        assert first.activation is not None
        block_bytes = first.activation.nbytes * (1 + len(self.rule.snapshots)) + self.size * self.target.generator.row_bytes
        memory = MEMORY
        if self.stream is not None:
            memory = torch.cuda.get_device_properties(self.proposals.device).total_memory
        longest = self.proposals.max_steps + 2 + (driver.lag + 1) * (driver.chunk - 1)  # steps until an end is seen
        window = max(4, min(count + 1, longest, memory // WINDOW_SHARE // block_bytes)) * self.size
        pool = max(2, min(count, POOL_BLOCKS if driver.lag else 2, memory // POOL_SHARE // block_bytes)) * self.size
        machine = self.target.idle(key_of(self.rule, self.backend, first), window, pool)
        if machine is None:
            machine = Machine(self.target, self.rule, self.backend, window, pool, first)
        machine.reset(self.rule, self.proposals.first_id)
        self.forward = not (self.stops_early or self.rule.sampler.traits.needs_last_gradient) and self.target.route == "flat"
        self.driver = drivers.prepare(driver, machine, self.forward, self.may_fall_back)
        self.progress.facts["driver"] = self.driver.name
        machine.reset(self.rule, self.proposals.first_id)  # a capture runs steps on the empty slots
        return machine

    def _admit(self, block: Block) -> None:
        self.machine.admit(block)
        if block.admitted == slice(0, block.size):
            block = replace(block, activation=None)
        self.waiting[block.index] = Waiting(block, self.requested)
        self.end = block.base + block.admitted.stop
        self.next_block = next(self.unfilled, None)

    def fill(self) -> None:
        """Fill the pool, within the window of the oldest unfinished block. Rows freed since the last read stay unused."""
        # two blocks are enough to begin with: the rest comes while the first steps run
        enough = self.machine.pool_rows if self.requested else 2 * self.size
        while self._has_room and self.next_block is not None and self.end - self.known[slots.NEXT] + self.size <= enough:
            self._admit(self.proposals.block(self.next_block))

    @property
    def _has_room(self) -> bool:
        """Whether there is a next block, and it fits into the window of the oldest unfinished one."""
        if self.next_block is None or not self.waiting:
            return self.next_block is not None
        return (self.next_block - next(iter(self.waiting)) + 1) * self.size <= self.machine.window

    def launch(self) -> None:
        """Start as many steps as the known counters allow, and a reading of what they lead to."""
        if self._stands and not self.unread:
            if self.end > self.known[slots.NEXT]:
                self.machine.refill()
                self._request([])
            return
        if self._stands and self.driver.stops_itself:
            return
        steps = self._steps()
        if steps > 0:
            schedule = self._schedule(steps)
            self.driver.launch(self.machine, schedule, self.size if self._has_room else 0)
            self._request(schedule)

    @property
    def _in_flight(self) -> int:
        """Steps launched since the counters were read."""
        return sum(len(reading.schedule) for reading in self.unread)

    def _steps(self) -> int:
        """How many steps to launch: as long as the pool lasts, and not past the end."""
        if not self.driver.lag:
            return 1
        known, longest = self.known, self.proposals.max_steps + 1
        ready = self.end - known[slots.NEXT]
        bound = self.driver.chunk
        if self.next_block is None:
            left = known[slots.LONGEST] + 1 if known[slots.LIVE] else 0
            bound = min(bound, -(-ready // self.size) * longest + left - self._in_flight)
            if not self.stops_early:
                return bound
        if self.driver.stops_itself:
            # with a full window it would go on with empty slots until the oldest sample ends
            return bound if self._has_room or self.next_block is None else min(bound, DRAIN_CHUNK)
        if known[slots.ITERATIONS] == 0:
            return min(FIRST_CHUNK, bound)
        reserve = 0 if self.next_block is None else self.size  # all slots may be refilled at once
        return min(max(int((self._expected - reserve) / self._rate), DRAIN_CHUNK if self._draining else 1), bound)

    @property
    def _stands(self) -> bool:
        """Whether all slots were seen empty: a driver that stops itself does not go on by itself."""
        return self.known[slots.LIVE] == 0

    @property
    def _rate(self) -> float:
        """Samples that retire in a step of full slots, from what was seen; at least one for each slot in its longest life."""
        known = self.known
        return self.size * max(known[slots.FINISHED] / max(1, known[slots.EVALUATIONS]), 1 / (self.proposals.max_steps + 1))

    @property
    def _expected(self) -> float:
        """Proposals that will still wait after the steps in flight."""
        return self.end - self.known[slots.NEXT] - self._rate * self._in_flight

    @property
    def _draining(self) -> bool:
        """Whether the last samples are in the slots, and may all be finished at any step."""
        return self.stops_early and self.next_block is None and self._expected <= 0

    def _schedule(self, steps: int) -> list[bool]:
        """Which of the next steps are the last of every sample in a slot, and need no gradient."""
        known = self.known
        together = known[slots.LIVE] > 0 and known[slots.SHORTEST] == known[slots.LONGEST]
        # without a lag the next step is known, not predicted
        if not together or self.rule.sampler.traits.needs_last_gradient or (self.driver.lag and not self.forward):
            return [False] * steps
        left = known[slots.LONGEST]

        def after(left: int, forward_only: bool) -> int:
            """Updates left after a step; a forward-only one moves nobody, and whoever ends is followed by a fresh sample."""
            return self.proposals.max_steps if left == 0 else left - (not forward_only)

        for forward_only in (flag for reading in self.unread for flag in reading.schedule):
            left = after(left, forward_only)
        schedule = []
        for _ in range(steps):
            schedule.append(left == 0)
            left = after(left, left == 0)
        return schedule

    def _request(self, schedule: list[bool]) -> None:
        """Read counters and status as they are after what was launched so far."""
        self.requested += 1
        seen = [self.machine.pool.counters, self.machine.outputs.status]
        self.unread.append(Reading(self.requested, schedule, Transfer(seen, torch.device("cpu"))))

    def read(self) -> None:
        """Take in the readings that are old enough, and harvest what they show to be complete."""
        keep = self.driver.lag
        if keep:
            stopped = self._stands and self.driver.stops_itself
            if stopped or self._draining or not self._in_flight or self._steps() <= 0:
                keep = 0
        while len(self.unread) > keep:
            reading = self.unread.popleft()
            counters, status = reading.values.wait()
            self._account(counters.tolist())
            while self.waiting and self._complete(next(iter(self.waiting)), reading.number, status):
                self.deliveries.append(self.harvest(next(iter(self.waiting))))

    def _account(self, counters: list[int]) -> None:
        progress, before = self.progress, self.known
        iterations = counters[slots.ITERATIONS] - before[slots.ITERATIONS]
        progress.evaluations += counters[slots.EVALUATIONS] - before[slots.EVALUATIONS]
        progress.finished += counters[slots.FINISHED] - before[slots.FINISHED]
        progress.iterations += iterations
        progress.slot_steps += iterations * self.size
        progress.host_syncs += 1
        self.known = counters
        if self.on_step is not None and iterations:
            self.on_step(counters[slots.ITERATIONS], progress.finished)

    def _complete(self, index: int, number: int, status: Tensor) -> bool:
        block, since = self.waiting[index]
        return number > since and bool((status[self._rows(block, block.admitted)] >= 0).all())

    def _rows(self, block: Block, part: slice) -> slice:
        """Output rows of a part of a block; the window is a whole number of blocks, so they are consecutive."""
        base = block.base % self.machine.window
        return slice(base + part.start, base + part.stop)

    def harvest(self, index: int) -> Delivery:
        """Render a finished block and free its rows."""
        block, generator, out = self.waiting.pop(index).block, self.target.generator, self.machine.outputs
        asked, rows = block.asked, self._rows(block, block.asked)
        a = out.activation[self._rows(block, slice(0, block.size))].clone()
        if block.activation is not None:  # rows that nobody asked for stay as they were proposed
            for rest in (slice(0, block.admitted.start), slice(block.admitted.stop, block.size)):
                a[rest] = block.activation[rest]
        shaped = a.view(len(a), *generator.shape)
        images = generator.render(shaped, block.context)[asked]
        ids = send(torch.arange(block.start, block.stop), self.output_device)
        latents = shaped if generator.cut.at == "input" else block.latents
        reported = self._reported(rows)
        result = Result(
            # copies: the next block takes these rows while the images are still under way
            images=images, logits=out.logit[rows].clone(), initial_logits=out.initial_logit[rows].clone(),
            steps=out.steps[rows].clone(), status=out.status[rows].to(torch.int8), ids=ids, latents=latents[asked],
            activations=shaped[asked], logit_falls=out.logit_falls[rows].clone(),
            labels=None if block.labels is None else block.labels[asked], acceptance=reported.get("accepted"),
            scale="critic" if self.target.discriminator.scale == "critic" else "logit", report={},
            step_sizes=reported.get("step_size"), snapshots=self._snapshots(block, a),
        )  # fmt: skip
        values = Transfer([t.contiguous() for t in result.tensors()], self.output_device, self.side)
        out.status[self._rows(block, block.admitted)] = slots.PENDING
        return Delivery(self.requested, result, values)

    def _reported(self, rows: slice) -> dict[str, Tensor]:
        """What the sampler reports of each sample (n,), by name; accepted trials as a share of all tests."""
        out, traits = self.machine.outputs, self.rule.sampler.traits
        found = {name: out.scalars[self.machine.slots.scalar_names.index(name), rows].clone() for name in traits.reports}
        if "accepted" in found:
            found["accepted"] /= out.steps[rows] // traits.transition_steps
        return found

    def _snapshots(self, block: Block, last: Tensor) -> dict[int, Snapshot]:
        """Rendered from the rows of a whole block; what retired before is as it is in ``last`` (size, F)."""
        taken, generator = self.machine.snapshots, self.target.generator
        if taken is None:
            return {}
        out, rows, asked = self.machine.outputs, self._rows(block, slice(0, block.size)), block.asked
        found = {}
        for index, step in enumerate(taken.steps):
            over = out.steps[rows] <= step
            a = torch.where(over[:, None], last, taken.activation[index, rows])
            shaped = a.view(len(a), *generator.shape)
            images = generator.render(shaped, block.context)[asked]
            logits = torch.where(over, out.logit[rows], taken.logit[index, rows])[asked]
            found[step] = Snapshot(images, logits, shaped[asked])
        return found

    def deliver(self) -> Iterator[Result]:
        """The blocks that have arrived, in order; with further steps on the device while their consumer works."""
        while self.deliveries:
            number, result, values = self.deliveries[0]
            busy = self.waiting or self.next_block is not None
            if self.driver.lag and busy and (number == self.requested or (number + 1 == self.requested and not values.ready)):
                return  # the device has work, so that there is no need to wait for it
            self.deliveries.popleft()
            arrived = result.moved(values.wait())
            self.progress.host_syncs += values.blocked
            yield arrived
