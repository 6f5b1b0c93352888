"""FAULTS 11, 12, 13 and 27: where and how a generator can be cut, and wrapped modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr
from tests.support.fault_networks import IMAGE, LATENT, discriminator, generator, plain_loop, refiner, same_result

N = 6
CLASSES = 3


class Skips(nn.Module):
    """Latent and label styles, a skip across the middle, and an unused layer."""

    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(CLASSES, 8)
        self.first, self.middle, self.last = nn.Linear(LATENT, 8), nn.Linear(8, 8), nn.Linear(8, IMAGE)
        self.unused, self.act = nn.Linear(8, 8), nn.ReLU(inplace)

    def forward(self, z, y):
        style = self.embed(y)
        h = self.first(z)
        a = self.middle(torch.tanh(h))
        a = self.act(a) + style
        return self.last(self.act(a * 1.0) + h) + z[:, :IMAGE]


class ByClass(nn.Module):
    """A projection discriminator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.body, self.embed, self.out = nn.Linear(IMAGE, 8), nn.Embedding(CLASSES, 8), nn.Linear(8, 1)

    def forward(self, x, y):
        h = torch.tanh(self.body(x))
        return self.out(h)[:, 0] + (self.embed(y) * h).sum(1)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("midle", "no module named 'midle'; closest: 'middle'"),
        ("unused", "'unused' is not executed between latent and image"),
        ("act", r"'act' is executed 2 times: say which call is meant, \"act#0\" to \"act#1\""),
    ],
)
def test_a_layer_that_cannot_be_refined_is_an_error_that_says_why(at, message):
    """FAULTS 11"""
    with pytest.raises(fr.SplitError, match=message):
        refiner(Skips(), ByClass(), at=at).sample(N, labels=1)


@pytest.mark.parametrize("at", ["first", "middle", "act#0", "act#1"])
def test_skips_styles_and_labels_cross_the_cut_with_their_sample(at):
    """FAULTS 12: equal to a forward hook that replaces the module's output, sample by sample."""
    g, d = Skips().double(), ByClass().double()
    name, _, number = at.partition("#")
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    z = fr.Normal(LATENT).sample(torch.arange(N), 0, torch.float64)
    sampler = fr.Collaborative(0.2, control="fixed")
    out = refiner(g, d, sampler, at=at, precision="float64", num_slots=3).refine(z, labels=labels)
    for i in range(N):
        one, label = z[i : i + 1], labels[i : i + 1]
        a = seen_at(g, g.get_submodule(name), int(number or 0), one, label)[1].detach()
        for _ in range(5):
            a.requires_grad_()
            image, _ = seen_at(g, g.get_submodule(name), int(number or 0), one, label, a)
            loss = F.softplus(-d(image, label)).sum()
            a = (a - 0.2 * torch.autograd.grad(loss, a)[0]).detach()
        assert torch.allclose(out.activations[i], a[0], atol=1e-10), (i, at)


def seen_at(g, module, number, z, label, replacement=None):
    """(image, activation) with the output of a module's call ``number``, from 0, replaced where one is given."""
    calls = []

    def hook(module, args, output):
        calls.append(output.clone())
        return replacement.clone() if len(calls) == number + 1 and replacement is not None else None

    handle = module.register_forward_hook(hook)
    image = g(z, label)
    handle.remove()
    return image, calls[number]


def test_what_cannot_be_carried_per_sample_is_named():
    """FAULTS 12"""
    split = fr.Split(lambda z: (z * 2, (torch.ones(3),)), lambda a, c: a[:, :IMAGE] * c)
    with pytest.raises(fr.FastrefineError, match=r"Split: the context 0 must be .*batch \(4\) first, got shape \(3,\)"):
        refiner(split).sample(N)


@pytest.mark.parametrize("at", ["0", "2", "input"])
def test_in_place_layers_after_the_cut_harm_nothing(at):
    """FAULTS 13"""

    def network(inplace):
        torch.manual_seed(9)
        return nn.Sequential(
            nn.Linear(LATENT, 8), nn.ReLU(inplace), nn.Linear(8, 8), nn.LeakyReLU(0.2, inplace), nn.Linear(8, IMAGE)
        )

    d = nn.Sequential(nn.ReLU(True), nn.Linear(IMAGE, 8), nn.ReLU(True), nn.Linear(8, 1))
    plain = nn.Sequential(nn.ReLU(), d[1], nn.ReLU(), d[3])
    z = refiner(max_steps=0).sample(N).latents
    before = z.clone()
    out = refiner(network(True), d, at=at).refine(z)
    assert torch.equal(z, before)
    assert same_result(out, refiner(network(False), plain, at=at).refine(z))
    again = refiner(network(True), d, at=at, max_steps=0).refine(z)
    assert torch.allclose(again.images, network(False)(z), atol=1e-6), "activations of proposals are unharmed"


def test_images_given_are_unharmed_by_a_discriminator_that_works_in_place():
    """FAULTS 13"""
    d = nn.Sequential(nn.LeakyReLU(0.2, True), nn.Linear(IMAGE, 1))
    x = torch.randn(N, IMAGE)
    before = x.clone()
    r = fr.Refiner(None, d, fr.Collaborative(0.1), at="output", max_steps=0, num_slots=4)
    logits = r.score(x)
    out = r.refine(x)
    assert torch.equal(x, before) and torch.equal(out.images, before) and torch.allclose(out.logits, logits)


@pytest.mark.parametrize("at", ["middle", "first"])
def test_context_is_unharmed_by_in_place_layers(at):
    """FAULTS 13"""
    labels = torch.arange(N) % CLASSES
    out = refiner(Skips(inplace=True), ByClass(), at=at).sample(N, labels=labels)
    assert same_result(out, refiner(Skips(), ByClass(), at=at).sample(N, labels=labels))


def test_a_given_tail_that_works_in_place_harms_neither_activation_nor_context():
    """FAULTS 13"""

    def tail(a, c):
        return (a.relu_() + c.mul_(0.5))[:, :IMAGE]

    def clean(a, c):
        return (a.relu() + c * 0.5)[:, :IMAGE]

    out = refiner(fr.Split(lambda z: (z + 1, (z * 3,)), tail)).sample(N)
    assert same_result(out, refiner(fr.Split(lambda z: (z + 1, (z * 3,)), clean)).sample(N))


class Detaching(nn.Module):
    def forward(self, x):
        return x.detach() * 2


class Rounding(nn.Module):
    def forward(self, x):
        return torch.round(x * 4) / 4


class NoGrad(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return x * 2


@pytest.mark.parametrize("breaking", [Detaching, Rounding, NoGrad])
@pytest.mark.parametrize("at", ["input", "0"])
def test_a_module_of_the_generator_that_stops_the_gradient_is_named(breaking, at):
    """FAULTS 13"""
    g = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), breaking(), nn.Linear(8, IMAGE))
    with pytest.raises(fr.GradientError, match="'2'"):
        refiner(g, at=at).sample(N)
    assert len(refiner(g, at="2").sample(N)) == N, "behind it there is a gradient"


@pytest.mark.parametrize("breaking", [Detaching, Rounding, NoGrad])
def test_a_module_of_the_discriminator_that_stops_the_gradient_is_named(breaking):
    """FAULTS 13"""
    d = nn.Sequential(nn.Linear(IMAGE, 8), nn.Tanh(), breaking(), nn.Linear(8, 1))
    with pytest.raises(fr.GradientError, match=r"discriminator module '2' \("):
        refiner(d=d).sample(N)


def test_a_straight_through_gradient_is_followed():
    """FAULTS 13: a gradient of one's own is neither broken nor lost by tracing."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.round(x * 4) / 4

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    class Quantise(nn.Module):
        def forward(self, x):
            return Through.apply(x)

    g = nn.Sequential(*generator()[:2], Quantise(), *generator()[2:]).double()
    d = discriminator().double()
    r = refiner(g, d, fr.Collaborative(0.1, control="fixed"), precision="float64")
    z = refiner(max_steps=0, precision="float64").sample(N).latents
    expected, images = plain_loop(g, d, z, 5, 0.1)
    out = r.refine(z)
    assert torch.allclose(out.activations, expected, atol=1e-12) and torch.allclose(out.images, images, atol=1e-12)


WRAPPED = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled within data parallel": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize(("how", "at"), zip(WRAPPED, ("input", "1", "1"), strict=True))
def test_wrapped_modules_are_unwrapped(how, at):
    """FAULTS 27"""
    wrap = WRAPPED[how]
    g, d = wrap(generator()), wrap(discriminator())
    out = refiner(g, d, at=at).sample(N)
    assert same_result(out, refiner(at=at).sample(N)) and isinstance(g, type(wrap(generator())))


def test_modules_compiled_in_place_or_inside_work():
    """FAULTS 27"""
    g, d = generator(), discriminator()
    g.compile(backend="eager")
    d[0] = torch.compile(d[0], backend="eager")
    out = refiner(g, d).sample(N)
    assert torch.allclose(out.images, refiner().sample(N).images, atol=1e-6)
    assert isinstance(d[0], type(torch.compile(nn.Linear(1, 1), backend="eager")))


@pytest.mark.parametrize("side", ["generator", "discriminator"])
def test_scripted_modules_are_refused_with_advice(side):
    """FAULTS 27"""
    g, d = generator(), discriminator()
    if side == "generator":
        g = torch.jit.trace(g, torch.zeros(2, LATENT))
    else:
        d = torch.jit.script(d)
    with pytest.raises(fr.InputError, match="scripted or traced module .* give the nn.Module it was made from"):
        refiner(g, d).sample(N)


@pytest.mark.parametrize("side", ["generator", "discriminator"])
def test_scripted_parts_are_named(side):
    """FAULTS 27"""
    networks = {"g": generator(), "d": discriminator()}
    networks[side[0]][1] = torch.jit.script(nn.Sequential(nn.Tanh()))
    with pytest.raises(fr.InputError, match="module '1' is scripted or traced.* give the nn.Module it was made from"):
        refiner(**networks).sample(N)


@pytest.mark.parametrize("at", ["input", "norm1"])
def test_tied_weights_stay_tied_through_freezing(at):
    """FAULTS 27: one weight under two BatchNorms must not be folded into either."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(10)
            self.one, self.two = nn.Linear(LATENT, LATENT), nn.Linear(LATENT, LATENT)
            self.last = nn.Linear(LATENT, IMAGE)
            self.norm1, self.norm2 = nn.BatchNorm1d(LATENT), nn.BatchNorm1d(LATENT)
            self.two.weight = self.one.weight
            for norm in (self.norm1, self.norm2):
                nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.weight, 0.5, 2.0)

        def forward(self, z):
            h = torch.tanh(self.norm1(self.one(z)))
            return self.last(torch.tanh(self.norm2(self.two(h))) + self.one(h))

    g, d = Tied().double().eval(), discriminator().double()
    z = refiner(max_steps=0, precision="float64").sample(N).latents
    r = refiner(g, d, fr.Collaborative(0.1, control="fixed"), at=at, precision="float64")
    out = r.refine(z)
    if at == "input":
        _, images = plain_loop(g, d, z, 5, 0.1)
        assert torch.allclose(out.images, images, atol=1e-10)
    low = refiner(g, d, fr.Collaborative(0.1, control="fixed"), at=at).refine(z)
    assert torch.allclose(low.images.double(), out.images, atol=1e-4)
    assert g.one.weight is g.two.weight


def test_a_generator_and_discriminator_that_share_a_module_work():
    """FAULTS 27"""
    shared = nn.Linear(IMAGE, IMAGE)
    g, d = nn.Sequential(nn.Linear(LATENT, IMAGE), shared), nn.Sequential(shared, nn.Tanh(), nn.Linear(IMAGE, 1))
    z = refiner(max_steps=0).sample(N).latents
    out = refiner(g, d, fr.Collaborative(0.1, control="fixed")).refine(z)
    _, images = plain_loop(g, d, z, 5, 0.1)
    assert torch.allclose(out.images, images, atol=1e-5)
