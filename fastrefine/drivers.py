"""How a step repeats: launched from Python, replayed as a CUDA graph, or looped on the device. All give the same results."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrefine.errors import BackendError, InputError
from fastrefine.machine import Machine
from fastrefine.pair import is_out_of_memory

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


class NoHostReads(TorchDispatchMode):
    """Refuses what reads a value of the device on the host: it would break a capture, and leave torch in disorder."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _depends_on_values(func, args):
            raise RuntimeError(f"a network reads values of the device on the host ({func})")
        if torch.Tag.nondeterministic_seeded in func.tags and _drops_out(func, args, kwargs):
            raise RuntimeError(f"a network draws from torch's generator ({func})")
        return func(*args, **kwargs)


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host must know values to go on: a scalar, or a shape; for an index only if it is a mask."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _drops_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw random numbers does: attention has a probability of dropout, 0 in eval mode."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" not in names or bool(given.get("dropout_p", 0.0))


class CudaRuntime:
    """Captures on the current device; what is captured runs in order of the stream that replays it."""

    _one_at_a_time = threading.Lock()  # torch knows one capture in a process

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: torch.cuda.Stream | None = None

    def capture(self, step: Callable[[], None], beside: Any = None, replayed: bool = True) -> torch.cuda.CUDAGraph:
        """``step`` as a graph; it shares the memory of ``beside``, a graph that never runs at the same time.

        replayed: make it ready to be replayed now; else it will be part of another graph.
        """
        self.stream = self.stream or torch.cuda.Stream(self.device)  # one for all of a machine: they share memory
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        pool = None if beside is None else beside.pool()
        with self._one_at_a_time, _on(self.stream), _no_garbage_collection():
            # the backward thread would launch outside the capture (only networks without a flat step use autograd)
            with torch.autograd.set_multithreading_enabled(False):
                for _ in range(WARM_UPS):
                    step()
                with NoHostReads():
                    step()
                with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                    step()
            if replayed:
                graph.instantiate()
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
            machine.captured["loop"] = self.runtime.loop(self.runtime.capture(machine.step, replayed=False), machine)

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
    target, cause = machine.target, None
    if target.refused is None:
        try:
            driver.prepare(machine, forward)
            return driver
        except (RuntimeError, BackendError) as error:
            machine.captured.clear()
            if is_out_of_memory(error):
                raise
            if error.__context__ is not None and is_out_of_memory(error.__context__):  # the end of the capture failed too
                raise error.__context__ from error
            cause, target.refused = error, str(error).splitlines()[0] if str(error) else type(error).__name__
            if may_fall_back:
                log.warning("the step cannot be captured, so it is launched from Python: %s", target.refused)
    if not may_fall_back:
        raise BackendError(f"driver={driver.name!r} cannot repeat this step: {target.refused}; use driver='host'") from cause
    return HostLoop()


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work goes to ``stream``, after what was launched and before what will be; a failed capture does not put it back."""
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)
        before.wait_stream(stream)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected may be a graph, whose end would break a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
