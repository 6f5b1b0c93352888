"""The CPU forms of convolutions and the blocks of rows: same function, same bits wherever a row stands."""

import pytest
import torch
import torch.nn.functional as F

from fastrefine.networks import cpu_forms, recording


def _recorded(function, given):
    """The function as the step records it on a CPU, with equal rows."""
    return cpu_forms.with_equal_rows(recording.record(function, given), given[0].dtype)


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
    graph = _recorded(lambda a: F.conv_transpose2d(a, w, b, stride, padding, extra), (x,))
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
    graph = _recorded(lambda a: convolve(a, w, b), (x,))
    assert not any(n.target is torch.ops.aten.convolution.default for n in graph.graph.nodes)
    torch.testing.assert_close(graph(x), convolve(x, w, b), rtol=1e-5, atol=1e-5)


def test_float64_convolutions_stay_as_they_are():
    x, w = torch.randn(3, 8, 5, 5).double(), torch.randn(8, 1, 4, 4).double()
    graph = _recorded(lambda a: F.conv_transpose2d(a, w, None, 2, 1), (x,))
    assert torch.equal(graph(x), F.conv_transpose2d(x, w, None, 2, 1))


@pytest.mark.parametrize(("rows", "wanted"), [(6, 6), (64, 8), (60, 6), (22, 22), (7, 7)])
def test_block_is_a_divisor_that_fits(rows, wanted, monkeypatch):
    graph = _recorded(lambda a: a * 2, (torch.ones(4, 16),))  # 64 bytes a row
    monkeypatch.setattr(cpu_forms, "BLOCK_BYTES", 8 * 64)
    assert cpu_forms.block_rows(graph, 4, rows) == wanted


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
        graph = _recorded(step, (x[0],))
    with torch.no_grad():
        for row in x:
            for found, wanted in zip(graph(row.roll(1)), graph(row), strict=True):
                assert torch.equal(found, wanted.roll(1))


class Positions(torch.nn.Module):
    """Weights, a kernel written down in the code, coordinates, a random number, and memory that the step writes to."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)

    def forward(self, x):
        line = torch.linspace(0, 1, 3).clone()
        kernel = torch.tensor([0.5, 1.0, 0.5]) * 2
        sums = torch.zeros(3)
        before = sums + 1
        sums.add_(x[0])
        return x * line * kernel * (self.weight * 2) + sums * 2 + before + torch.rand(3)


def test_what_depends_on_no_input_and_no_weight_is_computed_once():
    module, x = Positions(), torch.ones(2, 3)

    def seeded(function, given):
        torch.manual_seed(0)
        return function(given)

    with torch.no_grad():
        graph = recording.record(module, (x,), (module,))
        called = [n.target.overloadpacket.__name__ for n in graph.graph.nodes if n.op == "call_function"]
        assert not {"linspace", "clone", "lift_fresh_copy"} & set(called) and {"rand", "zeros"} <= set(called)
        for given in (x, 3 * x, x):  # a buffer that the step wrote to would add up
            torch.testing.assert_close(seeded(graph, given), seeded(module, given))
        module.weight.mul_(5)
        torch.testing.assert_close(seeded(graph, x), seeded(module, x))


def test_only_constants_of_tensors_that_the_trace_met_count_as_derived():
    layer, x = torch.nn.Linear(3, 3).requires_grad_(False), torch.ones(2, 3)
    kernel = torch.ones(3) + 1
    steps = {"pure": lambda a: layer(a) * torch.arange(3).float(), "met": lambda a: layer(a) * kernel.cos()}
    for name, step in steps.items():
        graph = recording.record(step, (x,), (layer,))
        assert not any(n.target in (torch.ops.aten.arange.default, torch.ops.aten.cos.default) for n in graph.graph.nodes)
        assert recording.has_derived_constants(graph, (layer,)) == (name == "met")


def _operations(graph):
    return [n.target.overloadpacket.__name__ for n in graph.graph.nodes if n.op == "call_function"]


def test_views_of_weights_are_taken_once_and_follow_them():
    layer, x = torch.nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)
    graph = recording.record(lambda a: a @ layer.weight.t().t().unsqueeze(0)[0].t(), (x,), (layer,))
    assert _operations(graph) == ["mm"]
    assert not recording.has_derived_constants(graph, (layer,))
    layer.weight.mul_(3)
    torch.testing.assert_close(graph(x), x @ layer.weight.t())


def test_copies_and_views_that_change_nothing_are_left_out():
    x = torch.randn(2, 3)
    graph = recording.record(lambda a: a.clone().view(3, 2).detach().view(2, 3) * torch.ones_like(a).mul(2), (x,))
    assert _operations(graph) == ["mul"] and torch.equal(graph(x), 2 * x)

    def in_place(a):
        copy = a.clone()
        view = copy.view(3, 2)
        view[0] = 7.0
        return copy.clone(), a + 1

    before = x.clone()
    found, other = recording.record(in_place, (x,))(x)
    assert torch.equal(x, before) and torch.equal(other, x + 1)
    assert found.flatten()[:2].tolist() == [7.0, 7.0] and torch.equal(found.flatten()[2:], x.flatten()[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("inner", "columns"), [(1, 5), (256, 1), (64, 32)])
@pytest.mark.parametrize("bias", ["none", "row", "matrix"])
def test_products_round_alike_in_every_row(inner, columns, bias, dtype):
    """17 rows: a product treats the last ones apart."""
    torch.manual_seed(0)
    x, w = torch.randn(17, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    b = {"none": None, "row": torch.randn(columns, dtype=dtype), "matrix": torch.randn(1, columns, dtype=dtype)}[bias]
    graph = _recorded((lambda a: a @ w) if b is None else (lambda a: torch.addmm(b, a, w)), (x,))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(graph(x), x @ w if b is None else torch.addmm(b, x, w), rtol=tolerance, atol=tolerance * 30)
    for shift in range(1, 17):
        assert torch.equal(graph(x.roll(shift, 0)), graph(x).roll(shift, 0))


def test_constants_on_another_device_are_sent_once():
    """As torch.arange(...).to(x.device): from the host to the device at every step, which no capture survives."""
    step = lambda a: a * torch.linspace(0, 1, 4).to(a.device) * torch.tensor([1.0, 2.0, 1.0, 0.0]).to(a.device)  # noqa: E731
    graph = recording.record(step, (torch.empty(2, 4, device="meta"),))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [torch.ops.aten.mul.Tensor] * 2
    used = [n.target for n in graph.graph.nodes if n.op == "get_attr"]
    assert len(used) == 2 and all(graph.get_buffer(name).is_meta for name in used)
