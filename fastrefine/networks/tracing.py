"""A generator as an fx graph in which the output of one call of one module is marked."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastrefine.errors import SplitError


def cut_marker(value: Tensor) -> Tensor:
    """Identity; its node stands for the output of the cut module."""
    return value


@dataclass(frozen=True)
class Traced:
    """A traced generator: ``root`` holds the graph's modules and tensors, ``marker`` is the node of the cut value."""

    root: nn.Module
    graph: fx.Graph
    marker: fx.Node


class _CutTracer(fx.Tracer):
    def __init__(self, cut: nn.Module, call: int, ancestors: set[nn.Module], coarse: bool) -> None:
        super().__init__()
        self.cut, self.call, self.ancestors, self.coarse = cut, call, ancestors, coarse
        self.calls_seen = 0
        self.marker: fx.Node | None = None

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if module in self.ancestors:
            return False
        return self.coarse or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        if m is self.cut:
            if self.calls_seen == self.call:
                output = self.create_proxy("call_function", cut_marker, (output,), {})
                self.marker = output.node
            self.calls_seen += 1
        return output


def trace_with_fx(root: nn.Module, cut: nn.Module, call: int, coarse: bool) -> Traced:
    """Trace ``root`` symbolically; coarse: only the modules that contain ``cut`` are looked into.

    Coarse tracing keeps control flow and autograd functions inside all other modules as they are.
    """
    ancestors = {module for module in root.modules() if module is not cut and cut in set(module.modules())}
    tracer = _CutTracer(cut, call, ancestors, coarse)
    graph = tracer.trace(root)
    if tracer.marker is None:
        raise SplitError("the cut module did not run while tracing")
    return Traced(root, graph, tracer.marker)


@functools.cache
def _export_marker() -> tuple[torch.library.Library, Any]:
    """The same marker as an operator, because torch.export follows tensors, not Python functions."""
    library = torch.library.Library("fastrefine_split", "FRAGMENT")
    library.define("cut_marker(Tensor value) -> Tensor")
    library.impl("cut_marker", lambda value: value.clone(), "CompositeExplicitAutograd")
    return library, torch.ops.fastrefine_split.cut_marker.default


def trace_with_export(root: nn.Module, cut: nn.Module, call: int, inputs: tuple[Tensor, ...]) -> Traced:
    """Trace by torch.export with a dynamic batch: follows Python control flow that does not depend on values."""
    marker_op = _export_marker()[1]
    calls_seen = 0

    def mark(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls_seen
        calls_seen += 1
        return marker_op(output) if calls_seen == call + 1 else None

    batch = torch.export.Dim("batch", min=2)
    handle = cut.register_forward_hook(mark)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(root, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    finally:
        handle.remove()
    module = program.module()
    markers = [node for node in module.graph.nodes if node.target is marker_op]
    if len(markers) != 1:
        raise SplitError(f"torch.export saw the cut {len(markers)} times")
    return Traced(module, module.graph, markers[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints graphs and warnings where it fails; its exception says enough."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
