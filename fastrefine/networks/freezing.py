"""coupling="freeze": statistics of the batch in a discriminator, held at what they are on reference images.

The forward pass is recorded for one group of samples. Replacing samples one by one shows which values depend on several of
them, and exchanging two of them shows which of these are statistics, equal for all their samples. The fewest numbers that
separate the mixing from the logits are held. Then each sample is judged by itself, and may leave its slot alone.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._pytree import tree_leaves

from fastrefine.errors import CouplingError

aten = torch.ops.aten

GROUP = 8  # samples of a group where the caller names no number
MOST_REFERENCES = 256  # samples
_MOST_EXCHANGES = 28  # pairs of samples
_LARGEST_STATISTIC = 2**20  # elements
_MOST_LAYERS = 8  # layers one after the other that mix samples
_SAME = 1e-4  # tolerated relative difference of two float32 results that should be equal

Heads = Callable[..., list[Tensor]]  # heads(network, x, *values): what D gives, as (n, P) for each head


class FrozenDiscriminator(nn.Module):
    """``frozen(x, *values)``: a list of heads (n, 1, P), of which no sample's depends on its companions in the batch.

    network: in evaluation mode. reference: images and further inputs (n, ...) on which the statistics are taken, at least
    two. group: samples among which the network mixes, e.g. 4 for StyleGAN2's minibatch standard deviation.

    Raises CouplingError where what mixes the samples is no statistic, or where the network cannot be recorded.
    """

    def __init__(self, network: nn.Module, heads: Heads, reference: tuple[Tensor, ...], group: int | None):
        super().__init__()
        self._reference = _Shared(reference)
        self._of = _Shared((network, heads))
        self._names = [name for name, _ in _tensors_of(network)]
        for index, (_, value) in enumerate(_tensors_of(network)):
            self.register_buffer(f"weight{index}", value)
        self._rounds: list[tuple[list[str], list[list[int]]]] = []  # nodes held together, and the axes that are averaged
        self._count = 0  # of held values
        self.group = group or min(GROUP, 1 << (len(reference[0]).bit_length() - 1))
        if len(reference[0]) < max(self.group, 2):
            raise CouplingError(
                f"coupling='freeze' takes its statistics from groups of {max(self.group, 2)} reference images, and there are "
                f"{len(reference[0])}: pass more of them as real=, or a smaller group_size"
            )
        self._graphs = _Shared({})  # (rows, dtype) -> graph, or None where there is none
        self._find()
        self.change, self.spread = self._effect()

    @property
    def held(self) -> list[str]:
        """Names of the nodes that are held."""
        return [name for names, _ in self._rounds for name in names]

    def updated(self, network: nn.Module) -> FrozenDiscriminator:
        """The same for other weights: what is held keeps its place and takes its value from them."""
        twin = FrozenDiscriminator.__new__(FrozenDiscriminator)
        nn.Module.__init__(twin)
        for name, value in vars(self).items():
            if name not in vars(twin):
                setattr(twin, name, value)
        for index, (_, value) in enumerate(_tensors_of(network)):
            twin.register_buffer(f"weight{index}", value)
        twin._rounds, twin._count = [], 0
        for names, over in self._rounds:
            twin._hold(names, over)
        return twin

    def forward(self, x: Tensor, *values: Tensor) -> list[Tensor]:
        rows = len(x)
        size = rows if self.ready(rows, x, *values) else self.group
        if size != rows:
            spare = torch.arange(-(-rows // size) * size, device=x.device).clamp(max=rows - 1)
            x, *values = (value[spare] for value in (x, *values))  # type: ignore[assignment]
        graph = self._graph(size, x, *values)
        parts = [self._run(graph, *given) for given in zip(*(v.split(size) for v in (x, *values)), strict=True)]
        return [torch.cat(head)[:rows, None] for head in zip(*parts, strict=True)]

    def ready(self, rows: int, *given: Tensor) -> bool:
        """Whether so many rows are evaluated at once; records that, unless something else is being recorded."""
        key = rows, given[0].dtype
        if key not in self._graphs.value and get_proxy_mode() is None:
            few = [value[torch.arange(rows, device=value.device) % len(value)] for value in given]
            self._graphs.value[key] = self._resized(rows, *few) if 0 in (rows % self.group, self.group % rows) else None
        return self._graphs.value.get(key) is not None

    @property
    def _weights(self) -> list[Tensor]:
        return [getattr(self, f"weight{index}") for index in range(len(self._names))]

    @property
    def _constants(self) -> list[Tensor]:
        return [getattr(self, f"constant{index}") for index in range(self._count)]

    def _run(self, graph: fx.GraphModule, *given: Tensor) -> tuple[Tensor, ...]:
        return graph(*self._constants, *self._weights, *given)

    def _graph(self, rows: int, *given: Tensor) -> fx.GraphModule:
        """The graph for a group, or for a number of rows that is ``ready``."""
        key = rows, given[0].dtype
        if self._graphs.value.get(key) is None:
            graph = self._record(*(value[:rows] for value in given))
            if any(name not in {node.name for node in graph.graph.nodes} for name in self.held):
                raise CouplingError(f"coupling='freeze': recorded in {given[0].dtype}, the network has other operations")
            self._graphs.value[key] = _with_held(graph, self.held)
        return self._graphs.value[key]

    @torch.no_grad()
    def _record(self, *given: Tensor) -> fx.GraphModule:
        network, heads = self._of.value
        return _record(network, heads, self._names, self._weights, tuple(value.detach() for value in given))

    def _resized(self, rows: int, *given: Tensor) -> fx.GraphModule | None:
        """The graph for another number of rows, where it gives what the group's graph gives."""
        group = self._graph(self.group, *(v[torch.arange(self.group, device=v.device) % rows] for v in given))
        if rows == self.group:
            return group
        try:
            with torch.no_grad():
                graph = _with_held(self._record(*given), self.held)
                found = torch.cat(self._run(graph, *given), 1)
                order = torch.arange(max(rows, self.group), device=given[0].device) % rows
                parts = zip(*(value[order].split(self.group) for value in given), strict=True)
                wanted = torch.cat([torch.cat(self._run(group, *part), 1) for part in parts])[:rows]
        except Exception:  # the network's own code, for a number of rows that it may not know
            return None
        return graph if _close(found, wanted) else None

    def _find(self) -> None:
        """Hold statistics until no logit depends on several samples."""
        x, *values = (value[: self.group] for value in self._reference.value)
        try:
            with torch.no_grad():
                plain = self._record(x, *values)
                self._plain = _Shared(plain)
                self._check_gradient(plain, x, values)
                double = self._shapes_of_twice_as_many(plain)
                for _ in range(_MOST_LAYERS):
                    graph = _with_held(plain, self.held)
                    names = _statistics(graph, [*self._constants, *self._weights], [x, *values])
                    if not names:
                        self._graphs.value[self.group, x.dtype] = graph
                        return
                    shapes = {node.name: node.meta["val"].shape for node in plain.graph.nodes if node.name in names}
                    spread = [
                        [d for d, (a, b) in enumerate(zip(shapes[name], double.get(name, shapes[name]), strict=True)) if a != b]
                        for name in names
                    ]
                    self._hold(names, spread)
        except CouplingError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise CouplingError(
                f"coupling='freeze': the discriminator could not be recorded: {type(error).__name__}: {text}; pass "
                "coupling='lockstep' with a group_size"
            ) from error
        raise CouplingError(f"coupling='freeze': more than {_MOST_LAYERS} layers mix samples; pass coupling='lockstep'")

    def _check_gradient(self, plain: fx.GraphModule, x: Tensor, values: list[Tensor]) -> None:
        """CouplingError where a formula for the gradient, or a detached part, is lost in a recorded forward pass."""
        network, heads = self._of.value

        def gradient(run: Callable[[Tensor], Any]) -> Tensor:
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                total = torch.stack([head.sum() for head in run(leaf)]).sum()
                return torch.autograd.grad(total, leaf)[0]

        own = gradient(lambda leaf: heads(network, leaf.clone(), *values))
        if not _close(gradient(lambda leaf: plain(*self._weights, leaf, *values)), own):
            raise CouplingError(
                "coupling='freeze' records the discriminator's forward pass, whose gradient is not the discriminator's own (a "
                "custom backward formula, or a part under no_grad); pass coupling='lockstep' with a group_size"
            )

    def _shapes_of_twice_as_many(self, plain: fx.GraphModule) -> dict[str, torch.Size]:
        """Shapes by node for two groups at once, by which an axis of samples or of groups is known; {} where that fails."""
        order = torch.arange(2 * self.group)
        try:
            given = [value[order.to(value.device) % len(value)] for value in self._reference.value]
            nodes = list(self._record(*given).graph.nodes)
        except Exception:  # a network for one size of batch
            return {}
        if [(n.name, n.target) for n in nodes] != [(n.name, n.target) for n in plain.graph.nodes]:
            return {}
        values = {n.name: n.meta.get("val") for n in nodes}
        wanted = {n.name: n.meta.get("val") for n in plain.graph.nodes}
        return {
            name: value.shape for name, value in values.items()
            if isinstance(value, Tensor) and isinstance(wanted[name], Tensor) and value.dim() == wanted[name].dim()
        }  # fmt: skip

    def _hold(self, names: list[str], over: list[list[int]]) -> None:
        """Hold these nodes at their mean over the reference groups, and over the dimensions ``over`` of each."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            graph, count = _with_outputs(_with_held(self._plain.value, self.held), names), 0
            for given in self._groups():
                for name, value in zip(names, self._run(graph, *given), strict=True):
                    found[name] = found.get(name, 0) + value.double()
                count += 1
        for name, dims in zip(names, over, strict=True):
            value = found[name] / count
            value = value.mean(dims, keepdim=True) if dims else value
            self.register_buffer(f"constant{self._count}", value.to(self._reference.value[0].dtype))
            self._count += 1
        self._rounds.append((names, over))

    def described(self) -> list[str]:
        """What is held, as operation and shape for a group, e.g. "mean (2, 2)"."""
        nodes = {node.name: node for node in self._plain.value.graph.nodes}
        found = []
        for node in map(nodes.__getitem__, self.held):
            shape = tuple(node.meta["val"].shape)
            while getattr(node.target, "is_view", False) or node.target is operator.getitem:
                node = node.all_input_nodes[0]
            found.append(f"{node.target.overloadpacket.__name__} {shape}")
        return found

    def _groups(self) -> Iterator[tuple[Tensor, ...]]:
        """The reference in whole groups, in a mixed order: real images often come class by class."""
        n = min(len(self._reference.value[0]), MOST_REFERENCES)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        for rows in order.split(self.group):
            if len(rows) == self.group:
                yield tuple(value[rows.to(value.device)] for value in self._reference.value)

    def _effect(self) -> tuple[float, float]:
        """(root mean square change of the reference's logits by holding, standard deviation of these logits before)."""
        before, after = [], []
        with torch.no_grad():
            network, heads = self._of.value
            for given in self._groups():
                x, *values = given
                before.append(torch.cat(heads(network, x.clone(), *values), 1).double().mean(1))
                after.append(torch.cat([head[:, 0] for head in self(x, *values)], 1).double().mean(1))
        old, new = torch.cat(before), torch.cat(after)
        return float((new - old).square().mean().sqrt()), float(old.std())


class _Shared:
    """A value that copies of a module share, and that is no part of its state."""

    def __init__(self, value: Any):
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Called(nn.Module):
    def __init__(self, network: nn.Module, heads: Heads):
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, *given: Tensor) -> list[Tensor]:
        return self.heads(self.network, *given)


def _tensors_of(network: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*network.named_parameters(), *network.named_buffers()]
    return [(f"network.{name}", value.detach()) for name, value in named]


def _record(
    network: nn.Module, heads: Heads, names: list[str], weights: list[Tensor], given: tuple[Tensor, ...]
) -> fx.GraphModule:
    """heads(network, *given) as a graph of (*weights, *given), without in-place operations; batch norms in their parts."""
    called = _Called(network, heads)

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(names, args[: len(names)], strict=True))
        return tuple(torch.func.functional_call(called, own, args[len(names) :]))

    norms: Any = get_decompositions([aten.native_batch_norm, aten._native_batch_norm_legit])
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        plain = make_fx(run, decomposition_table=norms)(*weights, *given)  # modes of torch do not go into functionalize
        graph = make_fx(torch.func.functionalize(plain))(*weights, *given)
    graph.graph.eliminate_dead_code()
    return graph


def _with_held(graph: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """A copy whose first arguments are the values of these nodes, spread to their shape."""
    if not names:
        return graph
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    held = {name: copy.placeholder(f"held{index}") for index, name in enumerate(names)}
    for node in graph.graph.nodes:
        if node.name not in held:
            copies[node] = copy.node_copy(node, copies.__getitem__)
            continue
        value = node.meta["val"]
        cast, spread = (f"held_{node.name}_{what}" for what in ("cast", "spread"))  # no other node's name may change
        own = copy.create_node("call_function", aten._to_copy.default, (held[node.name],), {"dtype": value.dtype}, name=cast)
        copies[node] = copy.create_node("call_function", aten.expand.default, (own, list(value.shape)), name=spread)
    made = fx.GraphModule(graph, copy)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _with_outputs(graph: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """A copy that gives the values of these nodes."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    by_name = {}
    for node in graph.graph.nodes:
        if node.op != "output":
            by_name[node.name] = copies[node] = copy.node_copy(node, copies.__getitem__)
    copy.output(tuple(by_name[name] for name in names))
    return fx.GraphModule(graph, copy)


def _statistics(graph: fx.GraphModule, fixed: list[Tensor], given: list[Tensor]) -> list[str]:
    """The nodes to hold so that no output depends on several samples by way of a statistic; none where none does.

    ``given`` (n, ...) are the last arguments of the graph, after ``fixed``. Raises CouplingError where samples are mixed by
    something else than statistics.
    """
    n = len(given[0])
    rows = torch.arange(n)

    def replaced(j: int) -> list[Tensor]:
        """Sample j is another one: its neighbour at half its size, for sample and neighbour may be equal."""
        order = torch.where(rows == j, (j + 1) % n, rows)
        made = [value[order.to(value.device)] for value in given]
        made[0][j] *= 0.5
        return made

    counts: dict[fx.Node, tuple[bool, bool]] = {}  # some elements depend on several samples, some on exactly one
    masks: dict[fx.Node, Tensor] = {}  # (n, elements): whether an element depends on a sample
    for node, (plain, *others) in _walk(graph, [[*fixed, *made] for made in (given, *map(replaced, range(n)))]):
        pairs = [_leaves(value) for value in others]
        if not _leaves(plain) or node.op in ("placeholder", "get_attr"):
            continue
        mask = torch.stack([torch.cat([_differs(a, b) for a, b in zip(_leaves(plain), p, strict=True)]) for p in pairs])
        count = mask.sum(0)
        counts[node] = bool((count > 1).any()), bool((count == 1).any())
        if counts[node] == (True, False) and isinstance(plain, Tensor) and plain.numel() <= _LARGEST_STATISTIC:
            masks[node] = mask
    output = next(node for node in graph.graph.nodes if node.op == "output")
    if not counts.get(output, (False, False))[0]:
        return []
    # an element that is the same after two of its samples were exchanged is a statistic of them
    exchanges = list(itertools.combinations(range(n), 2))
    exchanges = exchanges[:: -(-len(exchanges) // _MOST_EXCHANGES)]
    for i, j in exchanges:
        order = rows.clone()
        order[i], order[j] = j, i
        exchanged = [value[order.to(value.device)] for value in given]
        for node, (plain, other) in _walk(graph, [[*fixed, *given], [*fixed, *exchanged]]):
            if node in masks and bool((~_nearly_equal(plain, other).flatten() & masks[node][i] & masks[node][j]).any()):
                del masks[node]
    mixed = {node for node, (several, _) in counts.items() if several}
    return _fewest(graph, mixed, masks.keys(), output)


def _walk(graph: fx.GraphModule, variants: list[list[Tensor]]) -> Iterator[tuple[fx.Node, list[Any]]]:
    """Each node with its values for all variants of the arguments; values are freed after their last use."""
    runs = [fx.Interpreter(graph) for _ in variants]
    for run, args in zip(runs, variants, strict=True):
        run.args_iter, run.env = iter(args), {}
    for node in graph.graph.nodes:
        values = [run.run_node(node) for run in runs]
        yield node, values
        for run, value in zip(runs, values, strict=True):
            run.env[node] = value
            for done in run.user_to_last_uses.get(node, ()):
                del run.env[done]


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """(elements,): whether two tensors differ, NaN being equal to NaN."""
    return ((a != b) & ~((a != a) & (b != b))).flatten()


def _nearly_equal(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point() and not a.is_complex():
        return a == b
    scale = torch.nan_to_num(a.abs()).max().clamp(min=1e-30) if a.numel() else 1.0
    return torch.isclose(a, b, rtol=0, atol=float(_SAME * scale), equal_nan=True)


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = _SAME if torch.finfo(a.dtype).bits >= 32 else 0.1
    scale = float(torch.nan_to_num(b).abs().max()) or 1.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def _fewest(graph: fx.GraphModule, mixed: set[fx.Node], allowed: Any, output: fx.Node) -> list[str]:
    """A minimum cut, over numbers, between where samples are first mixed and the output; of equal ones the last."""
    import networkx as nx  # type: ignore[import-untyped]

    network = nx.DiGraph()
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in mixed:
        size = {"capacity": node.meta["val"].numel() + 1e-6 * (1 - order[node] / len(order))} if node in allowed else {}
        network.add_edge((node, "in"), (node, "out"), **size)  # without a capacity it is never cut
        sources = [i for i in node.all_input_nodes if i in mixed]
        for i in sources:
            network.add_edge((i, "out"), (node, "in"))
        if not sources:
            network.add_edge("source", (node, "in"))
    network.add_edge((output, "out"), "sink")
    try:
        _, (before, _) = nx.minimum_cut(network, "source", "sink")
    except nx.NetworkXUnbounded:
        first = min((node for node in mixed if not any(i in mixed for i in node.all_input_nodes)), key=order.__getitem__)
        raise CouplingError(
            f"coupling='freeze' holds statistics of the batch, and the discriminator mixes its samples by something else, "
            f"first at an operation {first.target} of shape {_shape_of(first)}; pass coupling='lockstep' with a group_size"
        ) from None
    return [node.name for node in order if node in mixed and (node, "in") in before and (node, "out") not in before]


def _shape_of(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "unknown"
