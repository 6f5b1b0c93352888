"""What depends on weights alone is computed once and follows new weights; values of a network's own making may be read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrefine as fr
from fastrefine.networks import prefix, recording

torch.set_num_threads(1)


def _operations(graph):
    return [getattr(n.target, "overloadpacket", n.target).__name__ for n in graph.graph.nodes if n.op == "call_function"]


class Gained(nn.Module):
    """Weights times a gain and divided by their norm, a view of the result, and memory made of weights that is written to."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        weight = self.weight * 0.5
        weight = weight / weight.norm()
        first, second = torch.unsafe_split(self.bias * 2, 3)
        sums = first.mul_(2) + second  # in place, on what a split gave
        h = F.linear(x, weight.t()[:3].t(), None) if x.shape[1] == 3 else F.linear(x, weight, self.bias * 2)
        return h[:, :3] * sums


@pytest.mark.parametrize("width", [3, 6])
def test_what_depends_on_weights_alone_is_held_and_follows_them(width):
    torch.manual_seed(0)
    module, x = Gained().requires_grad_(False), torch.randn(4, width)
    graph = recording.record(lambda a: (module(a),), (x,), (module,))
    (made,), held = recording.hold_weights([graph])
    wanted = {"linalg_vector_norm", "div"}
    assert wanted <= set(_operations(graph)) and not wanted & set(_operations(made))
    assert not recording.has_derived_constants(made, (module,))
    for _ in range(2):
        for _ in range(2):  # memory that a step writes to would add up
            torch.testing.assert_close(made(x)[0], module(x))
        module.weight.add_(torch.randn(6, 6))
        module.bias.mul_(3)
        held.refresh()


def test_graphs_share_what_they_hold_alike():
    module, x = nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)
    steps = [lambda a: (F.linear(a, module.weight * 2),), lambda a: (F.linear(a + 1, module.weight * 2, module.bias * 2),)]
    graphs = [recording.record(step, (x,), (module,)) for step in steps]
    made, held = recording.hold_weights(graphs)
    assert len(held.buffers) == 2 and all("mul" not in _operations(graph) for graph in made)
    for graph, step in zip(made, steps, strict=True):
        torch.testing.assert_close(graph(x), step(x))


def test_where_nothing_depends_on_weights_alone_nothing_changes():
    layer, x = nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)
    graph = recording.record(lambda a: (layer(a),), (x,), (layer,))
    assert recording.hold_weights([graph]) == ([graph], None)


class Scaled(nn.Module):
    """A discriminator that divides its weights by their norm in every pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        return self.last(F.linear(x, self.weight / self.weight.norm()).relu())


def test_new_weights_of_the_discriminator_reach_a_held_step():
    torch.manual_seed(0)
    generator, d, new = nn.Linear(4, 6), Scaled(), Scaled()
    refiner = fr.Refiner(generator, d, fr.Collaborative(0.1, control="fixed"), at="output", max_steps=3, num_slots=4)
    z = torch.randn(8, 4)
    before = refiner.refine(z)
    assert {"rung": "weights held", "kept": True, "why": ""} in before.report["ladder"]
    after = refiner.with_discriminator(new).refine(z)
    alone = fr.Refiner(generator, new, fr.Collaborative(0.1, control="fixed"), at="output", max_steps=3, num_slots=4).refine(z)
    torch.testing.assert_close(after.images, alone.images)
    assert not torch.allclose(after.images, before.images)


class Sequences(nn.Module):
    """Packed sequences, whose lengths the network makes itself and torch reads on the host."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.cell, self.last = nn.GRU(inputs, 8, 2, batch_first=True), nn.Linear(8, outputs)

    def forward(self, x):
        lengths = torch.full((len(x),), 5)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        found, _ = pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=5)
        return self.last(found) * float(torch.linspace(1, 2, 3)[1])


def test_a_network_that_reads_values_of_its_own_making_is_recorded():
    torch.manual_seed(0)
    generator, d = Sequences(3, 2), Sequences(2, 1)
    refiner = fr.Refiner(
        generator, d, fr.Collaborative(0.1, control="fixed"), at="input", max_steps=3, num_slots=4,
        discriminate=lambda d, x: d(x).mean(1),
    )  # fmt: skip
    z = torch.randn(8, 5, 3)
    out = refiner.refine(z)
    assert out.report["route"] == "flat"
    a = z.clone()
    for _ in range(3):
        a.requires_grad_()
        loss = F.softplus(-d(generator(a)).mean(1)).sum()
        a = (a - 0.1 * torch.autograd.grad(loss, a)[0]).detach()
    torch.testing.assert_close(out.images, generator(a).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("written", [False, True])
def test_values_of_an_input_or_a_weight_are_not_read(written):
    layer = nn.Linear(3, 3).requires_grad_(False)

    def step(a):
        own = torch.ones(3)
        if written:  # no constant any more
            own.copy_(a[0])
        return a * float((own if written else layer.weight).sum())

    with pytest.raises(RuntimeError, match="value out of a tracing tensor"):
        recording.record(step, (torch.randn(2, 3),), (layer,))


def test_gradients_of_slices_of_a_whole_are_joined():
    def step(a):
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            parts = [leaf[:, i] * (i + 1.0) for i in range(5)]
            sliced = [leaf[:, i : i + 1].sin() for i in range(5)]
            loss = sum(part.sum() for part in parts) + sum(part.sum() for part in sliced)
        return torch.autograd.grad(loss, leaf)

    x = torch.randn(3, 5)
    graph = recording.record(step, (x,))
    torch.testing.assert_close(graph(x), step(x))

    def slices(a, ends):
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            loss = sum(leaf.narrow(1, start, size).pow(k + 2).sum() for k, (start, size) in enumerate(ends))
        return torch.autograd.grad(loss, leaf)

    for ends, joined in (([(0, 2), (2, 2), (4, 1)], True), ([(0, 2), (1, 3), (4, 1)], False), ([(0, 2), (3, 2)], False)):
        graph = recording.record(lambda a, ends=ends: slices(a, ends), (x,))
        assert ("cat" in _operations(graph)) == joined
        torch.testing.assert_close(graph(x), slices(x, ends))


def test_joined_gradients_have_the_layout_that_views_after_them_need():
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last)
    layers = [nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False) for _ in range(2)]

    def step(a):
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            loss = sum(layer(part).square().sum() for layer, part in zip(layers, (leaf[:, :2], leaf[:, 2:]), strict=True))
        (grad,) = torch.autograd.grad(loss, leaf)
        return (grad.contiguous().view(4, -1),)

    graph = recording.record(step, (x,), tuple(layers))
    torch.testing.assert_close(graph(x), step(x))


def test_thousands_of_slices_are_joined():
    def step(a):
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            loss = sum(leaf.narrow(1, i, 1).square().sum() for i in range(1200))
        return torch.autograd.grad(loss, leaf)

    x = torch.randn(1, 1200)
    graph = recording.record(step, (x,))
    assert "cat" in _operations(graph) and torch.equal(graph(x)[0], step(x)[0])


class Measured(nn.Module):
    """Weights times a tensor that is made of weights on the host in every pass."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain, self.last = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6)), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(F.linear(x, self.weight * torch.tensor(self.gain.tolist())).relu())


@pytest.mark.parametrize("kind", [Scaled, Measured])
def test_shaped_weights_reach_a_held_step(kind):
    torch.manual_seed(0)
    generator, d, new = nn.Linear(4, 6), kind(), kind()
    refiner = fr.Refiner(generator, d, fr.Collaborative(0.1, control="fixed"), at="output", max_steps=3, num_slots=4)
    z = torch.randn(8, 4)
    refiner.refine(z)
    refiner._networks.refresh(new)
    wanted = fr.Refiner(generator, new, fr.Collaborative(0.1, control="fixed"), at="output", max_steps=3, num_slots=4).refine(z)
    torch.testing.assert_close(refiner.refine(z).images, wanted.images)


class Looking(nn.Module):
    """Reads values of its input where torch does not see it."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        largest = torch.zeros(len(x))
        largest.numpy()[:] = x.detach().numpy().max(1)
        return self.last(x) * torch.tensor([float(value) for value in largest])[:, None]


@pytest.mark.parametrize("case", [{}, {"num_slots": 1}, {"coupling": "lockstep"}, {"alike": True}])
def test_values_of_an_input_that_torch_does_not_see_are_not_baked_in(case):
    torch.manual_seed(0)
    generator, d = nn.Linear(4, 6), Looking()
    options = {"num_slots": 4} | {name: value for name, value in case.items() if name != "alike"}
    refiner = fr.Refiner(generator, d, fr.Collaborative(0.1, control="fixed"), at="output", max_steps=3, **options)
    if "alike" in case:
        refiner.refine(torch.randn(1, 4).expand(8, 4))
    out = refiner.refine(torch.randn(8, 4))
    assert out.report["route"] == "autograd"
    torch.testing.assert_close(d(out.images)[:, 0].detach(), out.logits)


def test_a_last_step_that_gives_other_logits_is_dropped(monkeypatch):
    honest = prefix.first_outputs

    def wrong(graph, count, effects):
        found = honest(graph, count, effects)
        output = next(iter(reversed(found.graph.nodes)))
        logit, *rest = output.args[0]
        with found.graph.inserting_before(output):
            output.args = ((found.graph.call_function(torch.ops.aten.mul.Tensor, (logit, 1.01)), *rest),)
        found.recompile()
        return found

    monkeypatch.setattr(prefix, "first_outputs", wrong)
    torch.manual_seed(0)
    generator, d = nn.Linear(4, 6), nn.Linear(6, 1)
    out = fr.Refiner(generator, d, fr.Collaborative(0.1, control="fixed"), at="output", max_steps=3, num_slots=4).refine(
        torch.randn(8, 4)
    )
    assert not {entry["rung"]: entry["kept"] for entry in out.report["ladder"]}["last step without gradient"]
    torch.testing.assert_close(d(out.images)[:, 0].detach(), out.logits)


def test_a_network_with_a_sparse_tensor_is_recorded():
    def step(a):
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.tensor([2.0, 3.0]), (2, 2))
        return (torch.sparse.mm(sparse, a.t()).t(),)

    x = torch.randn(3, 2)
    torch.testing.assert_close(recording.record(step, (x,))(x), step(x))


def test_what_cannot_be_held_is_computed_in_every_step(monkeypatch):
    def refuse(graphs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("fastrefine.networks.prefix.hold_weights", refuse)
    torch.manual_seed(0)
    refiner = fr.Refiner(nn.Linear(4, 6), Scaled(), fr.Collaborative(0.1), at="output", max_steps=3, num_slots=4)
    out = refiner.refine(torch.randn(8, 4))
    assert out.report["route"] == "flat" and out.report["num_slots"] == 4
    assert {entry["rung"]: entry["kept"] for entry in out.report["ladder"]}["weights held"] is False
