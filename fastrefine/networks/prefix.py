"""A recorded step in parts: what does not depend on the activation is computed once for each sample, and carried with it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from fastrefine.networks.cpu_forms import with_equal_rows
from fastrefine.networks.recording import Effects, Held, Modules, fold_constants, hold_weights, is_view

aten = torch.ops.aten


class Recording(NamedTuple):
    """A recorded step: prefix(*context) -> carried, step(state..., *carried) -> (logit, loss, gradient), forward the same
    without the gradient. Without a prefix the context itself is carried. held: what both read that depends on weights alone."""

    prefix: fx.GraphModule | None
    step: fx.GraphModule
    forward: fx.GraphModule
    held: Held | None = None

    def with_held_weights(self) -> Recording:
        """The same, where what depends on weights alone is not computed in every step."""
        (step, forward), held = hold_weights([self.step, self.forward])
        return Recording(self.prefix, step, forward, held)

    def with_equal_rows(self, state: torch.dtype, modules: Modules) -> Recording:
        """Copies in which a row has the same bits at every place in the batch, on a CPU."""
        step, forward = (with_equal_rows(graph, state) for graph in self[1:3])  # type: ignore[arg-type]
        prefix = None if self.prefix is None else with_equal_rows(self.prefix, state)
        for graph in (prefix, step, forward):
            if graph is not None:
                fold_constants(graph, modules)
        return Recording(prefix, step, forward, self.held)


def first_outputs(graph: fx.GraphModule, count: int, effects: Effects) -> fx.GraphModule:
    """A graph with the first outputs of ``graph`` alone, and what they need."""
    nodes = list(graph.graph.nodes)
    wanted = nodes[-1].args[0][:count]
    return _part(graph, [n for n in nodes if n.op == "placeholder"], wanted, effects)


def without_prefix(graph: fx.GraphModule, state: int, rows: int, effects: Effects) -> Recording:
    """The recorded step with all that does not depend on its first ``state`` arguments taken out, as far as that pays.

    What crosses from the prefix into the step is carried with each sample, so it must have the sample axis first. Which
    values cross is a minimum cut over bytes per sample plus a price for each kernel that the step would run again: of a
    StyleGAN2 the styles cross, not the much larger weights per sample that follow from them.
    """
    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    moving, varying = set(inputs[:state]), set(inputs[state:])
    for node in nodes:
        sources = _sources(node, effects)
        if sources & moving:
            moving.add(node)
        elif sources & varying:
            varying.add(node)
    outputs = nodes[-1].args[0]
    alive = _needed(outputs, effects, set())
    cheapest = _cheapest(moving & alive, varying & alive, effects, rows)
    crossing = [n for n in nodes if n in cheapest]
    prefix = _part(graph, inputs[state:], crossing, effects)
    step = _part(graph, [*inputs[:state], *crossing], outputs, effects)
    return Recording(prefix, step, _part(graph, [*inputs[:state], *crossing], outputs[:2], effects))


def _sources(node: fx.Node, effects: Effects) -> set[fx.Node]:
    return {*node.all_input_nodes, *effects.before[node]}


def _needed(ends: Iterable[fx.Node], effects: Effects, given: set[fx.Node]) -> set[fx.Node]:
    """The nodes that ``ends`` depend on, themselves included, as far back as the ``given`` ones."""
    found: set[fx.Node] = set()
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in given:
                pending.extend(_sources(node, effects))
    return found


def _part(graph: fx.GraphModule, given: list[fx.Node], outputs: Iterable[fx.Node], effects: Effects) -> fx.GraphModule:
    """The part of ``graph`` that computes ``outputs`` from ``given``."""
    outputs, part = tuple(outputs), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(given):
        copies[node] = part.placeholder(f"given{index}")
        copies[node].meta = dict(node.meta)
    needed = _needed(outputs, effects, set(given))
    for node in graph.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return _LazyGraphModule(graph, part)


# Bytes per sample that one more kernel in each step is worth. A product of matrices costs much more.
_KERNEL_PRICE, _PRODUCT_PRICE = 1 << 12, 1 << 20
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "_linear_pointwise"}


def _cheapest(moving: set[fx.Node], varying: set[fx.Node], effects: Effects, rows: int) -> set[fx.Node]:
    """The values to carry: a minimum cut between the context and what depends on the activation.

    Each node is an edge in -> out whose capacity is its bytes per sample; a value without the sample axis, or whose memory
    is written to, cannot be carried. A node on the step's side is computed by the step, which costs the edge source -> in.
    """
    import networkx as nx  # type: ignore[import-untyped]

    needed = {i for node in moving for i in _sources(node, effects) if i in varying}
    if not needed:
        return set()
    network = nx.DiGraph()

    def edge(start: Any, end: Any, capacity: float | None = None) -> None:
        network.add_edge(start, end, **({} if capacity is None else {"capacity": capacity}))  # without one it is never cut

    for node in varying:
        value = node.meta.get("val")
        size = None
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows and node not in effects.written:
            size = value.numel() * value.element_size() / rows + 1e-6
        edge((node, "in"), (node, "out"), size)
        for i in _sources(node, effects):
            if i in varying:
                edge((i, "out"), (node, "in"))
        name = node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""
        if node.op == "placeholder":
            edge("source", (node, "in"))
        elif node.target is not operator.getitem and not is_view(node.target):
            edge("source", (node, "in"), float(_PRODUCT_PRICE if name in _PRODUCTS else _KERNEL_PRICE))
    for node in needed:
        edge((node, "out"), "sink")
    _, (prefix_side, _) = nx.minimum_cut(network, "source", "sink")
    return {n for n in varying if (n, "in") in prefix_side and (n, "out") not in prefix_side}
