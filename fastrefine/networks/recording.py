"""A step as one flat aten graph: forward and input gradient, no autograd at run time; on a CPU with equal rows on request.

On a CPU the bits of a row may depend on its place in the batch: a matrix product treats its last rows and columns
apart (MKL), and a vectorised function computes the last elements of a tensor with scalar code. Which slot a sample sits
in depends on its neighbours, so both are replaced by forms that give every row the same bits.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module  # code is made for graphs that run only
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

Modules = tuple[torch.nn.Module, ...]
# names of constants: computed from nothing, or from tensors that the trace met; views of weights
_FOLDED, _DERIVED, _VIEW = "_folded", "_derived", "_view"
BLOCK_BYTES = 2**23  # largest single result of a block of rows on a CPU
LANES = 16  # floats of an AVX-512 register, in which oneDNN keeps output channels
VECTOR = 32  # elements of two AVX-512 float registers: the stride of ATen's vectorised loops
# Pointwise operations that are exactly rounded, so scalar and vector code agree.
_EXACT = {
    "abs", "neg", "relu", "relu_", "mul", "mul_", "div", "div_", "sqrt", "where", "clamp", "clamp_min", "clamp_max", "maximum",
    "minimum", "leaky_relu", "leaky_relu_", "leaky_relu_backward", "threshold_backward", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "logical_not", "bitwise_and", "round", "floor", "ceil", "sign", "clone", "_to_copy", "fill",
    "square", "reciprocal", "hardtanh", "hardtanh_backward", "masked_fill", "copy", "copy_", "fill_",
}  # fmt: skip
# Pointwise operations whose tags do not say so.
_UNTAGGED = {
    "softplus_backward", "elu_backward", "mish_backward", "hardswish", "hardswish_backward", "hardsigmoid_backward",
}  # fmt: skip


def record(function: Callable[..., Any], args: tuple[Tensor, ...], modules: Modules = ()) -> fx.GraphModule:
    """``function(*args)`` as a graph of aten operations for these shapes; it may call torch.autograd.grad inside.

    modules: those whose weights may be updated in place, so that nothing that depends on them is computed in advance.
    """
    rules: dict[Any, Callable[..., Any]] = {aten.convolution_backward.default: _convolution_backward}
    if args[0].device.type == "cpu":
        rules[aten.convolution.default] = _convolution_on_cpu
    # make_fx notes the shape of every value in a fake tensor, each of a mode of its own unless it is traced under one
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))), _OneHot(), _use_lazy_graph_module(True):
        graph = make_fx(function, decomposition_table=rules)(*args)
    for node in graph.graph.nodes:
        if _has_a_size_of_values(node):
            raise ValueError(f"sizes depend on values: {node.target}")
    _leave_out_what_changes_nothing(graph)
    fold_constants(graph, modules)
    return graph


def _leave_out_what_changes_nothing(graph: fx.GraphModule) -> None:
    """Take out detach, views of the same shape, and copies of memory that nobody writes to.

    Each of them costs a small network about 1 % of its step.
    """
    written = effects_of(graph).written
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None or not isinstance(node.meta.get("val"), Tensor):
            continue
        if _is_view(node.target) or node.target is aten._unsafe_view.default:
            while not _alike(node, source) and _is_view(source.target) and isinstance(source.args[0], fx.Node):
                source = source.args[0]
        elif node.target is not aten.clone.default or node in written or source in written:
            continue
        if _alike(node, source):
            node.replace_all_uses_with(source)
    for node in reversed(graph.graph.nodes):
        if not node.users and (_is_view(node.target) or node.target in (aten.clone.default, aten._unsafe_view.default)):
            graph.graph.erase_node(node)


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether a view or copy has the shape, strides, dtype and offset of what it was made from: then the two are equal."""
    found, wanted = node.meta["val"], other.meta.get("val")
    kinds = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in (found, wanted) if isinstance(t, Tensor)]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def callable_of(graph: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """The graph as a function. Looked up and called as a module's, it costs a small network a tenth of its step."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and "." not in node.target:
            vars(graph)[node.target] = getattr(graph, node.target)
    _LazyGraphModule.force_recompile(graph)
    return graph.forward


class _OneHot(TorchFunctionMode):
    """One-hot labels by a comparison: torch's own looks at the values to check them, which cannot be recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**dict(zip(("tensor", "num_classes"), args, strict=False)), **(kwargs or {})}
        if func is F.one_hot and given.get("num_classes", -1) > 0:
            labels: Any = given.get("tensor", given.get("input"))
            classes = torch.arange(given["num_classes"], device=labels.device)
            return (labels[..., None] == classes).to(labels.dtype)
        return func(*args, **(kwargs or {}))


def _has_a_size_of_values(node: fx.Node) -> bool:
    """Whether the shape of the result follows from what the inputs hold, and not from their shapes."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape not in node.target.tags:
        return False
    if node.target is not aten.index.Tensor:
        return True
    kinds = {i.meta["val"].dtype for i in node.args[1] if isinstance(i, fx.Node)}  # type: ignore[union-attr]
    return bool(kinds & {torch.bool, torch.uint8})  # by numbers, a result has their shape


def fold_constants(graph: fx.GraphModule, modules: Modules) -> None:
    """Compute once what depends on no input and no weight, such as coordinates or a kernel that is sent to the device.

    So are views of weights, which follow them, and fills of a known shape. Random numbers and memory that the step writes to
    stay as they are.
    """
    weights, written = _storages(_weights(modules)), set[int]()
    known: dict[fx.Node, Any] = {}
    views: dict[fx.Node, Any] = {}  # of weights
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            if isinstance(value, Tensor):
                (views if _storages([value]) & weights else known)[node] = value
        elif node.op == "call_function":
            inputs = _value_inputs(node)
            given = [known[n] for n in inputs if n in known]
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                written |= _storages([*given, *(views[n] for n in inputs if n in views)])
            elif len(given) == len(inputs) and _gives_the_same_each_time(node.target):
                known[node] = _computed(node, known)
            elif _is_view(node.target) and inputs[0] in views and len(given) + 1 == len(inputs):
                views[node] = _computed(node, known | views)
    kept: dict[fx.Node, bool] = {}  # -> whether a tensor that the trace met has part in it
    for node, value in known.items():
        inputs = _value_inputs(node)
        if not _storages(tree_leaves(value)) & written and all(n in kept for n in inputs):
            kept[node] = any(kept[n] for n in inputs) or (node.op == "get_attr" and value.numel() > 1)
    names = {node: _DERIVED if derived else _FOLDED for node, derived in kept.items()}
    names |= {node: _VIEW for node, value in views.items() if not _storages([value]) & written}
    changed = False
    for node in reversed(names):
        value = known[node] if node in known else views[node]
        if node.op == "call_function" and isinstance(value, Tensor) and any(user not in names for user in node.users):
            name = next(n for i in itertools.count() if not hasattr(graph, n := f"{names[node]}{i}"))
            graph.register_buffer(name, value)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name), lambda user: user not in names)
            changed = True
        if not node.users:
            graph.graph.erase_node(node)
            changed = True
    if changed:
        graph.recompile()


_FILLS = {getattr(aten, name).default for name in ("ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full")}


def _value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values the result depends on: of a fill of a known shape none."""
    return [n for n in node.all_input_nodes if node.target not in _FILLS or n is not node.args[0]]


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def value(n: fx.Node) -> Any:
        like = n.meta.get("val")
        return (
            values[n]
            if n in values or not isinstance(like, Tensor)
            else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        )

    own_args, own_kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    with torch.no_grad():
        return node.target(*own_args, **own_kwargs)  # type: ignore[operator]


def _is_view(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def _gives_the_same_each_time(target: Any) -> bool:
    if target is operator.getitem:
        return True
    is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return is_aten and torch.Tag.nondeterministic_seeded not in target.tags


def _weights(modules: Modules) -> Iterator[Tensor]:
    for module in modules:
        yield from (*module.parameters(), *module.buffers())


def _storages(values: Iterable[Any]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in values if isinstance(t, Tensor)}


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int, mask: list[bool],
) -> Any:  # fmt: skip
    """Input gradient of a convolution as a convolution: the flat graph then holds inference operations only.

    Where weights depend on the sample their gradient is wanted too: NotImplemented, and the operation stays as it is.
    """
    if mask[1] or mask[2]:
        return NotImplemented
    if transposed:
        return (
            aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * len(stride), groups),
            None,
            None,
        )
    spare = [
        int(
            x.shape[2 + i]
            - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
        )
        for i in range(len(stride))
    ]
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, spare, groups), None, None


def _convolution_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Any:  # fmt: skip
    """The convolutions that oneDNN does badly, in forms that it does well; NotImplemented for all others.

    From or to a single pixel: a matrix product, 4-10x as fast. Transposed to few channels (an image): most lanes of a
    register idle, so all stride x stride phases are computed together as channels of one convolution, 2x as fast.
    """
    if x.dim() != 4 or x.dtype == torch.float64 or groups != 1 or list(dilation) != [1, 1]:
        return NotImplemented
    if not transposed and x.shape[2:] == weight.shape[2:] and not any(padding):
        rows = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        return F.linear(rows, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias)[:, :, None, None]
    if transposed and x.shape[2:] == (1, 1) and not any(padding) and not any(output_padding):
        columns = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
        return _to_channels_first((x[:, :, 0, 0] @ columns).view(len(x), *weight.shape[2:], -1), bias, (x, weight))
    if transposed and weight.shape[1] * stride[0] * stride[1] <= LANES:
        return _by_phases(x, weight, bias, stride, padding, output_padding)
    return NotImplemented


def _by_phases(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], output_padding: list[int]
) -> Any:
    """A transposed convolution that enlarges by exactly its stride s, as a convolution to s x s x channels.

    Output pixel s i + r takes weight k = s (i - j) + r + p of input pixel j: a fixed few neighbours j of i, whatever r.
    """
    reach: list[int] = []  # neighbours on either side
    spare: list[int] = []  # zeros around the weights, to whole groups of s; the last dimension first, as F.pad wants
    for size, s, p, extra in zip(weight.shape[2:], stride, padding, output_padding, strict=True):
        before, after = (size - 1 - p) // s, (s - 1 + p) // s
        if size - 2 * p + extra != s or before != after:
            return NotImplemented
        reach.append(after)
        spare = [s * after - p, s * (before + 1) + p - size, *spare]
    (n, channels, h, w), (sh, sw), (rh, rw) = x.shape, stride, reach
    taps = F.pad(weight, spare).view(channels, -1, 2 * rh + 1, sh, 2 * rw + 1, sw).flip(2, 4)
    taps = taps.permute(3, 5, 1, 0, 2, 4).reshape(-1, channels, 2 * rh + 1, 2 * rw + 1)  # (s s out, in, ...)
    taps = taps.contiguous(memory_format=torch.channels_last)
    phases = aten.convolution(x, taps, None, [1, 1], reach, [1, 1], False, [0, 0], 1)
    phases = phases.permute(0, 2, 3, 1).reshape(n, h, w, sh, sw, -1)
    return _to_channels_first(phases.transpose(2, 3).reshape(n, h * sh, w * sw, -1), bias, (x, weight))


def _to_channels_first(pixels: Tensor, bias: Tensor | None, like: tuple[Tensor, ...]) -> Tensor:
    """(N, C, H, W) of (N, H, W, C), in the memory format that a convolution of ``like`` gives: what follows may view it."""
    found = (pixels if bias is None else pixels + bias).permute(0, 3, 1, 2)
    if any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in like):
        return found
    return found.clone(memory_format=torch.contiguous_format)


def with_equal_rows(graph: fx.GraphModule, state: torch.dtype, modules: Modules = ()) -> fx.GraphModule:
    """A copy of a graph recorded on a CPU, without what gives rows different bits by their place in the batch."""
    made = _LazyGraphModule(graph, copy.deepcopy(graph.graph))
    for node in list(made.graph.nodes):
        name = node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""
        if node.target is aten.mm.default or (node.target is aten.addmm.default and not node.kwargs):
            bias, x, weight = (None, *node.args)[-3:]
            with made.graph.inserting_before(node):
                _equal_product(made, node, bias, x, weight, state)
        elif name and (torch.Tag.pointwise in node.target.tags or name in _UNTAGGED):
            is_sum = name in ("add", "add_", "sub", "sub_") and not node.kwargs and len(node.args) == 2
            if name not in _EXACT and not is_sum:  # a scaled sum may be fused into one rounding by scalar code
                node.target, node.args = _aligned, (node.target, *node.args)
    fold_constants(made, modules)
    made.recompile()
    return made


def _equal_product(
    made: fx.GraphModule, node: fx.Node, bias: fx.Node | None, x: fx.Node, weight: fx.Node, state: torch.dtype
) -> None:
    """In place of ``node`` bias + x @ weight, in a form that accumulates every row alike, wherever it stands."""
    call = made.graph.call_function
    inner, columns = _value(made, weight).shape
    own = bias if bias is None or _value(made, bias).shape == (columns,) else None  # oneDNN adds one value for each column
    if inner == 1:
        product, own = call(aten.mul.Tensor, (x, weight)), None
    elif state == torch.float64:  # which oneDNN does not know; a product per row is slow but serves verification
        product, own = call(_row_products, (x, weight)), None
    elif _value(made, x).dtype in (torch.float16, torch.bfloat16):
        product = call(_half_product, (own, x, weight))
    else:
        turned = call(aten.t.default, (weight,))
        product = call(torch.ops.mkldnn._linear_pointwise.default, (x, turned, own, "none", [], ""))
    if own is not bias:
        product = call(aten.add.Tensor, (product, bias))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    made.graph.erase_node(node)


def _value(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """A tensor of the shape and dtype of a node's result."""
    return operator.attrgetter(node.target)(graph) if node.op == "get_attr" else node.meta["val"]  # type: ignore[arg-type]


def _half_product(bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """In half precision. Many CPUs lack oneDNN's half precisions."""
    if x.dtype == torch.float16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        own = None if bias is None else bias.float()
        return torch.ops.mkldnn._linear_pointwise(x.float(), weight.float().t(), own, "none", [], "").to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")


def _row_products(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, one row at a time."""
    return torch.bmm(x[:, None, :], weight.expand(len(x), -1, -1))[:, 0]


def _aligned(function: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    """A pointwise function with its tensors padded to whole vectors where they end in a part of one."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.dim()]
    if not tensors:
        return function(*args, **kwargs)
    first = tensors[0]
    whole = VECTOR * max(1, torch.get_num_threads())
    if first.numel() % whole == 0 or any(t.shape != first.shape for t in tensors):
        return function(*args, **kwargs)
    padding = -first.numel() % whole
    flat = [F.pad(a.reshape(-1), (0, padding)) if isinstance(a, Tensor) and a.dim() else a for a in args]
    result = function(*flat, **kwargs)[: first.numel()].view(first.shape)
    return first.copy_(result) if function._schema.is_mutable else result


def block_rows(graph: fx.GraphModule, n: int, rows: int) -> int:
    """How many of ``rows`` to evaluate at once, a divisor of it; ``graph``: a trace of ``n`` rows.

    On a CPU, large results leave the cache before they are read again, and glibc returns their pages to the system:
    fetching 80 MB of them anew took a seventh of each DCGAN step.
    """
    values = [v for node in graph.graph.nodes if isinstance(v := node.meta.get("val"), Tensor) and v.shape[:1] == (n,)]
    if values[0].device.type != "cpu":
        return rows
    affordable = BLOCK_BYTES * n // max(v.numel() * v.element_size() for v in values)
    size = max((d for d in range(1, rows + 1) if rows % d == 0 and d <= affordable), default=1)
    return size if 4 * size > min(rows, affordable) else rows  # an awkward number of rows stays whole


def has_derived_constants(graph: fx.GraphModule, modules: Modules) -> bool:
    """Whether the trace evaluated something from the weights once: such a value does not follow new weights."""
    own = _storages(_weights(modules))
    names = [n.target for n in graph.graph.nodes if n.op == "get_attr" and not n.target.startswith(_FOLDED)]
    constants = {name: operator.attrgetter(name)(graph) for name in names}
    return any(n.startswith(_DERIVED) or (c.numel() > 1 and not _storages([c]) <= own) for n, c in constants.items())


class Recording(NamedTuple):
    """A recorded step: prefix(*context) -> carried, step(state..., *carried) -> (logit, loss, gradient), forward the same
    without the gradient. Without a prefix the context itself is carried."""

    prefix: fx.GraphModule | None
    step: fx.GraphModule
    forward: fx.GraphModule

    def with_equal_rows(self, state: torch.dtype, modules: Modules) -> Recording:
        """Copies in which a row has the same bits at every place in the batch."""
        return Recording(*(None if graph is None else with_equal_rows(graph, state, modules) for graph in self))  # type: ignore[arg-type]


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


class Effects(NamedTuple):
    """What the edges of a graph do not say. before: for each node the earlier nodes that wrote in place to memory that it
    reads. written: the nodes whose memory is written to."""

    before: dict[fx.Node, set[fx.Node]]
    written: set[fx.Node]


def effects_of(graph: fx.GraphModule) -> Effects:
    """The effects of a recorded graph, by what the schemas of its operations say of memory."""
    memories: dict[fx.Node, set[Any]] = {}  # of a node: names of the memory that its value may lie in
    writers: dict[Any, set[fx.Node]] = {}  # memory -> who wrote to it so far
    before: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.graph.nodes:
        before[node] = {w for i in node.all_input_nodes for memory in memories[i] for w in writers.get(memory, ())}
        shared, written = set(), set()
        if node.op == "get_attr":
            shared = _storages([operator.attrgetter(node.target)(graph)])
        elif isinstance(node.target, torch._ops.OpOverload):
            arguments = node.target._schema.arguments
            named = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | dict(node.kwargs)
            aliased = [a for a in arguments if a.alias_info is not None or node.target is aten._unsafe_view.default]
            for argument in aliased:
                found = {m for i in _nodes_in(named.get(argument.name)) for m in memories[i]}
                shared |= found
                written |= found if argument.alias_info is not None and argument.alias_info.is_write else set()
        elif node.target is operator.getitem:
            shared = memories[node.args[0]]
        memories[node] = shared or {node}
        for memory in written:
            writers.setdefault(memory, set()).add(node)
    return Effects(before, {node for node in graph.graph.nodes if memories[node] & writers.keys()})


def _nodes_in(argument: Any) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, fx.Node)]


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
        is_view = node.target is operator.getitem or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view)
        if node.op == "placeholder":
            edge("source", (node, "in"))
        elif not is_view:
            edge("source", (node, "in"), float(_PRODUCT_PRICE if name in _PRODUCTS else _KERNEL_PRICE))
    for node in needed:
        edge((node, "out"), "sink")
    _, (prefix_side, _) = nx.minimum_cut(network, "source", "sink")
    return {n for n in varying if (n, "in") in prefix_side and (n, "out") not in prefix_side}
