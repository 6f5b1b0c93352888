"""Sums of logits, and correctors that make a GAN's discriminator serve another generator."""

import copy
import math

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.networks import recording
from fastrefine.networks.calls import takes_labels


def networks(seed=0):
    torch.manual_seed(seed)
    g = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    d = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    return g, d


class Twice(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x):
        return 2 * self.d(x)


class Returns(nn.Module):
    """Logits of one shape: the mean of a sample's image, plus ``spread`` over a map that has mean zero."""

    def __init__(self, shape, dtype=torch.float32):
        super().__init__()
        self.shape, self.dtype = shape, dtype

    def forward(self, x):
        out = x.flatten(1).mean(1).view(-1, *[1] * len(self.shape)).expand(-1, *self.shape)
        ramp = torch.linspace(-1, 1, max(math.prod(self.shape), 1)).view(self.shape) if self.shape else 0.0
        return (out + (ramp if math.prod(self.shape) > 1 else 0.0)).to(self.dtype)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(3, 1)

    def forward(self, x, labels):
        return x.flatten(1).sum(1, keepdim=True) + self.bias(labels)


class MaybeLabelled(Labelled):
    def forward(self, x, labels=None):
        return super().forward(x, torch.zeros(len(x), dtype=torch.long) if labels is None else labels)


OPTIONS = dict(sampler=fr.DGflow(step_size=0.01), prior=fr.Normal(4), max_steps=9, num_slots=8)


@pytest.mark.parametrize("at", ["input", "output"])
def test_the_sum_of_a_discriminator_with_itself_refines_as_its_double_on_the_flat_route(at):
    g, d = networks()
    out = fr.Refiner(g, fr.SumDiscriminator(d, d), at=at, **OPTIONS).sample(20)
    double = fr.Refiner(g, Twice(d), at=at, **OPTIONS).sample(20)
    single = fr.Refiner(g, d, at=at, **OPTIONS).sample(20)
    assert out.report["route"] == "flat"
    torch.testing.assert_close(out.images, double.images)
    torch.testing.assert_close(out.logits, double.logits)
    assert not torch.allclose(out.images, single.images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maps_columns_and_vectors_add_up_to_one_logit_per_sample(dtype):
    x = torch.randn(5, 1, 4, 4, dtype=dtype)
    total = fr.SumDiscriminator(*(Returns(shape, dtype) for shape in ((), (1,), (1, 3, 3))))(x)
    assert total.shape == (5, 1) and total.dtype == torch.promote_types(dtype, torch.float32)
    parts = [Returns(shape, dtype)(x).to(total.dtype).flatten(1).mean(1) for shape in ((1,), (1,), (1, 3, 3))]
    torch.testing.assert_close(total[:, 0], sum(parts))


def test_a_member_that_works_in_place_leaves_the_others_their_images():
    x = torch.randn(6, 2)
    rectify = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(2, 1))
    plain = Returns((1,))
    expected = rectify(x.clone()) + plain(x)
    given = x.clone()
    torch.testing.assert_close(fr.SumDiscriminator(rectify, plain)(given), expected)
    assert torch.equal(given, x)


@pytest.mark.parametrize(
    ("members", "signature"),
    [
        ((Returns((1,)),), (False, False)),
        ((Returns((1,)), Labelled()), (True, True)),
        ((MaybeLabelled(), Returns((1,))), (True, False)),
        ((MaybeLabelled(), Labelled()), (True, True)),
        ((fr.SumDiscriminator(Labelled()), Returns(())), (True, True)),
    ],
)
def test_labels_are_offered_only_where_a_member_takes_them_and_required_where_one_requires_them(members, signature):
    total = fr.SumDiscriminator(*members)
    assert takes_labels(total, {}) == takes_labels(copy.deepcopy(total), {}) == signature
    assert isinstance(total, fr.SumDiscriminator)


def test_labels_reach_the_members_that_take_them():
    x, y = torch.randn(7, 2), torch.arange(7) % 3
    labelled, maybe, plain = Labelled(), MaybeLabelled(), Returns(())
    total = fr.SumDiscriminator(labelled, plain, maybe)
    torch.testing.assert_close(total(x, y), labelled(x, y) + plain(x)[:, None] + maybe(x, y))
    torch.testing.assert_close(fr.SumDiscriminator(plain, maybe)(x), plain(x)[:, None] + maybe(x))


def test_a_refiner_hands_labels_to_a_sum_that_takes_them_and_refuses_them_otherwise():
    g, d = networks()
    labelled = fr.Refiner(g, fr.SumDiscriminator(d, Labelled()), **OPTIONS)
    out = labelled.sample(9, labels=torch.arange(9) % 3)
    x, y = out.images, torch.arange(9) % 3
    torch.testing.assert_close(out.logits, (d.eval()(x) + labelled.discriminator.members[1](x, y))[:, 0].detach())
    with pytest.raises(fr.InputError, match="needs labels"):
        labelled.sample(9)
    with pytest.raises(fr.InputError, match="neither the generator nor the discriminator takes them"):
        fr.Refiner(g, fr.SumDiscriminator(d, d), **OPTIONS).sample(9, labels=torch.arange(9) % 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((), "no discriminators"),
        ((nn.Linear(2, 1), 3), "member 1 is a int"),
        ((nn.Linear(2, 1), torch.sigmoid), "member 1 is a builtin"),
        ((nn.Sequential(nn.Linear(2, 1), nn.Sequential(nn.Sigmoid())),), "member 0 ends in a sigmoid"),
    ],
)
def test_members_that_cannot_be_summed_are_refused(members, message):
    with pytest.raises(fr.InputError, match=message):
        fr.SumDiscriminator(*members)


def test_a_member_that_returns_several_values_per_sample_is_named():
    with pytest.raises(fr.InputError, match=r"member 1 must return its logit alone.*shape \(4, 2\)"):
        fr.SumDiscriminator(nn.Linear(2, 1), nn.Linear(2, 2))(torch.randn(4, 2))


class Shifted(nn.Module):
    """N(mean, diag(deviation^2)) of z ~ N(0, I) in two dimensions."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(deviation))

    def forward(self, z):
        return self.mean + self.deviation * z

    def log_prob(self, x):
        return torch.distributions.Normal(self.mean, self.deviation).log_prob(x).sum(1).detach()


class Quadratic(nn.Module):
    """The family that holds every log ratio of two such Gaussians."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(torch.cat([x, x.square()], 1))


DATA, GAN, OTHER = (
    Shifted([0.5, -0.5], [0.8, 1.0]),
    Shifted([0.0, 0.0], [1.0, 1.0]),
    Shifted([-0.6, 0.4], [1.1, 0.8]),
)
FITTING = dict(batch_size=512, learning_rate=0.02, discriminator=Quadratic(), patience=50, seed=3)


def points():
    return OTHER(torch.randn(2000, 2, generator=torch.Generator().manual_seed(8))).detach()


def rms(x):
    return float(x.detach().square().mean().sqrt())


@pytest.fixture(scope="module")
def corrector():
    return fr.fit_corrector(OTHER, GAN, 250, prior=fr.Normal(2), reference_samples=20_000, **FITTING)


def test_the_corrector_is_the_log_ratio_of_two_gaussians(corrector):
    x = points()
    wanted = GAN.log_prob(x) - OTHER.log_prob(x)
    assert rms(wanted) > 0.7
    assert rms(corrector(x)[:, 0] - wanted) < 0.15
    assert rms(corrector(x)[:, 0] + wanted) > 1.0, "reference and generator exchanged"


def test_discriminator_and_corrector_add_up_to_the_ratio_of_data_and_generator(corrector):
    real = DATA(torch.randn(20_000, 2, generator=torch.Generator().manual_seed(4))).detach()
    d = fr.fit_discriminator(GAN, real, 250, prior=fr.Normal(2), **FITTING)
    x = points()
    wanted = DATA.log_prob(x) - OTHER.log_prob(x)
    error = rms(fr.SumDiscriminator(d, corrector)(x)[:, 0] - wanted)
    assert error < 0.25
    assert rms(d(x)[:, 0] - wanted) > 4 * error, "the discriminator alone belongs to another generator"


def test_the_reference_is_a_generator_with_a_prior_of_its_own_or_samples_of_it():
    wide = Shifted([2.0, 2.0], [1.0, 1.0])
    options = dict(prior=fr.Normal(2), check_every=2, seed=5)
    drawn = fr.Refiner(wide, nn.Linear(2, 1), fr.Collaborative(1.0), max_steps=0, prior=fr.Uniform(2)).sample(
        64, first_id=2**31 + 2**30, seed=5
    )
    by_generator = fr.fit_corrector(OTHER, wide, 4, reference_prior=fr.Uniform(2), reference_samples=64, **options)
    for samples in (drawn.images, drawn.images.numpy()):
        by_samples = fr.fit_corrector(OTHER, samples, 4, **options)
        assert equal(by_generator, by_samples)
    assert not equal(by_generator, fr.fit_corrector(OTHER, wide, 4, reference_samples=64, **options))


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)

    def forward(self, z, labels):
        return z + self.embedding(labels)


def test_labels_of_the_reference_reach_conditional_networks():
    torch.manual_seed(0)
    labels = torch.arange(48) % 3
    options = dict(prior=fr.Normal(2), reference_samples=48, check_every=2)
    fitted = fr.fit_corrector(Conditional(), Conditional(), 2, real_labels=labels, discriminator=Labelled(), **options)
    assert takes_labels(fitted, {}) == (True, True)
    assert isinstance(fr.fit_corrector(OTHER, Conditional(), 2, real_labels=1, **options), nn.Module)
    for pair in ((Conditional(), GAN), (GAN, Conditional())):
        with pytest.raises(fr.InputError, match=r"Conditional needs labels: pass real_labels"):
            fr.fit_corrector(*pair, 2, **options)


def test_neither_the_networks_nor_torchs_random_state_change():
    before, state = copy.deepcopy((OTHER.state_dict(), GAN.state_dict())), torch.random.get_rng_state()
    fr.fit_corrector(OTHER, GAN, 2, prior=fr.Normal(2), reference_samples=40)
    assert torch.equal(state, torch.random.get_rng_state())
    for saved, now in zip(before, (OTHER.state_dict(), GAN.state_dict()), strict=True):
        assert all(torch.equal(saved[k], now[k]) for k in saved)


def test_fitting_traces_once_and_not_for_every_batch(monkeypatch):
    traces, original = [], recording.trace

    def trace(step, given, modules):
        traces.append(len(given[0]))
        return original(step, given, modules)

    monkeypatch.setattr(recording, "trace", trace)
    fr.fit_corrector(OTHER, torch.randn(100, 2), 5, prior=fr.Normal(2), batch_size=16)
    assert traces.count(16) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(generator=3), "generator is a int"),
        (dict(prior=None), "prior is None"),
        (dict(reference_prior=3), "reference_prior is 3"),
        (dict(reference_samples=1), "reference_samples"),
        (dict(iterations=0), "iterations"),
        (dict(seed=-1), "seed"),
        (dict(discriminator_output="probability"), "corrector is a logit"),
        (dict(reference="gan"), "reference must be a tensor"),
        (dict(reference=torch.zeros(1, 2)), "1 samples"),
        (dict(reference=torch.zeros(9, 2), reference_prior=fr.Normal(2)), "with samples of the reference"),
        (dict(reference=torch.zeros(9, 3)), r"shape \(2,\), the reference \(3,\)"),
        (dict(reference=nn.Linear(2, 5)), r"shape \(2,\), the reference \(5,\)"),
        (dict(learning_rate=-1.0), "learning_rate"),
    ],
)
def test_bad_arguments_are_named(options, message):
    given = dict(generator=OTHER, reference=GAN, iterations=2, prior=fr.Normal(2), reference_samples=40)
    with pytest.raises(fr.InputError, match=message):
        fr.fit_corrector(**{**given, **options})
