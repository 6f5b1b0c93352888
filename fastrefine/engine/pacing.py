"""How many steps to launch before the counters are read again, and how much memory the windows of a run take."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from fastrefine.engine.drivers import Driver
from fastrefine.ops import slots

MEMORY = 2**33  # memory budget in bytes; the limits below are fractions of it. On a GPU: the memory of the GPU
WINDOW_SHARE = 32  # output window, 1/32: how far admitted ids may run ahead of the oldest unfinished one
POOL_SHARE = 32  # proposals that wait in the pool
POOL_BLOCKS = 32  # blocks in the pool at most, for a driver that reads the counters late
FIRST_CHUNK = 8  # steps before it is known how fast samples finish
DRAIN_CHUNK = 8  # steps between two reads when the last sample may finish at any step


def window_blocks(driver: Driver, blocks: int, max_steps: int, block_bytes: int, device: torch.device) -> tuple[int, int]:
    """(output window, pool) in blocks of num_slots samples, for a run of ``blocks`` blocks of ``block_bytes`` each."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else MEMORY
    longest = max_steps + 2 + (driver.lag + 1) * (driver.chunk - 1)  # steps until the host sees that a sample ended
    window = max(4, min(blocks + 1, longest, memory // WINDOW_SHARE // block_bytes))
    pool = max(2, min(blocks, POOL_BLOCKS if driver.lag else 2, memory // POOL_SHARE // block_bytes))
    return window, pool


@dataclass
class Pacing:
    """Plans the launches of a run from the counters as they were last read and from the steps launched since.

    forward: whether steps without a gradient were prepared. In the methods, ``end`` is the first id that is not in the
    pool yet, ``more`` whether proposals are still to come, ``room`` whether the next block fits into the output window.
    """

    driver: Driver
    size: int  # slots
    max_steps: int
    stops_early: bool  # whether a sample may retire before max_steps
    reads_last_gradient: bool
    forward: bool
    known: list[int]  # counters as last read, see ``slots``
    in_flight: deque[list[bool]] = field(default_factory=deque)  # schedules launched since: True is a step without gradient

    @property
    def steps_in_flight(self) -> int:
        """Steps launched since the counters were read."""
        return sum(map(len, self.in_flight))

    @property
    def stands(self) -> bool:
        """Whether all slots were seen empty: a driver that stops itself does not go on by itself."""
        return self.known[slots.LIVE] == 0

    @property
    def _rate(self) -> float:
        """Samples that retire in a step of full slots, from what was seen; at least one for each slot in its longest life."""
        seen = self.known[slots.FINISHED] / max(1, self.known[slots.EVALUATIONS])
        return self.size * max(seen, 1 / (self.max_steps + 1))

    def _expected(self, end: int) -> float:
        """Proposals that will still wait in the pool after the steps in flight."""
        return end - self.known[slots.NEXT] - self._rate * self.steps_in_flight

    def drains(self, end: int, more: bool) -> bool:
        """Whether the last samples are in the slots, and may all finish at any step."""
        return self.stops_early and not more and self._expected(end) <= 0

    def steps(self, end: int, more: bool, room: bool) -> int:
        """How many steps to launch: as long as the pool lasts, and not past the end."""
        if not self.driver.lag:
            return 1 if self.stops_early else min(self.driver.chunk, self.known[slots.SHORTEST] + 1)
        ready, bound = end - self.known[slots.NEXT], self.driver.chunk
        if not more:
            left = self.known[slots.LONGEST] + 1 if self.known[slots.LIVE] else 0
            bound = min(bound, -(-ready // self.size) * (self.max_steps + 1) + left - self.steps_in_flight)
            if not self.stops_early:
                return bound
        if self.driver.stops_itself:
            # with a full window it would go on with empty slots until the oldest sample ends
            return bound if room or not more else min(bound, DRAIN_CHUNK)
        if self.known[slots.ITERATIONS] == 0:
            return min(FIRST_CHUNK, bound)
        reserve = self.size if more else 0  # all slots may be refilled at once
        fewest = DRAIN_CHUNK if self.drains(end, more) else 1
        return min(max(int((self._expected(end) - reserve) / self._rate), fewest), bound)

    def schedule(self, steps: int) -> list[bool]:
        """For each of the next steps: whether it is the last one of every sample in a slot, which needs no gradient."""
        known = self.known
        together = known[slots.LIVE] > 0 and known[slots.SHORTEST] == known[slots.LONGEST]
        # a driver without lag has read what its last steps led to, so that nothing is predicted
        if not together or self.reads_last_gradient or (self.driver.lag and not self.forward):
            return [False] * steps
        left = known[slots.LONGEST]

        def after(left: int, forward_only: bool) -> int:
            """Updates left after a step. One without gradient moves no sample; a fresh sample follows one that ends."""
            return self.max_steps if left == 0 else left - (not forward_only)

        for forward_only in (flag for schedule in self.in_flight for flag in schedule):
            left = after(left, forward_only)
        planned = []
        for _ in range(steps):
            planned.append(left == 0)
            left = after(left, left == 0)
        return planned
