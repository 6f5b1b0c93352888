"""How a step repeats: launched from Python, replayed as a CUDA graph, or looped on the device. All give the same results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fastrefine.errors import BackendError, InputError
from fastrefine.machine import Machine

log = logging.getLogger("fastrefine")

NAMES = ("auto", "host", "graph", "loop")
WARM_UPS = 3  # calls before a capture: compilers, algorithm choices and library handles come into being


class Driver(Protocol):
    """chunk: steps at most between two reads of the counters. lag: reads that may be outstanding while steps go on.

    stops_itself: ends a chunk where no slot is live or, with low > 0, where fewer than ``low`` proposals wait.
    """

    name: str
    chunk: int
    lag: int
    stops_itself: bool

    def prepare(self, machine: Machine, forward: bool) -> None:
        """Make the machine, whose slots are empty, ready; forward: forward-only steps will be asked for."""

    def launch(self, machine: Machine, schedule: Sequence[bool], low: int) -> None:
        """Start one step for each entry (True: forward only), in stream order, without waiting for any."""


class HostLoop:
    """Every step is launched from Python, and the counters are read after each."""

    name, chunk, lag, stops_itself = "host", 1, 0, False

    def prepare(self, machine: Machine, forward: bool) -> None:
        pass

    def launch(self, machine: Machine, schedule: Sequence[bool], low: int) -> None:
        for forward_only in schedule:
            machine.step(forward_only)


class CudaRuntime:
    """Captures on the current device; what is captured runs in order of the stream that replays it."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def capture(self, step: Callable[[], None], beside: Any = None) -> torch.cuda.CUDAGraph:
        """``step`` as a graph; it shares the memory of ``beside``, a graph that never runs at the same time."""
        stream, current = self.stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        # the backward thread would launch outside the capture (only networks without a flat step use autograd)
        with torch.autograd.set_multithreading_enabled(False):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            pool = None if beside is None else beside.pool()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        current.wait_stream(stream)
        return graph

    def loop(self, graph: torch.cuda.CUDAGraph, machine: Machine) -> Any:
        """The graph as the body of a loop on the device."""
        from fastrefine.while_graph import WhileGraph

        return WhileGraph(graph, machine.pool.counters)


class GraphReplay:
    """The step is captured once and replayed; counters are read one chunk late, so the device never waits for the host."""

    name, chunk, lag, stops_itself = "graph", 64, 1, False

    def __init__(self, runtime: Any):
        self.runtime = runtime

    def prepare(self, machine: Machine, forward: bool) -> None:
        known = machine.captured
        if "step" not in known:
            known["step"] = self.runtime.capture(machine.step)
        if forward and "forward" not in known:
            known["forward"] = self.runtime.capture(lambda: machine.step(True), beside=known["step"])

    def launch(self, machine: Machine, schedule: Sequence[bool], low: int) -> None:
        for forward_only in schedule:
            machine.captured["forward" if forward_only else "step"].replay()


class DeviceLoop:
    """The captured step is the body of a WHILE node: it ends exactly when no slot is live or proposals run out."""

    name, chunk, lag, stops_itself = "loop", 256, 1, True

    def __init__(self, runtime: Any):
        self.runtime = runtime

    def prepare(self, machine: Machine, forward: bool) -> None:
        if "loop" not in machine.captured:
            machine.captured["loop"] = self.runtime.loop(self.runtime.capture(machine.step), machine)

    def launch(self, machine: Machine, schedule: Sequence[bool], low: int) -> None:
        machine.captured["loop"].launch(len(schedule), low)


def choose(name: str, device: torch.device) -> Driver:
    """The driver of that name for this device; InputError where it cannot run."""
    if name not in NAMES:
        raise InputError(f"driver is {name!r}; wanted one of {', '.join(map(repr, NAMES))}")
    if device.type != "cuda":
        if name in ("graph", "loop"):
            raise InputError(f"driver={name!r} needs a CUDA device, this is {device.type!r}: use 'auto' or 'host'")
        return HostLoop()
    kinds: dict[str, Callable[[CudaRuntime], Driver]] = {"graph": GraphReplay, "loop": DeviceLoop}
    return HostLoop() if name == "host" else kinds.get(name, GraphReplay)(CudaRuntime(device))


def prepare(driver: Driver, machine: Machine, forward: bool, may_fall_back: bool) -> Driver:
    """The driver with its machine ready, or the host loop where the step cannot be captured and nobody asked for it."""
    try:
        driver.prepare(machine, forward)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, BackendError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not may_fall_back:
            raise BackendError(f"driver={driver.name!r} cannot repeat this step: {reason}; use driver='host'") from error
        log.warning("the step cannot be captured, so it is launched from Python: %s", reason)
        machine.captured.clear()
        return HostLoop()
    return driver
