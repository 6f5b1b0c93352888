"""A step as one flat aten graph: forward and input gradient, no autograd at run time, same bits in every slot.

On a CPU the bits of a row may depend on its place in the batch: a matrix product treats its last rows and columns
apart (MKL), and a vectorised function computes the last elements of a tensor with scalar code. Which slot a sample sits
in depends on its neighbours, so both are replaced by forms that give every row the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

VECTOR = 32  # elements of two AVX-512 float registers: the stride of ATen's vectorised loops
# Pointwise operations that are exactly rounded, so scalar and vector code agree.
_EXACT = {
    "abs", "neg", "relu", "relu_", "mul", "mul_", "div", "div_", "sqrt", "where", "clamp", "clamp_min", "clamp_max", "maximum",
    "minimum", "leaky_relu", "leaky_relu_", "leaky_relu_backward", "threshold_backward", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "logical_not", "bitwise_and", "round", "floor", "ceil", "sign", "clone", "_to_copy", "fill",
    "square", "reciprocal", "hardtanh", "hardtanh_backward", "masked_fill", "copy", "copy_", "fill_",
}  # fmt: skip


def trace(function: Callable[..., Any], args: tuple[Tensor, ...]) -> fx.GraphModule:
    """``function(*args)`` as a graph of aten operations for these shapes; it may call torch.autograd.grad inside."""
    rules = {aten.convolution_backward.default: _convolution_backward}
    graph = make_fx(function, decomposition_table=rules)(*args)
    if args[0].device.type == "cpu":
        _make_rows_equal(graph, args[0].dtype)
    return graph


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int, mask: list[bool],
) -> tuple[Tensor, None, None]:  # fmt: skip
    """Input gradient of a convolution as a convolution: the flat graph then holds inference operations only."""
    assert not mask[1] and not mask[2], "the networks are frozen: no parameter gradient can be asked for"
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


def _make_rows_equal(graph: fx.GraphModule, state: torch.dtype) -> None:
    # oneDNN has no float64; a product per row is slow but serves verification
    product = _row_products if state == torch.float64 else _onednn_product
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.mm.default:
            node.target, node.args = product, (None, *node.args)
        elif node.target is aten.addmm.default and not node.kwargs:
            node.target = product
        elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            name = node.target.overloadpacket.__name__
            is_sum = name in ("add", "add_", "sub", "sub_") and not node.kwargs and len(node.args) == 2
            if name not in _EXACT and not is_sum:  # a scaled sum may be fused into one rounding by scalar code
                node.args = (node.target, *node.args)
                node.target = _aligned
    graph.recompile()


def _onednn_product(bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """bias + x @ weight: oneDNN accumulates every row alike, wherever it stands."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")


def _row_products(bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """bias + x @ weight, one row at a time."""
    out = torch.bmm(x[:, None, :], weight.expand(len(x), -1, -1))[:, 0]
    return out if bias is None else out + bias


def _aligned(function: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    """A pointwise function with its tensors padded to whole vectors where they end in a part of one."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.dim()]
    first = tensors[0]
    whole = VECTOR * max(1, torch.get_num_threads())
    if first.numel() % whole == 0 or any(t.shape != first.shape for t in tensors):
        return function(*args, **kwargs)
    padding = -first.numel() % whole
    flat = [F.pad(a.reshape(-1), (0, padding)) if isinstance(a, Tensor) and a.dim() else a for a in args]
    result = function(*flat, **kwargs)[: first.numel()].view(first.shape)
    return first.copy_(result) if function._schema.is_mutable else result


def has_derived_constants(graph: fx.GraphModule, modules: tuple[torch.nn.Module, ...]) -> bool:
    """Whether the trace evaluated something from the weights once: such a value does not follow new weights."""
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    constants = (operator.attrgetter(n.target)(graph) for n in graph.graph.nodes if n.op == "get_attr")
    return any(c.numel() > 1 and c.untyped_storage().data_ptr() not in own for c in constants)
