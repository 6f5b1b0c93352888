"""Forms of operations for a CPU: convolutions that oneDNN does badly, equal rows, and how many rows to evaluate at once.

On a CPU the bits of a row may depend on its place in the batch: a matrix product treats its last rows and columns
apart (MKL), and a vectorised function computes the last elements of a tensor with scalar code. Which slot a sample sits
in depends on its neighbours, so both are replaced by forms that give every row the same bits.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

aten = torch.ops.aten

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


def convolution(
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


def with_equal_rows(graph: fx.GraphModule, state: torch.dtype) -> fx.GraphModule:
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
