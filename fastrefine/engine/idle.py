"""Machines between two runs: a step that was captured need not be captured again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrefine import ops
from fastrefine.engine.machine import Machine
from fastrefine.engine.proposals import Block
from fastrefine.networks.target import Target
from fastrefine.ops.slots import Rule


class IdleMachines:
    """Keeps at most one machine of a finished run, for the next run that its captured step can serve."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self._key: tuple[Any, ...] = ()
        self._rested: torch.cuda.Event | None = None

    def take(self, target: Target, key: tuple[Any, ...], window: int, pool_rows: int) -> Machine | None:
        """The kept machine, if it serves such a run; any other one is given up, for its memory is better used by the next."""
        machine, self.machine = self.machine, None
        if machine is None or machine.target is not target or machine.era is not target.era or self._key != key:
            return None
        if machine.window < window or machine.pool_rows < pool_rows:
            return None
        if self._rested is not None:  # the new run may be on another stream: it waits for what was launched before
            stream = torch.cuda.current_stream(machine.slots.activation.device)
            self._rested.wait(stream)
            for tensor in _tensors(machine):
                tensor.record_stream(stream)
        return machine

    def keep(self, machine: Machine, key: tuple[Any, ...], stream: torch.cuda.Stream | None) -> None:
        """Keep the machine of a run that ended, if it has a captured step. The GPU may still be running it."""
        if not machine.captured or machine.era is not machine.target.era:
            return
        self.machine, self._key = machine, key
        self._rested = None
        if stream is not None:
            self._rested = torch.cuda.Event()
            self._rested.record(stream)


def key_of(rule: Rule, backend: str, block: Block) -> tuple[Any, ...]:
    """Equal for runs that the same captured step can serve, if its windows are large enough."""
    kinds = tuple((t.dtype, tuple(t.shape[1:])) for t in (*block.context, *([] if block.labels is None else [block.labels])))
    return ops.baked(rule, backend), backend, kinds


def _tensors(machine: Machine) -> Iterator[Tensor]:
    for part in (machine.slots, machine.pool, machine.outputs):
        yield from (t for t in vars(part).values() if isinstance(t, Tensor))
    yield from machine.snapshots[1:] if machine.snapshots is not None else ()
    yield from (*machine.slots.state.values(), *machine.context, *machine.pool_context)
