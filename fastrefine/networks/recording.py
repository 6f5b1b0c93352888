"""A function as one flat aten graph: a step is forward and input gradient, without autograd at run time."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module  # code is made for graphs that run only
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrefine.networks import cpu_forms

aten = torch.ops.aten

Modules = tuple[torch.nn.Module, ...]
# names of constants: computed from nothing, or from tensors that the trace met; views of weights
_FOLDED, _DERIVED, _VIEW = "_folded", "_derived", "_view"
_HELD = "_held"  # computed from weights, again for new ones: see ``hold_weights``


def record(function: Callable[..., Any], args: tuple[Tensor, ...], modules: Modules = ()) -> fx.GraphModule:
    """``function(*args)`` as a graph of aten operations for these shapes; it may call torch.autograd.grad inside.

    modules: those whose weights may be updated in place, so that nothing that depends on them is computed in advance.
    """
    rules: dict[Any, Callable[..., Any]] = {aten.convolution_backward.default: _convolution_backward}
    if args[0].device.type == "cpu":
        rules[aten.convolution.default] = cpu_forms.convolution
    # make_fx notes the shape of every value in a fake tensor, each of a mode of its own unless it is traced under one
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))), _OneHot(), _use_lazy_graph_module(True):
        try:
            # a lambda, for make_fx would take the defaults of a function for further inputs
            graph = make_fx(lambda *args: function(*args), decomposition_table=rules)(*args)
        except RuntimeError as error:
            if "value out of a tracing tensor" not in str(error):
                raise
            graph = make_fx(_reading_constants(function), decomposition_table=rules)(*args)
    for node in graph.graph.nodes:
        if _has_a_size_of_values(node):
            raise ValueError(f"sizes depend on values: {node.target}")
    _leave_out_what_changes_nothing(graph)
    _join_slices(graph)
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
        if is_view(node.target) or node.target is aten._unsafe_view.default:
            while not _alike(node, source) and is_view(source.target) and isinstance(source.args[0], fx.Node):
                source = source.args[0]
        elif node.target is not aten.clone.default or node in written or source in written:
            continue
        if _alike(node, source):
            node.replace_all_uses_with(source)
    for node in reversed(graph.graph.nodes):
        if not node.users and (is_view(node.target) or node.target in (aten.clone.default, aten._unsafe_view.default)):
            graph.graph.erase_node(node)


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether a view or copy has the shape, strides, dtype and offset of what it was made from: then the two are equal."""
    found, wanted = node.meta["val"], other.meta.get("val")
    kinds = [
        (t.shape, t.stride(), t.dtype, t.storage_offset(), t.is_conj(), t.is_neg())
        for t in (found, wanted)
        if isinstance(t, Tensor)
    ]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def _join_slices(graph: fx.GraphModule) -> None:
    """Gradients of slices that make up a whole tensor become one concatenation, in place of a sum of whole tensors.

    A recurrent layer has a slice for each time, so that the sum takes the square of their number.
    """
    known: set[fx.Node] = set()  # sums that are part of a larger one
    for node in reversed(graph.graph.nodes):
        if node.target is not aten.add.Tensor or node in known or (found := _summed_slices(node)) is None:
            continue
        parts, sums = found
        known.update(sums)
        parts.sort(key=lambda part: part.args[3])
        sizes, dim = parts[0].args[1:3]
        bounds = [(part.args[3], min(part.args[4], sizes[dim])) for part in parts]
        whole = [0, *(end for _, end in bounds)] == [*(start for start, _ in bounds), sizes[dim]]
        if whole and all([*part.args[1:3], part.args[5]] == [sizes, dim, 1] for part in parts):
            with graph.graph.inserting_before(node):
                joined = graph.graph.call_function(aten.cat.default, ([part.args[0] for part in parts], dim))
                like = [torch.empty_strided(v.shape, v.stride(), device="meta") for v in (p.args[0].meta["val"] for p in parts)]
                if torch.cat(like, dim).stride() != node.meta["val"].stride():
                    joined = graph.graph.call_function(
                        aten.clone.default, (joined,), {"memory_format": torch.contiguous_format}
                    )
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined)
    for node in reversed(graph.graph.nodes):
        if not node.users and node.target in (aten.add.Tensor, aten.slice_backward.default):
            graph.graph.erase_node(node)


def _summed_slices(node: fx.Node) -> tuple[list[Any], list[fx.Node]] | None:
    """(the gradients of slices whose sum this is, each used for this alone, the sums that make it up), or None."""
    found: list[Any] = []
    sums = [node]
    for one in sums:
        for part in one.args:
            if not isinstance(part, fx.Node) or len(part.users) > 1 or one.kwargs:
                return None
            if part.target is aten.slice_backward.default:
                found.append(part)
            elif part.target is aten.add.Tensor:
                sums.append(part)
            else:
                return None
    return found, sums


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


def _reading_constants(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Tensor) -> Any:
        with _ReadsOfConstants():
            return function(*args)

    return run


class _ReadsOfConstants(TorchDispatchMode):
    """Lets a network read values of its own making, such as the lengths of sequences, which are the same each time.

    make_fx refuses a tensor's value. Values that depend on an input or a weight stay refused, for the step must follow them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[int, Tensor] = {}  # by their memory, which lives as long as this

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _storages(tree_leaves((args, kwargs)))
        constant = given <= self.constants.keys() and _gives_the_same_each_time(func)
        if constant and func is aten._local_scalar_dense.default:
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func is aten._pack_padded_sequence.default and _storages([args[1]]) <= self.constants.keys():
            constant, found = True, found[1:]  # what is packed depends on the input, the sizes of the batches do not
        if constant:
            self.constants |= {tensor.untyped_storage().data_ptr(): tensor for tensor in found}
        else:
            written = given if func._schema.is_mutable else set()
            for memory in _storages(found) | written:
                self.constants.pop(memory, None)
        return out


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
    weights, written = _storages(_weights(modules, graph)), set[int]()
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
            elif is_view(node.target) and inputs[0] in views and len(given) + 1 == len(inputs):
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


class Held(NamedTuple):
    """What steps read that depends on weights alone: values() -> what belongs into the buffers."""

    values: fx.GraphModule
    buffers: tuple[Tensor, ...]

    def refresh(self) -> None:
        """After the weights have changed in place."""
        with torch.no_grad():
            for buffer, value in zip(self.buffers, self.values(), strict=True):
                buffer.copy_(value)


def hold_weights(graphs: Sequence[fx.GraphModule]) -> tuple[list[fx.GraphModule], Held | None]:
    """Copies of graphs without what depends on weights alone, such as weights times a gain or divided by a norm.

    They share what they compute alike. None where there is no such thing.
    """
    program, root = fx.Graph(), torch.nn.Module()
    made: dict[Any, fx.Node] = {}  # by what is computed from which weights
    values: dict[fx.Node, Any] = {}
    bases: dict[fx.Node, Tensor] = {}  # what is held; of a view, that of which it is one
    copies: list[fx.GraphModule] = [_LazyGraphModule(graph, copy.deepcopy(graph.graph)) for graph in graphs]
    for graph in copies:
        effects, keys = effects_of(graph), dict[fx.Node, Any]()
        for node in graph.graph.nodes:
            keys[node] = key = None if node in effects.written else _of_weights(graph, node, keys)
            if key is not None and key not in made:
                if node.op == "get_attr":
                    kind = next((k for k in (_FOLDED, _DERIVED) if node.target.startswith(k)), "weight")
                    root.register_buffer(name := f"{kind}{len(made)}", operator.attrgetter(node.target)(graph))
                    made[key] = program.get_attr(name)
                    values[made[key]] = root.get_buffer(name)
                else:
                    made[key] = program.node_copy(node, lambda n, keys=keys: made[keys[n]])  # type: ignore[misc]
                    values[made[key]] = _computed(made[key], values)
        for node in reversed(graph.graph.nodes):
            if node.op != "call_function" or keys[node] is None:
                continue
            own = made[keys[node]]
            if any(keys[user] is None for user in node.users) and isinstance(values[own], Tensor):
                graph.register_buffer(name := f"{_HELD}_{own.name}", values[own])
                with graph.graph.inserting_before(node):
                    held = graph.graph.get_attr(name)
                held.meta = dict(node.meta)
                node.replace_all_uses_with(held, lambda user, keys=keys: keys.get(user) is None)  # type: ignore[misc]
                while is_view(own.target) or own.target in _UNSAFE_VIEWS:
                    own = own.args[0]  # type: ignore[assignment]
                if own.op != "get_attr":
                    bases[own] = values[own]
            if not node.users:
                graph.graph.erase_node(node)
        graph.recompile()
    if not bases:
        return list(graphs), None
    program.output(tuple(bases))
    program.eliminate_dead_code()
    return copies, Held(_LazyGraphModule(root, program), tuple(bases.values()))


def _of_weights(graph: fx.GraphModule, node: fx.Node, keys: dict[fx.Node, Any]) -> Any:
    """What is computed from which weights, equal for equal values; None of what depends on anything else."""
    if node.op == "get_attr":
        value = operator.attrgetter(node.target)(graph)  # type: ignore[arg-type]
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or not _gives_the_same_each_time(node.target):
        return None
    if any(keys[n] is None for n in inputs):
        return None
    return node.target, repr(fx.node.map_arg((node.args, node.kwargs), lambda n: hash(keys[n])))


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


# Views whose schemas do not say so.
_UNSAFE_VIEWS = {
    aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default,
}  # fmt: skip


def is_view(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def _gives_the_same_each_time(target: Any) -> bool:
    if target is operator.getitem:
        return True
    is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return is_aten and torch.Tag.nondeterministic_seeded not in target.tags


def _weights(modules: Modules, graph: fx.GraphModule) -> Iterator[Tensor]:
    """The weights, and what is held of them."""
    for module in modules:
        yield from (*module.parameters(), *module.buffers())
    yield from (value for name, value in graph.named_buffers() if name.startswith(_HELD))


def _storages(values: Iterable[Any]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in values if isinstance(t, Tensor) and t.layout is torch.strided}


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


def has_derived_constants(graph: fx.GraphModule, modules: Modules) -> bool:
    """Whether the trace evaluated something from the weights once: such a value does not follow new weights."""
    own = _storages(_weights(modules, graph))
    names = [n.target for n in graph.graph.nodes if n.op == "get_attr" and not n.target.startswith((_FOLDED, _HELD))]
    constants = {name: operator.attrgetter(name)(graph) for name in names}
    return any(n.startswith(_DERIVED) or (c.numel() > 1 and not _storages([c]) <= own) for n, c in constants.items())


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
            aliased = [a for a in arguments if a.alias_info is not None or node.target in _UNSAFE_VIEWS]
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
