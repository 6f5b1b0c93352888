"""The CPU forms of convolutions and the blocks of rows: same function, same bits wherever a row stands."""

import pytest
import torch
import torch.nn.functional as F

from fastrefine import flatten

# kernel, stride, padding, output padding; the first four are computed by phases, the last two are left alone
PHASES = [(4, 2, 1, 0), (2, 2, 0, 0), (5, 2, 2, 1), (6, 4, 1, 0)]
SHAPES = [*PHASES, (3, 2, 1, 1), (4, 2, 0, 0)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_convolution_to_few_channels_is_computed_by_phases(shape, bias):
    k, stride, padding, extra = shape
    torch.manual_seed(k)
    x, w = torch.randn(3, 8, 5, 6), torch.randn(8, 1, k, k)
    b = torch.randn(1) if bias else None
    graph = flatten.trace(lambda a: F.conv_transpose2d(a, w, b, stride, padding, extra), (x,))
    wanted = F.conv_transpose2d(x, w, b, stride, padding, extra)
    torch.testing.assert_close(graph(x), wanted, rtol=1e-5, atol=1e-5)
    by_phases = not any(n.args[6] for n in graph.graph.nodes if n.target is torch.ops.aten.convolution.default)
    assert by_phases == (shape in PHASES)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_from_or_to_one_pixel_is_a_product(transposed, bias):
    x, w = (
        (torch.randn(5, 6, 1, 1), torch.randn(6, 4, 3, 2)) if transposed else (torch.randn(5, 6, 3, 2), torch.randn(4, 6, 3, 2))
    )
    b = torch.randn(4) if bias else None
    convolve = F.conv_transpose2d if transposed else F.conv2d
    graph = flatten.trace(lambda a: convolve(a, w, b), (x,))
    assert not any(n.target is torch.ops.aten.convolution.default for n in graph.graph.nodes)
    torch.testing.assert_close(graph(x), convolve(x, w, b), rtol=1e-5, atol=1e-5)


def test_float64_convolutions_stay_as_they_are():
    x, w = torch.randn(3, 8, 5, 5).double(), torch.randn(8, 1, 4, 4).double()
    graph = flatten.trace(lambda a: F.conv_transpose2d(a, w, None, 2, 1), (x,))
    assert torch.equal(graph(x), F.conv_transpose2d(x, w, None, 2, 1))


@pytest.mark.parametrize(("rows", "wanted"), [(6, 6), (64, 8), (60, 6), (22, 22), (7, 7)])
def test_block_is_a_divisor_that_fits(rows, wanted, monkeypatch):
    graph = flatten.trace(lambda a: a * 2, (torch.ones(4, 16),))  # 64 bytes a row
    monkeypatch.setattr(flatten, "BLOCK_BYTES", 8 * 64)
    assert flatten.block_rows(graph, 4, rows) == wanted


FUNCTIONS = ("softplus", "elu", "mish", "hardswish", "silu", "gelu", "tanh", "sigmoid")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_and_their_gradients_round_alike_in_every_row(function):
    """33 rows: the last one is what scalar code computes of a vectorised loop."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 33, generator=generator) * 2

    def step(a):
        leaf = a.detach().requires_grad_()
        y = getattr(F, function)(leaf)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    with torch.enable_grad():
        graph = flatten.trace(step, (x[0],))
    with torch.no_grad():
        for row in x:
            for found, wanted in zip(graph(row.roll(1)), graph(row), strict=True):
                assert torch.equal(found, wanted.roll(1))
