"""The cut of a traced generator into prefix and tail.

What depends on the node of the cut value is the tail. Everything else the tail needs is **context**, computed once per
sample by the prefix. Which values to carry is a minimum cut over bytes per sample plus a price for every kernel that
would be computed again at each step: of a StyleGAN2 the styles are carried, not the much larger weights per sample that
follow from them. Sizes taken from the latents become sizes of the tail's own batch.
"""

import operator
from dataclasses import dataclass
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn

from fastrefine.errors import SplitError
from fastrefine.networks.tracing import Traced

# Bytes per sample that one more kernel per step is worth. Modules and products of matrices cost much more.
KERNEL_PRICE, PRODUCT_PRICE = 1 << 12, 1 << 20
_VIEWS = {
    "view", "reshape", "getitem", "split", "chunk", "unbind", "expand", "transpose", "permute", "unsqueeze", "squeeze",
    "flatten", "unflatten", "slice", "select", "t", "alias", "view_as", "expand_as", "narrow", "detach", "getattr",
}  # fmt: skip
_PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "bmm", "addmm", "einsum", "baddbmm", "convolution"}
_RANDOM = {
    "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "normal", "normal_", "uniform_", "bernoulli",
    "bernoulli_", "multinomial", "dropout", "randperm",
}  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """What a node gave at two batch sizes. ``batches`` are these sizes, both odd so that few constants equal them."""

    values: tuple[Any, Any]  # of tensors: their meta twins
    batches: tuple[int, int]

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.values[0], Tensor) and isinstance(self.values[1], Tensor)

    @property
    def per_sample(self) -> bool:
        if not self.is_tensor:
            return False
        shapes = [value.shape for value in self.values]
        return all(len(s) > 0 and s[0] == n for s, n in zip(shapes, self.batches, strict=True)) and (
            shapes[0][1:] == shapes[1][1:]
        )

    @property
    def bytes_per_sample(self) -> float:
        value = self.values[0]
        return value.numel() * value.element_size() / self.batches[0]

    def as_size(self) -> Any:
        """The value as a function of the batch size: ints become (slope, offset); ``None`` if it is no such thing."""
        return _size_formula(self.values[0], self.values[1], self.batches)


@dataclass(frozen=True)
class _Affine:
    slope: int
    offset: int


@dataclass(frozen=True)
class _Constant:
    value: Any


def _size_formula(first: Any, second: Any, batches: tuple[int, int]) -> Any:
    if type(first) is int and type(second) is int:
        slope, remainder = divmod(second - first, batches[1] - batches[0])
        return None if remainder else _Affine(slope, first - slope * batches[0])
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        parts = tuple(_size_formula(a, b, batches) for a, b in zip(first, second, strict=True))
        return None if any(part is None for part in parts) else parts
    if first is None or isinstance(first, (bool, float, str, torch.dtype, torch.device)):
        return _Constant(first) if type(first) is type(second) and first == second else None
    return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the metadata of every node's value."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = torch.utils._pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), result)
        return result


def cut_graph(traced: Traced, samples: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> tuple[nn.Module, nn.Module]:
    """(prefix, tail) of a traced generator; ``samples``: inputs of two different odd batch sizes.

    Raises SplitError naming what the tail needs and what cannot be carried per sample.
    """
    marker, nodes = traced.marker, list(traced.graph.nodes)
    recorders = [_Recorder(traced.root, traced.graph) for _ in samples]
    with torch.no_grad():
        for recorder, inputs in zip(recorders, samples, strict=True):
            recorder.run(*inputs)
    batches = (samples[0][0].shape[0], samples[1][0].shape[0])
    seen = {node: _Seen((recorders[0].seen[node], recorders[1].seen[node]), batches) for node in recorders[0].seen}
    result = nodes[-1].args[0]
    while isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    if not isinstance(result, fx.Node):
        raise SplitError("the generator's output is not one tensor")

    after = {marker}  # all that depends on the cut value
    sizes: dict[fx.Node, Any] = {}  # numbers known from the batch size alone
    varying: set[fx.Node] = set()  # not constant and not after the cut: carried, or computed from what is carried
    for node in nodes:
        if any(i in after for i in node.all_input_nodes):
            after.add(node)
        elif node is not marker and node in seen:
            formula = None if node.op in ("placeholder", "get_attr") else seen[node].as_size()
            if formula is not None:
                sizes[node] = formula
            elif (
                node.op == "placeholder"
                or _is_random(node)
                or any(i in varying or _depends_on_batch(sizes.get(i)) for i in node.all_input_nodes)
            ):
                varying.add(node)
    if result not in after:
        raise SplitError("the generator's output does not depend on the cut")
    order = {node: position for position, node in enumerate(nodes)}
    context = sorted(_choose_context(after - {marker}, varying, seen), key=order.__getitem__)
    before = next(iter(marker.all_input_nodes))
    prefix = _prefix_graph(nodes, before, context)
    tail = _tail_graph(nodes, marker, context, sizes, result)
    return fx.GraphModule(traced.root, prefix).eval(), fx.GraphModule(traced.root, tail).eval()


def _choose_context(after: set[fx.Node], varying: set[fx.Node], seen: dict[fx.Node, _Seen]) -> list[fx.Node]:
    """The cheapest set of per-sample tensors from which all that ``after`` needs of ``varying`` can be had.

    Each node is an edge in -> out whose capacity is its bytes per sample. A node on the sink's side is computed by the
    tail, which costs the edge source -> in (its kernel); an edge that crosses in -> out is carried.
    """
    needed = {i for node in after for i in node.all_input_nodes if i in varying}
    if not needed:
        return []
    network = nx.DiGraph()

    def edge(start: Any, end: Any, capacity: float | None = None) -> None:
        # an edge without capacity is never cut
        network.add_edge(start, end, **({} if capacity is None else {"capacity": capacity}))

    for node in varying:
        facts = seen[node]
        edge((node, "in"), (node, "out"), facts.bytes_per_sample + 1e-6 if facts.per_sample else None)
        for i in node.all_input_nodes:
            if i in varying:
                edge((i, "out"), (node, "in"))
        if node.op == "placeholder" or _is_random(node):
            edge("source", (node, "in"))
        elif price := _price(node, facts):
            edge("source", (node, "in"), price)
    for node in needed:
        edge((node, "out"), "sink")
    if "source" not in network:
        return []
    try:
        _, (prefix_side, _) = nx.minimum_cut(network, "source", "sink")
    except nx.NetworkXUnbounded:
        stuck = [n for n in varying if _is_random(n) and not seen[n].per_sample]
        raise SplitError(
            "the tail needs values that do not belong to one sample and so cannot be carried as context: "
            + ", ".join(sorted(_describe(n) for n in stuck or needed))
        ) from None
    return [n for n in varying if (n, "in") in prefix_side and (n, "out") not in prefix_side]


def _prefix_graph(nodes: list[fx.Node], activation: fx.Node, context: list[fx.Node]) -> fx.Graph:
    keep = _ancestors([activation, *context], set())
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in keep or node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[activation], tuple(copies[node] for node in context)))
    return graph


def _tail_graph(
    nodes: list[fx.Node], marker: fx.Node, context: list[fx.Node], sizes: dict[fx.Node, Any], result: fx.Node
) -> fx.Graph:
    graph = fx.Graph()
    given = {marker: graph.placeholder("activation")}
    for index, node in enumerate(context):
        given[node] = graph.placeholder(f"context_{index}")
    copies: dict[fx.Node, Any] = dict(given)
    keep = _ancestors([result], set(given) | set(sizes))
    batch = graph.call_method("size", (given[marker], 0))

    def resolve(node: fx.Node) -> Any:
        if node not in copies:
            copies[node] = _write_size(graph, sizes[node], batch)
        return copies[node]

    for node in nodes:
        if node in keep and node not in copies and node not in sizes:
            copies[node] = graph.node_copy(node, resolve)
    graph.output(copies[result])
    if not batch.users:
        graph.erase_node(batch)
    return graph


def _ancestors(ends: list[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                pending.extend(node.all_input_nodes)
    return found


def _write_size(graph: fx.Graph, formula: Any, batch: fx.Node) -> Any:
    if isinstance(formula, tuple):
        return tuple(_write_size(graph, part, batch) for part in formula)
    if isinstance(formula, _Constant):
        return formula.value
    if formula.slope == 0:
        return formula.offset
    size: Any = batch if formula.slope == 1 else graph.call_function(operator.mul, (batch, formula.slope))
    return graph.call_function(operator.add, (size, formula.offset)) if formula.offset else size


def _depends_on_batch(formula: Any) -> bool:
    if isinstance(formula, tuple):
        return any(_depends_on_batch(part) for part in formula)
    return isinstance(formula, _Affine) and formula.slope != 0


def _operation(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def _is_random(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and _operation(node) in _RANDOM


def _price(node: fx.Node, facts: _Seen) -> float:
    """Of computing a node again at each step, in bytes per sample."""
    name = _operation(node)
    if name in _VIEWS:
        return 0.0
    return float(PRODUCT_PRICE if node.op == "call_module" or name in _PRODUCTS else KERNEL_PRICE)


def _describe(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"{_operation(node)} in {stack[-1][0].removeprefix('generator.')!r}" if stack else _operation(node)
