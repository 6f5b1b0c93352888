"""Cutting generators: every route against a forward hook, and what must be refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastrefine as fr
from fastrefine.errors import GradientError, InputError, SplitError
from fastrefine.models import (
    CycleGANGenerator,
    SAGANGenerator,
    SNGANGenerator,
    StyleGAN2Generator,
    dcgan_generator,
    mlp_generator,
)
from fastrefine.networks.cut import Cut, layers, split
from fastrefine.networks.split import Split

torch.set_num_threads(1)


def settle(module):
    """Eval mode, with statistics, class gains and attention that are not trivial."""
    source = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.1, generator=source)
            part.running_var.uniform_(0.5, 1.5, generator=source)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, 1.0, 0.3)
        elif hasattr(part, "gamma"):
            nn.init.constant_(part.gamma, 0.3)
    return module.eval()


FAMILIES = {
    "dcgan": (lambda: dcgan_generator(32, 10, 4), (10,), False),
    "sngan": (lambda: SNGANGenerator(32, 8, 4), (8,), False),
    "conditional sngan": (lambda: SNGANGenerator(32, 8, 4, 3), (8,), True),
    "sagan": (lambda: SAGANGenerator(32, 8, 2, 3, attention_size=16), (8,), True),
    "stylegan2": (lambda: StyleGAN2Generator(16, 8, 8, 8, 16, 2), (8,), False),
    "cyclegan": (lambda: CycleGANGenerator(4, 2), (3, 16, 16), False),
    "mlp": (lambda: mlp_generator(hidden=(8, 8), batch_norm=True), (2,), False),
}
PLACES = [
    ("dcgan", "0"), ("dcgan", "1"), ("dcgan", "5"), ("sngan", "linear"), ("sngan", "blocks.1"),
    ("conditional sngan", "blocks.0"), ("conditional sngan", "blocks.1.conv1"), ("sagan", "blocks.0"),
    ("sagan", "attention"), ("sagan", "attention.key"), ("stylegan2", "mapping"), ("stylegan2", "layers.1"),
    ("stylegan2", "to_rgb.0"), ("stylegan2", "layers.2.conv"), ("cyclegan", "encoder.2"), ("cyclegan", "blocks.0"),
    ("mlp", "0"), ("mlp", "4"),
]  # fmt: skip


def family(name):
    make, shape, labelled = FAMILIES[name]
    torch.manual_seed(0)
    return settle(make()), *inputs_of(shape, 4, labelled)


def inputs_of(shape, samples, labelled):
    return torch.randn(samples, *shape), (torch.arange(samples) % 3 if labelled else None)


def given(latents, labels):
    return (latents,) if labels is None else (latents, labels)


def hooked(generator, name, inputs, activation=None, call=0):
    """(image, activation) of the whole generator, the output of module ``name`` replaced if one is given."""
    calls, seen = [], []

    def hook(module, args, output):
        calls.append(output)
        if len(calls) == call + 1:
            seen.append(output.detach().clone())
            return None if activation is None else activation.clone()

    handle = generator.get_submodule(name).register_forward_hook(hook)
    image = generator(*inputs)
    handle.remove()
    return image, seen[0]


def assert_equals_hook(cut: Cut, generator, name, inputs, call=0):
    """Values at the generator's own activation, values and gradients at another one."""
    image, activation = hooked(generator, name, inputs, call=call)
    got, context = cut.prefix(*inputs)
    torch.testing.assert_close(got, activation, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut.tail(got.clone(), *context), image, rtol=1e-5, atol=1e-6)
    moved = (activation + 0.1 * torch.randn_like(activation)).requires_grad_()
    expected, _ = hooked(generator, name, inputs, moved, call)
    image = cut.tail(moved, *context)
    weights = torch.randn_like(image)
    torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, moved, weights)[0] for value in (image, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_inner_cut_equals_a_hook_in_values_and_gradients(name, at):
    generator, latents, labels = family(name)
    cut = split(generator, at, latents, labels)
    assert cut.at == at and cut.route == "fx"
    assert_equals_hook(cut, generator, at, given(latents, labels))
    _, shape, labelled = FAMILIES[name]
    assert_equals_hook(cut, generator, at, given(*inputs_of(shape, 7, labelled)))


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_tail_takes_any_selection_of_samples(name, at):
    generator, latents, labels = family(name)
    cut = split(generator, at, latents, labels)
    activation, context = cut.prefix(*given(latents, labels))
    rows = torch.tensor([3, 1, 1])
    image = cut.tail(activation[rows], *(value[rows] for value in context))
    torch.testing.assert_close(image, generator(*given(latents, labels))[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_cuts_at_input_and_output_need_no_graph(name):
    generator, latents, labels = family(name)
    inputs = given(latents, labels)
    image = generator(*inputs)
    first, last = (split(generator, at, latents, labels) for at in ("input", "output"))
    activation, context = first.prefix(*inputs)
    assert first.route == "input" and torch.equal(activation, latents) and len(context) == len(inputs) - 1
    assert torch.equal(first.tail(activation, *context), image)
    activation, context = last.prefix(*inputs)
    assert last.route == "output" and context == () and torch.equal(last.tail(activation), image)


def test_labels_are_carried_as_gains_and_biases():
    generator, latents, labels = family("conditional sngan")
    _, context = split(generator, "blocks.0", latents, labels).prefix(latents, labels)
    assert [tuple(value.shape) for value in context] == [(4, 4, 1, 1)] * 8


def test_stylegan2_carries_styles_and_rgb_but_no_weights():
    generator = StyleGAN2Generator(16, 32, 32, 32, 32, 2).eval()
    latents = torch.randn(4, 32)
    _, context = split(generator, "layers.3", latents).prefix(latents)
    assert (4, 3, 8, 8) in {tuple(value.shape) for value in context}  # the skip image
    assert all(value[0].numel() <= 3 * 8 * 8 for value in context)  # weights per sample are 32 * 32 * 9


def test_tail_holds_no_module_of_the_prefix():
    generator, latents, _ = family("stylegan2")
    tail = split(generator, "layers.1", latents).tail
    assert not any("mapping" in name for name, _ in tail.named_modules())


class Quantise(torch.autograd.Function):
    """Rounds, with the identity as gradient."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Branch(nn.Module):
    """Control flow on values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x) if x.mean() < 1e9 else x


class Chain(nn.Module):
    """A first and a last layer; what is in between is a function of (hidden, latents)."""

    def __init__(self, between=lambda hidden, latents: hidden):
        super().__init__()
        self.first, self.last, self.unused, self.between = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6), between

    def forward(self, latents):
        return self.last(self.between(self.first(latents), latents))


def in_place_on_context(hidden, latents):
    skip = latents * 2
    skip = skip.add_(hidden)
    return skip.mul_(2)


def sizes_of_latents(hidden, latents):
    samples, width = latents.shape
    hidden = hidden.reshape(samples * 2, 3) + 1
    return hidden.view(samples, width) + latents.shape[0] / samples


@pytest.mark.parametrize("block", [Apply(Quantise.apply), Branch()], ids=["autograd function", "branch"])
def test_blocks_that_cannot_be_traced_stay_whole(block):
    generator, latents = nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), block, nn.Linear(6, 3)).eval(), torch.randn(4, 6)
    cut = split(generator, "0", latents)
    assert_equals_hook(cut, generator, "0", (latents,))


def test_export_follows_loops_over_tensors():
    generator = Chain(lambda hidden, latents: torch.stack([row + latents[:, 0] for row in hidden.unbind(1)], 1)).eval()
    latents = torch.randn(4, 6)
    cut = split(generator, "first", latents)
    assert cut.route == "export"
    assert_equals_hook(cut, generator, "first", (latents,))
    assert_equals_hook(cut, generator, "first", (torch.randn(7, 6),))


def test_noise_drawn_before_the_cut_is_carried():
    generator = Chain(lambda hidden, latents: hidden + torch.randn(latents.shape[0], 6)).eval()
    cut = split(generator, "first", torch.randn(4, 6))
    activation, context = cut.prefix(torch.randn(5, 6))
    assert [tuple(value.shape) for value in context] == [(5, 6)]
    assert torch.equal(cut.tail(activation, *context), cut.tail(activation, *context))


def test_sizes_taken_from_the_latents_become_sizes_of_the_tails_batch():
    generator, latents = Chain(sizes_of_latents).eval(), torch.randn(4, 6)
    cut = split(generator, "first", latents)
    activation, context = cut.prefix(latents)
    assert context == ()
    torch.testing.assert_close(cut.tail(activation[:3]), generator(latents)[:3])


def test_tail_leaves_activation_and_context_unchanged():
    for generator in (Chain(in_place_on_context), nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 3))):
        latents = torch.randn(4, 6)
        cut = split(generator.eval(), "first" if isinstance(generator, Chain) else "0", latents)
        activation, context = cut.prefix(latents)
        before = [value.clone() for value in (activation, *context)]
        assert torch.equal(cut.tail(activation, *context), cut.tail(activation, *context))
        assert all(map(torch.equal, before, (activation, *context)))


def test_constant_arguments_are_built_in():
    class Truncated(Chain):
        def forward(self, latents, labels=None, *, truncation=1.0, shift=None):
            return self.last(self.first(latents) * truncation + shift)

    generator, latents, shift = Truncated().eval(), torch.randn(4, 6), torch.ones(6)
    cut = split(generator, "first", latents, kwargs={"truncation": 0.5, "shift": shift})
    activation, context = cut.prefix(latents)
    assert context == () and torch.equal(cut.tail(activation), generator(latents, truncation=0.5, shift=shift))


@pytest.mark.parametrize(
    "normalise",
    [torch.nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm],
    ids=["old spectral", "spectral", "weight"],
)
def test_normalised_weights_can_be_cut(normalise):
    generator = nn.Sequential(normalise(nn.Linear(6, 6)), nn.Tanh(), normalise(nn.Linear(6, 3))).eval()
    latents = torch.randn(4, 6)
    assert_equals_hook(split(generator, "0", latents), generator, "0", (latents,))


class Repeated(Chain):
    def forward(self, latents):
        return self.last(self.first(self.first(latents).relu()))


@pytest.mark.parametrize("call", [0, 1])
def test_one_call_of_a_repeated_module_can_be_cut(call):
    generator, latents = Repeated().eval(), torch.randn(4, 6)
    cut = split(generator, f"first#{call}", latents)
    assert cut.route == "fx"
    assert_equals_hook(cut, generator, "first", (latents,), call=call)


def batch_noise(hidden, latents):
    return hidden + torch.randn_like(latents[0]).mean()


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.identity, self.value = nn.Identity(), nn.Parameter(torch.randn(1, 6))

    def forward(self, latents):
        return latents + self.identity(self.value)


@pytest.mark.parametrize(
    ("generator", "at", "message"),
    [
        (Chain(), "frist", "no module named 'frist'; closest: 'first'"),
        (Chain(), "unused", "'unused' is not executed between latent and image"),
        (Repeated(), "first", 'executed 2 times.*"first#0"'),
        (Repeated(), "first#2", "executed 2 times, calls count from 0"),
        (Repeated(), "first#x", "must be a number from 0, got 'x'"),
        (nn.Sequential(nn.Linear(6, 6), Apply(lambda x: (x, x))), "1", "must return one tensor, got tuple"),
        (Constant(), "identity", r"shape \(1, 6\): not the batch \(4\) first"),
        (Chain(lambda hidden, latents: latents), "first", "does not depend on the cut 'first'"),
        (Chain(batch_noise), "first", "cannot be carried as context: randn_like"),
        (Chain(lambda hidden, latents: hidden + torch.randn(6)), "first", "cannot be carried as context: randn"),
        (Chain(lambda hidden, latents: hidden if hidden.mean() < 9 else -hidden), "first", r"fr.Split\(prefix, tail\)"),
        (Chain(lambda hidden, latents: hidden + torch.randn_like(hidden)), "first", "random numbers"),
    ],
)
def test_split_error_says_what_is_wrong(generator, at, message):
    with pytest.raises(SplitError, match=message):
        split(generator.eval(), at, torch.randn(4, 6))


def test_output_that_is_a_tuple_is_refused():
    class Recurrent(Chain):
        def forward(self, latents):
            return self.last(self.between(latents[None])[0][0])

    with pytest.raises(SplitError, match="'between' is not a single floating tensor but tuple"):
        split(Recurrent(nn.GRU(6, 6)).eval(), "between", torch.randn(4, 6))


def test_failed_split_gives_the_reason_of_each_route():
    generator = Chain(lambda hidden, latents: hidden if hidden.mean() < 9 else -hidden).eval()
    with pytest.raises(SplitError, match=r"(?s)fx: .*control flow.*other modules whole: .*torch\.export: "):
        split(generator, "first", torch.randn(4, 6))


@pytest.mark.parametrize("breaking", [Apply(torch.detach), Apply(lambda x: (x * 4).round())], ids=["detach", "round"])
@pytest.mark.parametrize("at", ["input", "0"])
def test_module_that_stops_the_gradient_is_named(breaking, at):
    generator = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), breaking), nn.Linear(6, 3)).eval()
    with pytest.raises(GradientError, match=r"module '1\.1' stops it"):
        split(generator, at, torch.randn(4, 6))


def test_split_works_in_inference_mode_and_autocast_and_leaves_the_random_state():
    generator, latents, labels = family("conditional sngan")
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        cut = split(generator, "blocks.0", latents + 0, labels)
    assert torch.equal(state, torch.get_rng_state()) and not torch.is_inference_mode_enabled()
    assert_equals_hook(cut, generator, "blocks.0", (latents, labels))


def test_split_does_not_change_the_generator():
    generator, latents, _ = family("dcgan")
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    split(generator, "2", latents)
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in generator.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in generator.modules())


def refined(halves, latents, features=3):
    return fr.Refiner(halves, nn.Linear(features, 1), fr.Collaborative(0.1), max_steps=0, num_slots=4).refine(latents)


def test_given_cut_is_taken_as_it_is():
    generator, latents = Chain(), torch.randn(4, 6)
    out = refined(Split(generator.first, lambda hidden: generator.last(hidden)), latents)
    assert out.report["split"] == "given" and torch.equal(out.images, generator(latents))


def test_given_methods_bring_their_module_along():
    class Halves(Chain):
        def head(self, latents):
            return self.first(latents), (latents,)

        def rest(self, hidden, latents):
            return self.last(hidden + latents)

    halves = Halves()
    assert len(list(Split(halves.head, halves.rest).parameters())) == len(list(halves.parameters()))


def test_given_context_must_belong_to_samples():
    with pytest.raises(SplitError, match="context 0 must be a tensor with the batch"):
        refined(Split(lambda z: (z, (z.sum(),)), lambda a, c: a + c), torch.randn(4, 6), features=6)


def test_given_parts_must_be_callable():
    with pytest.raises(InputError, match="tail must be a module or a callable, got str"):
        Split(nn.Identity(), "tail")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_that_is_listed_can_be_cut_or_is_refused_with_a_reason(name):
    generator, latents, labels = family(name)
    for layer in layers(generator, latents, labels)[::5]:
        try:
            cut = split(generator, str(layer), latents, labels)
        except (GradientError, SplitError) as error:
            assert "does not depend" in str(error) or "no gradient" in str(error)
        else:
            assert tuple(cut.prefix(*given(latents, labels))[0].shape[1:]) == layer.shape
