"""Every place in every kind of generator against a plain loop that puts the activation there by a hook."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastrefine as fr
from fastrefine.errors import InputError, SplitError
from fastrefine.models import (
    CycleGANGenerator,
    SAGANGenerator,
    SNGANGenerator,
    StyleGAN2Generator,
    dcgan_generator,
    mlp_generator,
)
from fastrefine.networks import copies, cut, ladder, prefix, recording
from fastrefine.networks.split import Split

torch.set_num_threads(1)
STEPS, SIZE = 3, 0.1


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
    ("dcgan", "input"), ("dcgan", "0"), ("dcgan", "1"), ("dcgan", "5"), ("dcgan", "output"), ("sngan", "linear"),
    ("sngan", "blocks.1"), ("conditional sngan", "blocks.0"), ("conditional sngan", "blocks.1.conv1"), ("sagan", "blocks.0"),
    ("sagan", "attention"), ("sagan", "attention.key"), ("stylegan2", "mapping"), ("stylegan2", "layers.1"),
    ("stylegan2", "to_rgb.0"), ("stylegan2", "layers.2.conv"), ("cyclegan", "encoder.2"), ("cyclegan", "blocks.0"),
    ("mlp", "0"), ("mlp", "4"),
]  # fmt: skip


class Flat(nn.Module):
    """A discriminator of anything: the tutorial's view, then two layers."""

    def __init__(self, features):
        super().__init__()
        self.hidden, self.last = nn.Linear(features, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.nn.functional.leaky_relu(self.hidden(x.reshape(x.size(0), -1)), 0.2))


def first(output):
    return next(first(o) for o in output) if isinstance(output, (tuple, list)) else output


def plain_loop(generator, discriminator, at, inputs, call=0):
    """(image, logit) after STEPS plain steps at ``at``, the whole generator run each time."""

    def run(activation=None):
        calls, seen = [], []

        def hook(module, args, output):
            calls.append(output)
            if len(calls) == call + 1:
                seen.append(first(output).detach().clone())
                if activation is not None:
                    return (activation, *output[1:]) if isinstance(output, tuple) else activation

        if at == "output":
            return (first(generator(*inputs)) if activation is None else activation), first(generator(*inputs)).detach()
        if at == "input":
            return first(generator(inputs[0] if activation is None else activation, *inputs[1:])), inputs[0].clone()
        handle = generator.get_submodule(at).register_forward_hook(hook)
        image = first(generator(*inputs))
        handle.remove()
        return image, seen[0]

    a = run()[1]
    for step in range(STEPS + 1):
        a = a.detach().requires_grad_()
        image = run(a.clone())[0]
        logit = discriminator(image).flatten()
        if step == STEPS:
            return image.detach(), logit.detach()
        a = a - SIZE * torch.autograd.grad(nn.functional.softplus(-logit).sum(), a)[0]


def refined(generator, discriminator, at, latents, labels=None, **options):
    sampler = fr.Collaborative(SIZE, control="fixed")
    one = fr.Refiner(generator, discriminator, sampler, at=at, max_steps=STEPS, **{"num_slots": 4, **options})
    return one.refine(latents, labels=labels)


def agrees(generator, at, latents, labels=None, call=None, tolerance=1e-4, **options):
    """Refine there and compare with the plain loop; the Result."""
    inputs = (latents,) if labels is None else (latents, labels)
    torch.manual_seed(1)
    discriminator = Flat(first(generator(*inputs))[0].numel())
    out = refined(generator, discriminator, at if call is None else f"{at}#{call}", latents, labels, **options)
    wide = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    reference = copy.deepcopy(generator, copies.non_leaf_tensors(generator)).double(), copy.deepcopy(discriminator).double()
    images, logits = plain_loop(*reference, at, wide, call or 0)
    torch.testing.assert_close(out.images.double(), images, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.logits.double(), logits, rtol=0, atol=10 * tolerance)
    return out


def rungs(out):
    return {entry["rung"]: entry["kept"] for entry in out.report["ladder"]}


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_every_place_gives_what_a_plain_loop_gives(name, at):
    make, shape, labelled = FAMILIES[name]
    torch.manual_seed(0)
    generator = settle(make())
    out = agrees(generator, at, torch.randn(6, *shape), torch.arange(6) % 3 if labelled else None)
    assert rungs(out)["step recorded"]
    if name != "stylegan2":  # a grouped convolution may round by the place in the batch
        assert out.report["repeatable"] == "bitwise"


def test_stylegan2_carries_styles_and_rgb_but_no_weights(monkeypatch):
    seen, original = [], prefix.without_prefix
    monkeypatch.setattr(prefix, "without_prefix", lambda *given: seen.append(original(*given)) or seen[-1])
    torch.manual_seed(0)
    out = agrees(settle(StyleGAN2Generator(16, 32, 32, 32, 32, 2)), "layers.3", torch.randn(4, 32))
    assert rungs(out)["prefix cached"]
    carried = seen[0].prefix(torch.randn(4, 32))
    assert (4, 3, 8, 8) in {tuple(value.shape) for value in carried}  # the skip image
    assert all(value[0].numel() <= 3 * 8 * 8 for value in carried)  # weights per sample are 32 * 32 * 9


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Quantise(torch.autograd.Function):
    """Rounds, with the identity as gradient."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Chain(nn.Module):
    """A first and a last layer; what is in between is a function of (hidden, latents)."""

    def __init__(self, between=lambda hidden, latents: hidden):
        super().__init__()
        self.first, self.last, self.unused, self.between = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6), between

    def forward(self, latents):
        return self.last(self.between(self.first(latents), latents))


class Repeated(Chain):
    def forward(self, latents):
        return self.last(self.first(self.first(latents).relu()))


class Recurrent(Chain):
    """States made in forward, and a tuple from the layer that is refined."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(6, 6, batch_first=True)

    def forward(self, latents):
        found, state = self.cell(self.first(latents)[:, None].expand(-1, 3, -1), latents.new_zeros(1, len(latents), 6))
        return self.last(found[:, -1] + state[0])


class Computed(Chain):
    """Keeps a computed tensor after a forward pass."""

    def forward(self, latents):
        self.kept = self.first(latents)
        return self.last(self.kept)


def in_place_on_context(hidden, latents):
    skip = latents * 2
    skip = skip.add_(hidden)
    return skip.mul_(2)


def in_place_on_a_view(hidden, latents):
    skip = latents * 2
    skip[:, :3].add_(1)
    both = skip + hidden
    both[:, 0].mul_(0.5)
    return both


def sizes_of_latents(hidden, latents):
    samples, width = latents.shape
    assert hidden.shape[0] == latents.shape[0]
    hidden = hidden.reshape(samples * 2, 3) + 1
    return hidden.view(samples, width) + latents.shape[0] / samples


def loop_over_rows(hidden, latents):
    return torch.stack([row + latents[:, 0] for row in hidden.unbind(1)], 1)


IDIOMS = {
    "an autograd function": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), Apply(Quantise.apply), nn.Linear(6, 3)),
        "0",
    ),
    "control flow on values": (lambda: Chain(lambda h, z: h if h.mean() < 9 else -h), "first"),
    "control flow on the latents": (lambda: Chain(lambda h, z: h if z.mean() < 9 else -h), "first"),
    "a loop over rows": (lambda: Chain(loop_over_rows), "first"),
    "sizes of the latents": (lambda: Chain(sizes_of_latents), "first"),
    "in place on the context": (lambda: Chain(in_place_on_context), "first"),
    "in place on a view": (lambda: Chain(in_place_on_a_view), "first"),
    "a recurrent layer": (Recurrent, "cell"),
    "before a recurrent layer": (Recurrent, "first"),
    "a kept tensor": (Computed, "first"),
    "old spectral norm": (
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
        "0",
    ),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)), "0"),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)), "0"),
    "a tuple": (lambda: nn.Sequential(nn.Linear(6, 6), Apply(lambda x: (x, x.sum(1))), Apply(lambda x: x[0] * 2)), "1"),
}


@pytest.mark.parametrize("at", ["input", "inside"])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_idioms_of_other_peoples_generators(idiom, at):
    torch.manual_seed(0)
    make, place = IDIOMS[idiom]
    agrees(make().eval(), place if at == "inside" else "input", torch.randn(6, 6))


@pytest.mark.parametrize("call", [0, 1])
def test_one_call_of_a_repeated_module_can_be_refined(call):
    torch.manual_seed(0)
    agrees(Repeated().eval(), "first", torch.randn(6, 6), call=call)


class Viewed(nn.Module):
    """N1: a view of a convolution's output, as tutorials write it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(64, 1)

    def forward(self, x):
        out = self.conv(x)
        return self.head(out.view(out.shape[0], -1))


class Normalised(nn.Module):
    """N2 and N4: a weight divided by its norm of a view, inside forward; a bias of rank 2."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 1, 3, 3)), nn.Parameter(torch.randn(1, 1))
        self.last = nn.Parameter(torch.randn(64, 1))

    def forward(self, x):
        weight = self.weight / self.weight.view(4, -1).norm()
        out = nn.functional.conv2d(x, weight, stride=2, padding=1)
        return torch.addmm(self.bias, out.reshape(len(x), -1), self.last)


class Grouped(nn.Module):
    """N3 and N5: a parameter of rank 5, a buffer without dimensions in pointwise arithmetic."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 1, 3, 3))
        self.register_buffer("gain", torch.tensor(0.7))

    def forward(self, x):
        out = nn.functional.conv2d(x, self.weight[0] * self.gain.tanh(), stride=2, padding=1)
        return (out * self.gain).sum((1, 2, 3))


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", [Viewed, Normalised, Grouped])
def test_idioms_of_other_peoples_discriminators(kind, precision):
    torch.manual_seed(0)
    d, x = kind(), torch.randn(6, 1, 8, 8)
    a = x
    for _ in range(STEPS):
        a = a.detach().requires_grad_()
        a = a - SIZE * torch.autograd.grad(nn.functional.softplus(-d(a).flatten()).sum(), a)[0]
    out = refined(None, d, "output", x, precision=precision)
    torch.testing.assert_close(out.images.float(), a.detach(), rtol=0, atol=1e-4 if precision != "bfloat16" else 0.05)


class Tutorial(nn.Module):
    """A discriminator as tutorials write it: strided convolutions, a view, a linear layer."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 16, 4, 2, 1), nn.LeakyReLU(0.2)
        )
        self.last = nn.Linear(16 * 16, 1)

    def forward(self, x):
        x = self.body(x)
        return self.last(x.view(x.size(0), -1))


def tutorial_generator(channels, kind):
    last = (
        [nn.ConvTranspose2d(8, channels, 4, 2, 1)]
        if kind == "transposed"
        else [nn.Upsample(scale_factor=2), nn.Conv2d(8, channels, 3, 1, 1)]
    )
    return nn.Sequential(
        nn.Unflatten(1, (10, 1, 1)), nn.ConvTranspose2d(10, 16, 4), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True), *last, nn.Tanh(),
    )  # fmt: skip


@pytest.mark.parametrize("at", ["input", "3", "6", "output"])
@pytest.mark.parametrize("kind", ["transposed", "upsampled"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_tutorials_gan_takes_the_flat_route(channels, kind, at):
    torch.manual_seed(0)
    g, d, z = settle(tutorial_generator(channels, kind)), Tutorial(channels), torch.randn(6, 10)
    out = refined(g, d, at, z)
    images, logits = plain_loop(copy.deepcopy(g).double(), copy.deepcopy(d).double(), at, (z.double(),))
    torch.testing.assert_close(out.images.double(), images, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.logits.double(), logits, rtol=0, atol=1e-3)
    assert out.report["route"] == "flat" and rungs(out)["step recorded"]


def test_a_step_that_cannot_be_recorded_for_all_slots_runs_plainly(monkeypatch):
    original = recording.record

    def record(function, given, modules=()):
        if len(given[0]) > 4:
            raise ValueError("not today")
        return original(function, given, modules)

    monkeypatch.setattr(recording, "record", record)
    torch.manual_seed(0)
    out = agrees(settle(dcgan_generator(32, 10, 4)), "1", torch.randn(6, 10), num_slots=40)
    assert out.report["route"] == "autograd" and not rungs(out)["step recorded for all slots"]


@pytest.mark.parametrize("mutant", ["wrong by 1 %", "raises"])
def test_a_rung_that_is_wrong_or_raises_is_dropped(mutant, monkeypatch):
    """FAULTS 33"""
    original = ladder.Form.folded

    def folded(self, fold):
        if mutant == "raises":
            raise KeyError("not today")
        form = original(self, fold)
        with torch.no_grad():
            for p in form.d.parameters():
                p.mul_(1.01)
        return form

    monkeypatch.setattr(ladder.Form, "folded", folded)
    torch.manual_seed(0)
    out = agrees(settle(dcgan_generator(32, 10, 4)), "1", torch.randn(6, 10))
    tried = [entry for entry in out.report["ladder"] if "batch norm" in entry["rung"]]
    assert len(tried) == 1 and not any(entry["kept"] for entry in tried) and all(entry["why"] for entry in tried)


@pytest.mark.parametrize(("generator", "at", "message"), [
    (Chain(), "frist", "no module named 'frist'; closest: 'first'"),
    (Chain(), "unused", "'unused' is not executed between latent and image"),
    (Repeated(), "first", 'executed 2 times.*"first#0"'),
    (Repeated(), "first#2", "executed 2 times, calls count from 0"),
    (Repeated(), "first#x", "must be a number from 0, got 'x'"),
    (nn.Sequential(nn.Linear(6, 6), Apply(lambda x: x[:1]), nn.Linear(6, 3), Apply(lambda x: x.expand(4, -1))), "1",
     r"shape \(1, 6\): not the batch \(4\) first"),
    (Chain(lambda hidden, latents: latents), "first", "does not depend on the cut 'first'"),
])  # fmt: skip
def test_a_place_that_cannot_be_refined_is_refused_with_the_reason(generator, at, message):
    with pytest.raises((SplitError, InputError), match=message):
        refined(generator.eval(), Flat(3), at, torch.randn(4, 6), coupling="lockstep")


def test_the_generator_is_not_changed():
    torch.manual_seed(0)
    generator, discriminator, latents = dcgan_generator(32, 10, 4), Flat(3 * 32 * 32), torch.randn(4, 10)
    before, state = copy.deepcopy(generator.state_dict()), torch.get_rng_state()
    refined(generator, discriminator, "2", latents)
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items()) and generator.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in generator.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in generator.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_given_methods_bring_their_module_along():
    class Parts(Chain):
        def head(self, latents):
            return self.first(latents), (latents,)

        def rest(self, hidden, latents):
            return self.last(hidden + latents)

    parts = Parts()
    assert len(list(Split(parts.head, parts.rest).parameters())) == len(list(parts.parameters()))


def test_given_parts_must_be_callable():
    with pytest.raises(InputError, match="tail must be a module or a callable, got str"):
        Split(nn.Identity(), "tail")


# --- a place to begin with


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def test_the_middle_is_a_whole_block_and_wrappers_do_not_hide_it():
    class Wrapped(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.main = nn.Sequential(*parts)

        def forward(self, z):
            return self.main(z)

    blocks = Wrapped(Shortcut(), Shortcut(), Shortcut(), Shortcut(), nn.Tanh())
    assert cut.middle(fr.layers(blocks, torch.randn(4, 8))) == "main.1"
    half = Wrapped(nn.Linear(8, 8), Shortcut(), nn.Tanh())  # two thirds of the work lie inside of one block
    assert cut.middle(fr.layers(half, torch.randn(4, 8))) == "main.0"
    plain = Wrapped(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
    assert cut.middle(fr.layers(plain, torch.randn(4, 8))) == "main.1"
    assert cut.middle(fr.layers(nn.Tanh(), torch.randn(4, 8))) == "input"
