"""The device loop: a captured step repeated by a WHILE node until its counters say stop (csrc/while_graph.cpp)."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor

from fastrefine.errors import BackendError

_MODULE = "fastrefine._device_loop"
CAP, LOW = 1, 2  # of control, whose entry 0 counts the steps of the last launch


def _load() -> Any:
    """The extension; BackendError with the reason when it is absent, broken or the driver too old."""
    if os.environ.get("FASTREFINE_BUILD") == "none":  # a build of before may still lie in the checkout
        raise BackendError("FASTREFINE_BUILD=none")
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as cause:
        if isinstance(cause, ModuleNotFoundError) and cause.name == _MODULE:
            raise BackendError(f"{_MODULE} is not built; it needs nvcc, FASTREFINE_BUILD=cuda pip install says why") from None
        raise BackendError(f"{_MODULE} exists but does not load: {cause}") from cause
    if reason := module.unavailable():
        raise BackendError(reason)
    return module


def available() -> str:
    """ "ok", or in one line why the device loop cannot run here. Creates no CUDA context."""
    try:
        _load()
    except BackendError as reason:
        return str(reason)
    return "ok"


class WhileGraph:
    """Repeats a captured step on the GPU, without the host.

    graph     captured with ``CUDAGraph(keep_graph=True)``; its memory pool lives until ``close``
    counters  int64 (3 or more,), contiguous, on the GPU, written by the step; order as in ``slots.py``

    The caller keeps whatever else the captured kernels read and write: static tensors, compiled kernels.
    Raises BackendError when the device loop is absent here, when the step holds a node that a WHILE body may not
    (events, allocations, host functions, conditionals), or when CUDA refuses the graph.
    """

    _loop: Any = None

    def __init__(self, graph: torch.cuda.CUDAGraph, counters: Tensor) -> None:
        if counters.device.type != "cuda" or counters.dtype != torch.int64 or not counters.is_contiguous():
            raise ValueError(f"counters: wanted contiguous int64 on a GPU, got {counters.dtype} on {counters.device}")
        if counters.numel() < 3:
            raise ValueError(f"counters: wanted 3 or more, got {counters.numel()}")
        module = _load()
        self.graph: torch.cuda.CUDAGraph | None = graph
        self.counters = counters
        self.device = counters.device
        self.control = counters.new_zeros(3)
        self._written = [0, 0, 0]  # what control holds once the stream has come so far
        self._launched = torch.cuda.Event()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        given = graph.raw_cuda_graph(), counters.data_ptr(), self.control.data_ptr()
        try:
            self._loop = module.WhileGraph(*given, device=self.device.index, stream=stream)
        except (RuntimeError, ValueError) as cause:
            raise BackendError(f"device loop: {cause}") from cause

    def launch(self, cap: int, low: int = 0) -> None:
        """Queue steps on the current stream of the device until LIVE is 0, ``cap`` steps are done or fewer than ``low``
        ids wait (END - NEXT); whichever holds at the start, no step runs. Returns at once.

        ``low`` = 0: no more proposals are to come.
        Launches must follow one another: on one stream, or on streams that wait for each other.
        """
        if self._loop is None:
            raise ValueError("launch: this WhileGraph was closed")
        if cap < 1 or low < 0:
            raise ValueError(f"launch: wanted cap >= 1 and low >= 0, got {cap} and {low}")
        stream = torch.cuda.current_stream(self.device)
        for entry, value in ((CAP, cap), (LOW, low)):
            if self._written[entry] != value:
                # A fill carries its value with the launch: no buffer of the host that a copy in flight still reads.
                self.control[entry].fill_(value)
                self._written[entry] = value
        self._loop.launch(stream.cuda_stream)
        self._launched.record(stream)

    def close(self) -> None:
        """Wait for the last launch, then give up the graphs. A second time does nothing."""
        loop, self._loop = self._loop, None
        if loop is not None:
            self._launched.synchronize()
            loop.destroy()
            self.graph = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()
