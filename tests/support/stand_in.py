"""Graph capture without a GPU: what the drivers ask of CUDA, with its rules, on CPU tensors.

A capture records every operation with the very tensors it met; a replay runs them again and writes the results where the
recorded ones were. As on a device, decisions of Python are baked in, tensors that were not there at capture are never
seen, and reading a value on the host or drawing from torch's generators while capturing is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastrefine import ops
from fastrefine.engine import drivers
from fastrefine.engine.drivers import NoHostReads
from fastrefine.ops.slots import END, LIVE, NEXT

OPAQUE = ("refine_step", "copy_context")  # ops that no dispatcher sees: C++ and interpreted Triton


class _Recorder(NoHostReads):
    def __init__(self, tape: list[Callable[[], None]]):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        fresh = [(i, t) for i, t in enumerate(tree_flatten(made)[0]) if isinstance(t, Tensor)]
        fresh = [(i, t) for i, t in fresh if t.untyped_storage().data_ptr() not in inputs]

        def again() -> None:
            found = tree_flatten(func(*args, **kwargs))[0]
            for index, kept in fresh:
                kept.copy_(found[index])

        if fresh or func._schema.is_mutable:  # else a view
            self.tape.append(again)
        return made


class Graph:
    """A captured step."""

    def __init__(self, step: Callable[[], None]):
        self.tape: list[Callable[[], None]] = []
        self.replays = 0
        originals = {name: getattr(ops, name) for name in OPAQUE}
        recorder = _Recorder(self.tape)

        def opaque(name: str) -> Callable[..., None]:
            def record(*args: Any, backend: str = "reference") -> None:
                # on a CPU the reference of ``copy_context`` looks which slots were refilled, on a GPU it does not
                if backend == "reference" and name != "copy_context":
                    originals[name](*args, backend=backend)  # the dispatcher sees it
                    return
                self.tape.append(lambda: originals[name](*args, backend=backend))

            return record

        for name in OPAQUE:
            setattr(ops, name, opaque(name))
        try:
            with recorder:
                step()
        finally:
            for name, original in originals.items():
                setattr(ops, name, original)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for again in self.tape:
                again()


class Loop:
    """A graph as the body of a WHILE node: the condition of csrc/ in Python."""

    def __init__(self, graph: Graph, counters: Tensor):
        self.graph, self.counters = graph, counters

    def launch(self, cap: int, low: int) -> None:
        for _ in range(cap):
            known = self.counters.tolist()
            if known[LIVE] == 0 or known[END] - known[NEXT] < low:
                return
            self.graph.replay()


class Runtime:
    """Stands for ``drivers.CudaRuntime``."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.attempts = 0

    def capture(self, step: Callable[[], None], beside: Any = None, replayed: bool = True) -> Graph:
        self.attempts += 1
        for _ in range(3):
            step()
        self.graphs.append(Graph(step))
        return self.graphs[-1]

    def loop(self, graph: Graph, machine: Any) -> Loop:
        return Loop(graph, machine.pool.counters)


KINDS = {"graph": drivers.GraphReplay, "loop": drivers.DeviceLoop}
