"""What is prepared, kept and shared: runs beside each other, other options, modules of closures, scores with conditions."""

import numpy as np
import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.networks import target

torch.set_num_threads(1)
FIXED = fr.Collaborative(0.05, control="fixed")


def networks():
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    return g, nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def doubled():
    """Another discriminator than that of ``networks``."""
    d = networks()[1]
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.mul_(2)
    return d


def refiner(g=None, d=None, **options):
    own = networks()
    return fr.Refiner(g or own[0], d or own[1], FIXED, **{"max_steps": 4, "prior": fr.Normal(4)} | options)


class Centred(nn.Module):
    """Takes the mean over the batch off its input."""

    def __init__(self, after=None, before=None):
        super().__init__()
        self.after, self.before = after or nn.Identity(), before or nn.Identity()

    def forward(self, x):
        x = self.before(x)
        return self.after(x - 0.5 * x.mean(0, keepdim=True))


@pytest.mark.parametrize("coupling", ["refuse", "lockstep"])
def test_a_stream_is_not_disturbed_by_calls_of_other_numbers_of_samples(coupling):
    d = Centred(after=networks()[1]) if coupling == "lockstep" else None
    make = lambda: refiner(d=d, at="1", coupling=coupling)  # noqa: E731
    wanted = torch.cat([part.images for part in make().stream(600, chunk=10)])
    one = make()
    stream = one.stream(600, chunk=10)
    first = next(stream)
    one.sample(8), one.sample(0)
    assert torch.equal(torch.cat([first.images, *(part.images for part in stream)]), wanted)


def test_a_result_keeps_the_report_of_its_run():
    one = refiner(at="1")
    out = one.sample(4)
    before = len(out.report["ladder"])
    one.sample(40)
    assert len(out.report["ladder"]) == before


def test_latents_of_a_split_are_what_its_prefix_was_given():
    g, _ = networks()
    out = refiner(fr.Split(lambda z: (g[:2](z), ()), lambda a: g[2:](a))).sample(6)
    assert out.latents.shape == (6, 4) and out.activations.shape == (6, 8)


class Masked(nn.Module):
    """A constant mask as an index: what tensors without content cannot follow."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([1, 0, 1, 1, 0, 1]).bool())
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        return self.last(x[:, self.mask])


class Keeping(nn.Module):
    """Keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x):
        self.features = self.first(x)
        return self.last(self.features.tanh())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Masked, Keeping])
def test_discriminators_that_a_rung_does_not_suit_run(kind, precision):
    torch.manual_seed(0)
    d = kind()
    out = refiner(d=d, at="1", precision=precision).sample(6)
    with torch.no_grad():
        torch.testing.assert_close(d(out.images)[:, 0], out.logits, rtol=0, atol=1e-4 if precision == "float32" else 0.05)


def test_another_sampler_shares_the_prepared_generator():
    one = refiner(at="1")
    one.sample(4)
    other = one.replaced(sampler=fr.Collaborative(0.1))
    assert other._networks.prepared_generator is one._networks.prepared_generator is not None


def test_another_step_size_shares_the_recorded_step_and_another_loss_does_not():
    one = refiner(at="1", stop=0.5)
    one.sample(6)
    target = one._networks.target
    shared = [one.replaced(sampler=fr.Collaborative(0.3)), one.replaced(sampler=fr.Collaborative(0.2), stop=None, max_steps=2)]
    others = [
        one.replaced(sampler=fr.Collaborative(0.3, loss="minimax")), one.replaced(at="2"),
        one.with_discriminator(networks()[1]), one.replaced(sampler=fr.Collaborative(0.3), real=torch.randn(8, 6)),
    ]  # fmt: skip
    for other in (*shared, *others):
        found = other.sample(6)
        assert (other._networks.target is target) == (other in shared)
        wanted = fr.Refiner(other.generator, other.discriminator, **{
            name: getattr(other.options, name) for name in ("sampler", "at", "stop", "max_steps", "prior", "num_slots", "real")
        }).sample(6)  # fmt: skip
        assert torch.equal(found.images, wanted.images) and torch.equal(found.steps, wanted.steps)


def test_another_temperature_does_not_share_the_recorded_step():
    one = fr.Refiner(*networks(), fr.MALA(0.1), at="input", max_steps=4, prior=fr.Normal(4))
    one.sample(6)
    for sampler, shares in ((fr.MALA(0.2), True), (fr.MALA(0.2, logit_scale=3.0), False)):
        other = one.replaced(sampler=sampler)
        wanted = fr.Refiner(*networks(), sampler, at="input", max_steps=4, prior=fr.Normal(4)).sample(6)
        assert torch.equal(other.sample(6).images, wanted.images)
        assert (other._networks.target is one._networks.target) == shares


def test_what_was_lent_is_lent_on():
    one = refiner(at="1")
    one.sample(6)
    other = one.replaced(sampler=fr.Collaborative(0.3)).replaced(sampler=fr.Collaborative(0.2))
    other.sample(6)
    assert other._networks.target is one._networks.target


@pytest.mark.parametrize("value", [np.array([1.0, 3.0]), [torch.tensor([2.0])]])
def test_arguments_of_any_kind_may_be_replaced(value):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = networks()[1]

        def forward(self, x, w):
            return self.last(x) * float(w[0])

    one = refiner(d=Weighted(), at="1", discriminator_kwargs={"w": np.array([1.0, 2.0])})
    found = one.sample(6), one.replaced(discriminator_kwargs={"w": value}).sample(6)
    torch.testing.assert_close(found[1].initial_logits, float(value[0]) * found[0].initial_logits)


def test_new_weights_reach_one_of_two_refiners_that_share_a_step():
    one = refiner(at="1")
    before = one.sample(6)
    other = one.replaced(sampler=fr.Collaborative(0.3))
    assert not torch.equal(other.sample(6).images, before.images)
    new = doubled()
    other._networks.refresh(new)
    assert torch.equal(one.sample(6).images, before.images)
    wanted = one.with_discriminator(new).replaced(sampler=fr.Collaborative(0.3)).sample(6)
    torch.testing.assert_close(other.sample(6).images, wanted.images)


def test_a_refiner_that_shares_a_step_and_never_ran_takes_new_weights():
    one = refiner(at="1")
    before = one.sample(6)
    other = one.replaced(sampler=fr.Collaborative(0.3))
    new = doubled()
    other._networks.refresh(new)
    wanted = one.with_discriminator(new).replaced(sampler=fr.Collaborative(0.3)).sample(6)
    torch.testing.assert_close(other.sample(6).images, wanted.images)
    assert not torch.allclose(wanted.images, one.replaced(sampler=fr.Collaborative(0.3)).sample(6).images, atol=1e-4)
    assert torch.equal(one.sample(6).images, before.images)


def test_a_step_size_that_is_found_is_that_of_a_refiners_own_latents():
    own, found = networks(), []
    z = torch.randn(6, 4)
    one = fr.Refiner(*own, FIXED, at="1", max_steps=4)
    one.refine(5 * z)
    for refine in (one.replaced(sampler=fr.Collaborative()), fr.Refiner(*own, fr.Collaborative(), at="1", max_steps=4)):
        found.append(refine.refine(z + 1).images)
    assert torch.equal(*found)


def test_a_step_is_shared_where_there_are_real_images():
    one = refiner(at="1", real=torch.randn(16, 6), stop="median")
    one.sample(6)
    other = one.replaced(sampler=fr.Collaborative(0.3))
    found = other.sample(6)
    assert other._networks.target is one._networks.target
    own = fr.Refiner(one.generator, one.discriminator, fr.Collaborative(0.3), at="1", max_steps=4, prior=fr.Normal(4),
                     real=one.options.real, stop="median")  # fmt: skip
    assert torch.equal(found.images, own.sample(6).images)


def test_weights_that_change_in_place_are_noticed_where_a_step_is_shared():
    g, d = networks()
    one = refiner(g, d, at="1")
    one.sample(6)
    other = one.replaced(sampler=fr.Collaborative(0.3))
    before = other.sample(6)
    with torch.no_grad():
        next(d.parameters()).mul_(-2)
    assert not torch.equal(other.sample(6).images, before.images)


def test_a_coupled_generator_is_rendered_in_the_groups_that_it_was_judged_in():
    g = Centred(before=networks()[0])
    one = refiner(g, coupling="lockstep", group_size=2, num_slots=4)
    out = one.sample(8)
    torch.testing.assert_close(one.score(out.images), out.logits, rtol=0, atol=1e-5)
    wanted = torch.cat([g(z) for z in out.latents.split(2)]).detach()
    torch.testing.assert_close(out.images, wanted, rtol=0, atol=1e-5)


def test_modules_that_a_function_reads_are_not_changed():
    extra = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = extra[1].running_mean.clone()
    refiner(generate=lambda G, z: G(z + extra(z))).sample(4)
    assert torch.equal(before, extra[1].running_mean) and extra.training


def test_scores_read_the_conditions_that_they_are_given():
    one = refiner(discriminate=lambda D, x, y=None: D(x) + (0 if y is None else y[:, None]))
    out = one.sample(4)
    with_condition = one.score(out.images, conditions={"y": torch.full((4,), 100.0)})
    torch.testing.assert_close(with_condition, one.score(out.images) + 100, rtol=0, atol=1e-4)


class Normed(nn.Module):
    """A BatchNorm after a convolution, in the four ways below."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.conv, self.norm = way, nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.running_mean), nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, z):
        x = self.first(z.view(-1, 1, 4, 4))
        if len(x) > 100_000:  # no symbolic trace gets past this
            raise RuntimeError("too many")
        x = self.conv(x)
        if self.way == "called twice":
            return self.norm(self.conv(x.tanh())).tanh()
        out = self.norm(x).relu_()
        return out + x if self.way == "read twice" else out


@pytest.mark.parametrize(("way", "at", "count"), [
    ("plain", "input", 1), ("plain", "first", 1), ("plain", "conv", 0), ("plain", "norm", 0), ("read twice", "input", 0),
    ("called twice", "input", 0),
])  # fmt: skip
def test_a_batch_norm_goes_into_the_layer_whose_output_it_alone_reads(way, at, count):
    torch.manual_seed(0)
    g, d = Normed(way).eval(), nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    z = torch.randn(6, 16)
    out = fr.Refiner(g, d, FIXED, at=at, max_steps=2, keep="last").refine(z)
    assert out.report["folded"] == count
    exact = fr.Refiner(g, d, FIXED, at=at, max_steps=2, precision="float64").refine(z)
    torch.testing.assert_close(out.images.double(), exact.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "off", "agrees"), [(1, 0.02, True), (4, 0.01, False), (1, 0.1, False), (0, 0.0, True)])
def test_one_gradient_may_turn_at_a_kink_but_no_recording_may_be_wrong_by_a_percent(rows, off, agrees):
    """In float32 rounding turns some ReLU in any two right forms of a network."""
    torch.manual_seed(0)
    logits, gradients = torch.randn(4), torch.randn(4, 9).sign()
    found = gradients.clone()
    found[:rows] *= 1 + off
    assert (target._error((logits, found), (logits, gradients), 1e-3) <= 1e-3) == agrees
    assert target._error((logits * 1.01, found), (logits, gradients), 1e-3) > 1e-3
