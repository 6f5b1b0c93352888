"""How a step repeats. The host loop serves every device; drivers that stay on the device take the same two calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from fastrefine.errors import InputError
from fastrefine.slots import Pool

NAMES = ("auto", "host")
SMALL_WORK = 2e8  # FLOPs of an evaluation of all slots below which one thread beats several (OpenMP barriers)


class HostLoop:
    """One step per call, launched from Python; the counters are read after each."""

    name = "host"

    def advance(self, step: Callable[[], None], pool: Pool) -> list[int]:
        """Run ``step`` and return the counters of the pool (see slots)."""
        step()
        return pool.counters.tolist()


def choose(name: str, device: torch.device) -> HostLoop:
    """The driver of that name for this device; InputError where it cannot run."""
    if name not in NAMES:
        raise InputError(f"driver is {name!r}; wanted one of {', '.join(map(repr, NAMES))}")
    return HostLoop()


@contextlib.contextmanager
def threads_for(flops: float | None) -> Iterator[int]:
    """Use one thread where the work of an evaluation is small, else as many as torch has; put back afterwards."""
    before = torch.get_num_threads()
    count = 1 if flops is not None and flops < SMALL_WORK else before
    if count != before:
        torch.set_num_threads(count)
    try:
        yield count
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def arithmetic(precision: str, deterministic: bool) -> Iterator[None]:
    """TF32 on only for "tf32", deterministic algorithms on request; the caller's settings come back afterwards."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
