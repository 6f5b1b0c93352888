"""coupling="freeze": statistics of the batch are held at their value on reference images."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr

STEP = 0.1


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 192), nn.Unflatten(1, (3, 8, 8)))


class Head(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.out = nn.Conv2d(channels, 8, 3, 2, 1), nn.Linear(8 * 16, 1)

    def forward(self, x):
        return self.out(F.leaky_relu(self.conv(x), 0.2).flatten(1))


class MinibatchDeviation(nn.Module):
    """StyleGAN2's (Karras et al. 2020): the standard deviation in groups of 4, a mean for each of F features."""

    def __init__(self, features=2):
        super().__init__()
        self.features = features
        self.held = None  # (1, F, 1, 1) in place of the batch's own

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.held.expand(n, -1, h, w) if self.held is not None else self.of(x).repeat(min(4, n), 1, h, w)
        return torch.cat([x, y], 1)

    def of(self, x):
        n, c, h, w = x.shape
        y = x.reshape(min(4, n), -1, self.features, c // self.features, h, w)
        y = y - y.mean(0)
        return (y.square().mean(0) + 1e-8).sqrt().mean([2, 3, 4]).reshape(-1, self.features, 1, 1)


class InlineDeviation(nn.Module):
    """As tutorials write it: one number for the batch, in groups of 4 where it can be divided."""

    def forward(self, x):
        y = x.view(4, -1, *x.shape[1:]) if len(x) % 4 == 0 else x[None]
        return torch.cat([x, y.std(0, unbiased=False).mean().expand(len(x), 1, *x.shape[2:])], 1)


class MinibatchFeatures(nn.Module):
    """Minibatch discrimination (Salimans et al. 2016)."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.Parameter(0.1 * torch.randn(192, 15))

    def forward(self, x):
        x = x.flatten(1)
        m = (x @ self.kernels).view(-1, 5, 3)
        return torch.cat([x, torch.exp(-(m[None] - m[:, None]).abs().sum(3)).sum(0) - 1], 1)


class Attention(nn.Module):
    """Each sample is mixed with those that are like it: no statistic of the batch."""

    def forward(self, x):
        f = x.flatten(1)
        return x + ((f @ f.t() / f.shape[1]).softmax(1) @ f).view_as(x)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounded(nn.Module):
    def forward(self, x):
        return StraightThrough.apply(4 * x) / 4


def networks(*layers, channels):
    torch.manual_seed(0)
    return Generator(), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, Head(channels))


def refiner(g, d, **options):
    given = {"max_steps": 3, "coupling": "freeze", "real": reference()} | options
    return fr.Refiner(g, d, fr.Collaborative(step_size=STEP, control="fixed"), **given)


def reference(n=64):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def loop(g, d, z, steps=3):
    for _ in range(steps):
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.softplus(-d(g(z))).sum(), z)
        z = z - STEP * grad
    return g(z).detach()


def test_the_statistic_is_held_at_its_mean_over_groups_of_the_reference():
    deviation = MinibatchDeviation()
    g, d = networks(deviation, channels=6)
    z = torch.randn(12, 4)
    out = refiner(g, d, group_size=4, at="input").refine(z)
    with torch.no_grad():
        features = d[0](reference())
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        groups = [deviation.of(features[rows]) for rows in order.split(4)]
        before = torch.cat([d(reference()[rows]) for rows in order.split(4)])[:, 0]
    deviation.held = torch.cat(groups).mean(0, keepdim=True)
    torch.testing.assert_close(out.images, loop(g, d, z), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(out.logits, d(out.images)[:, 0], atol=1e-5, rtol=1e-5)
        after = d(reference()[order])[:, 0]
    told = out.report["coupling"]
    assert told["held"] == ["mean (1, 2, 1, 1)"]
    assert told["logit_change"] == pytest.approx(float((after - before).square().mean().sqrt()), rel=1e-3)
    assert told["logit_spread"] == pytest.approx(float(before.std()), rel=1e-3)


@pytest.mark.parametrize("kind", ["deviation", "two of them", "inline", "batch norm", "minibatch features"])
def test_samples_are_independent_whatever_their_companions_and_their_number(kind):
    g, d = {
        "deviation": lambda: networks(MinibatchDeviation(), channels=6),
        "two of them": lambda: networks(
            MinibatchDeviation(), nn.Conv2d(6, 4, 3), nn.LeakyReLU(0.2, inplace=True), nn.ZeroPad2d(1), MinibatchDeviation(),
            channels=6,
        ),
        "inline": lambda: networks(InlineDeviation(), channels=5),
        "batch norm": lambda: networks(nn.BatchNorm2d(4, track_running_stats=False), channels=4),
        "minibatch features": lambda: (Generator(), nn.Sequential(MinibatchFeatures(), nn.Linear(197, 1))),
    }[kind]()  # fmt: skip
    z = torch.randn(12, 4)
    made = refiner(g, d)
    out = made.refine(z)
    assert out.report["coupling"]["held"] and out.report["route"] == "flat"
    assert out.report["coupling"]["logit_change"] < 0.1 * out.report["coupling"]["logit_spread"]
    for few, slots in ((5, 8), (12, 3)):
        found = made.replaced(num_slots=slots).refine(z[:few])
        torch.testing.assert_close(found.images, out.images[:few], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.score(out.images[3:8]), out.logits[3:8], atol=1e-5, rtol=1e-5)


def test_samples_that_finish_leave_their_slots():
    g, d = networks(MinibatchDeviation(), channels=6)
    z = torch.randn(40, 4)
    threshold = float(refiner(g, d, max_steps=0).refine(z).logits.median())
    out = refiner(g, d, max_steps=20, stop=threshold, num_slots=8).refine(z)
    together = refiner(g, d, max_steps=20, stop=threshold, num_slots=8, coupling="lockstep", group_size=4).refine(z)
    assert out.report["slot_efficiency"] > together.report["slot_efficiency"] + 0.1


def test_without_real_images_the_prior_gives_the_reference():
    g, d = networks(MinibatchDeviation(), channels=6)
    made = refiner(g, d, real=None, prior=fr.Normal(4))
    assert made.sample(5).report["coupling"]["held"] == ["mean (2, 2, 1, 1)"]
    with pytest.raises(fr.InputError, match="pass real=, or prior="):
        refiner(g, d, real=None).refine(torch.randn(4, 4))


def test_reduced_precision_and_shaping_keep_what_is_held():
    g, d = networks(MinibatchDeviation(), channels=6)
    z = torch.randn(8, 4)
    exact = refiner(g, d, precision="float64").refine(z.double())
    found = refiner(g, d, precision="bfloat16").refine(z)
    torch.testing.assert_close(found.logits.double(), exact.logits, atol=0.03, rtol=0.03)
    made = refiner(g, d, prior=fr.Normal(4))
    shaped = fr.shape_discriminator(made, real=reference(), iterations=3, batch_size=16, learning_rate=0.01)
    now = made.with_discriminator(shaped).refine(z)
    torch.testing.assert_close(now.images, refiner(g, shaped).refine(z).images, atol=1e-5, rtol=1e-5)


def test_refreshed_weights_give_the_statistics_new_values():
    g, d = networks(MinibatchDeviation(), channels=6)
    z, made = torch.randn(8, 4), refiner(networks(channels=4)[0], d)
    made.refine(z)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.mul_(1.5)
    made._networks.refresh(d)
    torch.testing.assert_close(made.refine(z).images, refiner(g, d).refine(z).images, atol=1e-5, rtol=1e-5)


def test_a_discriminator_that_mixes_nothing_is_left_alone():
    g, d = networks(channels=4)
    out = refiner(g, d).refine(torch.randn(8, 4))
    assert "coupling" not in out.report


@pytest.mark.parametrize(
    ("layers", "channels", "message"),
    [
        ((Attention(),), 4, "something else, first at an operation .*lockstep"),
        ((Rounded(), MinibatchDeviation()), 6, "custom backward formula"),
    ],
)
def test_what_cannot_be_held_is_refused_in_words(layers, channels, message):
    g, d = networks(*layers, channels=channels)
    with pytest.raises(fr.CouplingError, match=message):
        refiner(g, d).refine(torch.randn(8, 4))


def test_too_few_reference_images_are_refused():
    g, d = networks(MinibatchDeviation(), channels=6)
    with pytest.raises(fr.CouplingError, match="groups of 8 reference images, and there are 5"):
        refiner(g, d, real=reference(5), group_size=8).refine(torch.randn(8, 4))
