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

from fastrefine.engine.machine import Machine
from fastrefine.errors import BackendError, InputError
from fastrefine.networks.calls import is_out_of_memory

log = logging.getLogger(__name__)

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
    """Every step is launched from Python, and the counters are read where a sample may have retired."""

    name, chunk, lag, stops_itself = "host", 8, 0, False

    def prepare(self, machine: Machine, forward: bool) -> None:
        pass

    def launch(self, machine: Machine, schedule: Sequence[bool], low: int) -> None:
        for forward_only in schedule:
            machine.step(forward_only)


class NoHostReads(TorchDispatchMode):
    """Refuses what reads a value of the device on the host: it would break a capture, and leave torch in disorder."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _depends_on_values(func, args, kwargs):
            raise BackendError(f"a network reads values of the device on the host ({func})")
        if torch.Tag.nondeterministic_seeded in func.tags and _drops_out(func, args, kwargs):
            raise BackendError(f"a network draws from torch's generator ({func})")
        return func(*args, **kwargs)


def _depends_on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host must know values to go on: a scalar, or a shape, for which an index must be a mask; or moves them."""
    aten = torch.ops.aten
    if func is aten.index.Tensor:
        return _has_mask(args[1])
    if func.overloadpacket in (aten.index_put, aten.index_put_, aten._index_put_impl_):
        value = args[2]
        return _has_mask(args[1]) and not (value.numel() == 1 and value.device.type == "cpu")  # else torch fills the mask
    if func is aten._to_copy.default:
        wanted = kwargs.get("device")
        return wanted is not None and torch.device(wanted).type != args[0].device.type
    if func.overloadpacket in (aten.copy_, aten.copy):
        return args[1].device.type != args[0].device.type
    if func is aten.lift_fresh.default:
        return args[0].device.type != "cpu"  # torch.tensor([...], device=...) has just copied it there
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


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
        pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool()
        with self._one_at_a_time, _on(self.stream), _no_garbage_collection():
            # the backward thread would launch outside the capture (only networks without a flat step use autograd)
            with torch.autograd.set_multithreading_enabled(False):
                for _ in range(WARM_UPS):
                    step()
                with NoHostReads():
                    step()
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    self._end(graph, pool)
            if replayed:
                graph.instantiate()
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """End the capture. A broken one keeps its pool (torch 2.11 to 2.13), and nothing could be captured or freed again."""
        try:
            graph.capture_end()
        except RuntimeError:
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                if hasattr(torch._C, name):
                    with contextlib.suppress(RuntimeError):  # a torch that gives it up itself
                        getattr(torch._C, name)(self.stream.device_index, pool)  # type: ignore[union-attr]
            raise

    def loop(self, graph: torch.cuda.CUDAGraph, machine: Machine) -> Any:
        """The graph as the body of a loop on the device."""
        from fastrefine.engine.while_graph import WhileGraph

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
    """The driver with its machine ready, or the host loop where the step cannot be captured and "auto" was asked for."""
    refused, cause = machine.target.refused, None
    key = driver.name, type(machine.rule.sampler)
    if key not in refused:
        try:
            driver.prepare(machine, forward)
            return driver
        except (RuntimeError, BackendError, InputError) as error:
            machine.captured.clear()
            if is_out_of_memory(error):
                raise
            if error.__context__ is not None and is_out_of_memory(error.__context__):  # the end of the capture failed too
                raise error.__context__ from error
            cause, refused[key] = error, _reason(error)
            if may_fall_back:
                log.warning("the step cannot be captured, so it is launched from Python: %s", refused[key])
    if not may_fall_back:
        reason = refused[key]
        raise BackendError(f"driver={driver.name!r} cannot repeat this step: {reason}; use driver='host'") from cause
    return HostLoop()


def _reason(error: BaseException) -> str:
    """One line; the end of a broken capture only says that something went wrong before."""
    if error.__context__ is not None and "previous error during capture" in str(error):
        return _reason(error.__context__)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
