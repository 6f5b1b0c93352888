"""FAULTS 32: how networks are called: functions of the caller's, conditions, heads, labels, groups."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.errors import InputError

torch.set_num_threads(1)
FIXED = fr.Collaborative(0.1, control="fixed")
STEPS = 3


def loop(image, logits, a, *, heads=lambda out: [out]):
    """(image, logit) after STEPS plain steps; the loss is the mean over heads of the mean of a head's entries."""
    for step in range(STEPS + 1):
        a = a.detach().requires_grad_()
        x = image(a)
        found = heads(logits(x))
        if step == STEPS:
            return x.detach(), torch.stack([h.reshape(len(a), -1).mean(1) for h in found]).mean(0).detach()
        loss = torch.stack([nn.functional.softplus(-h).reshape(len(a), -1).mean(1) for h in found]).mean(0).sum()
        a = a - 0.1 * torch.autograd.grad(loss, a)[0]


def close(out, wanted):
    torch.testing.assert_close(out.images, wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(out.logits, wanted[1], rtol=0, atol=1e-4)


def decoder():
    return nn.Sequential(nn.Linear(4, 192), nn.Unflatten(1, (3, 8, 8)))


def judge(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1))


class Named(NamedTuple):
    image: torch.Tensor
    latents: torch.Tensor


@dataclasses.dataclass
class Output:
    sample: torch.Tensor


class Wrapped(nn.Module):
    """A generator that returns more than its image."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = decoder(), kind

    def forward(self, z):
        x = self.body(z)
        return {"tuple": (x, z), "list": [x, z], "dict": {"image": x}, "named": Named(x, z), "dataclass": Output(x)}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "named", "dataclass"])
def test_the_first_tensor_of_what_a_generator_returns_is_the_image(kind):
    torch.manual_seed(0)
    g, d, z = Wrapped(kind), judge(), torch.randn(6, 4)
    with pytest.warns(fr.FastrefineWarning, match=r"its first tensor, of shape \(4, 3, 8, 8\)"):
        out = fr.Refiner(g, d, FIXED, max_steps=STEPS, num_slots=4).refine(z)
    close(out, loop(g.body, d, z))


class Conditional(nn.Module):
    """Embedded classes for the generator: they come as vectors."""

    def __init__(self):
        super().__init__()
        self.shared, self.body = nn.Embedding(3, 2), nn.Linear(6, 192)

    def forward(self, z, y):
        return self.body(torch.cat([z, y], 1)).view(-1, 3, 8, 8)


def beside(x, vectors):
    return torch.cat([x, vectors[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)


def test_functions_say_how_networks_are_called_and_labels_are_converted_where_they_differ():
    torch.manual_seed(0)
    g, d, z, y = Conditional(), judge(6), torch.randn(7, 4), torch.arange(7) % 3
    one_hot = nn.functional.one_hot(y, 3).float()
    out = fr.Refiner(
        g, d, FIXED, max_steps=STEPS, num_slots=4,
        generate=lambda G, z, labels: G(z, G.shared(labels)),
        discriminate=lambda D, x, labels: D(
            torch.cat([x, nn.functional.one_hot(labels, 3)[:, :, None, None].expand(-1, -1, 8, 8).to(x.dtype)], 1)
        ),
    ).refine(z, labels=y)  # fmt: skip
    wanted = loop(
        lambda a: g(a, g.shared(y)), lambda x: d(torch.cat([x, one_hot[:, :, None, None].expand(-1, -1, 8, 8)], 1)), z
    )
    close(out, wanted)


@pytest.mark.parametrize("at", ["input", "0", "output"])
@pytest.mark.parametrize("num_slots", [2, 4, None])
def test_conditions_travel_with_their_sample(at, num_slots):
    """Samples leave after different numbers of steps, so that slots are refilled out of order."""
    torch.manual_seed(0)
    g, d, z, edges = decoder(), judge(4), torch.randn(9, 4), torch.randn(9, 1, 8, 8)
    with torch.no_grad():
        d[3].weight.mul_(3)
    one = fr.Refiner(
        g, d, FIXED, at=at, max_steps=STEPS, num_slots=num_slots, prior=fr.Normal(4), stop=fr.stopping.UniformStep(),
        discriminate=lambda D, x, edges: D(torch.cat([edges, x], 1)),
    )  # fmt: skip
    out, single = one.refine(z, conditions={"edges": edges}), one.replaced(num_slots=1)
    for i in range(9):
        alone = single.refine(z[i : i + 1], conditions={"edges": edges[i : i + 1]}, first_id=i)
        torch.testing.assert_close(out.images[i], alone.images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(one.score(out.images, conditions={"edges": edges}), out.logits, rtol=0, atol=1e-4)
    assert len(one.sample(9, conditions={"edges": edges})) == 9


def test_heads_are_averaged_head_by_head():
    torch.manual_seed(0)
    g, z = decoder(), torch.randn(6, 4)
    both = nn.ModuleList([judge(), nn.Conv2d(3, 1, 3, 2, 1)])

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = both

        def forward(self, x):
            return [member(x) for member in self.members]

    d = Heads()
    out = fr.Refiner(g, d, FIXED, max_steps=STEPS, num_slots=4).refine(z)
    close(out, loop(g, d, z, heads=lambda found: found))


class Grouped(nn.Module):
    """Minibatch standard deviation over groups of 4."""

    def forward(self, x):
        y = x.view(4, -1, *x.shape[1:])
        return torch.cat([x, y.std(0, unbiased=False).mean().expand(len(x), 1, *x.shape[2:])], 1)


@pytest.mark.parametrize("num_slots", [4, 8, None])
def test_groups_of_a_minibatch_statistic_stay_together_whatever_the_slots(num_slots):
    torch.manual_seed(0)
    g, d, z = decoder(), nn.Sequential(Grouped(), judge(4)), torch.randn(12, 4)
    parts = [loop(g, d, part) for part in z.split(4)]
    one = fr.Refiner(g, d, FIXED, max_steps=STEPS, coupling="lockstep", group_size=4, num_slots=num_slots)
    close(one.refine(z), tuple(torch.cat(column) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize(("n", "slots"), [(1, 1), (8, 8), (9, 16), (300, 256)])
def test_few_samples_take_few_slots(n, slots):
    one = fr.Refiner(decoder(), judge(), FIXED, max_steps=0, prior=fr.Normal(4))
    assert one.sample(n).report["num_slots"] == slots


class Width(nn.Module):
    """Made for labels of width 0: the required argument is None."""

    c_dim = 0

    def __init__(self):
        super().__init__()
        self.body = decoder()

    def forward(self, z, c):
        assert c is None
        return self.body(z)


def test_a_network_for_labels_of_width_0_gets_none():
    out = fr.Refiner(Width(), judge(), FIXED, max_steps=1, num_slots=4).refine(torch.randn(3, 4))
    assert out.images.shape == (3, 3, 8, 8)


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), Failing())

    def forward(self, x):
        return self.inner(x).flatten(1).mean(1)


class Failing(nn.Module):
    def forward(self, x):
        if x.shape[1] != 7:
            raise AssertionError
        return x


@pytest.mark.parametrize(("d", "options", "message"), [
    (Silent(), {}, r"AssertionError: no message, in module 'inner.1' \(Failing\) on shapes \(4, 3, 8, 8\)"),
    (nn.Conv2d(3, 3, 3, 1, 1), {}, r"as an autoencoder does; write its energy, e.g. discriminate=lambda D, x: -"),
    (nn.Sequential(judge(), nn.Linear(1, 5)), {}, r"shape \(4, 5\).*discriminate=lambda D, x: D\(x\).mean\(1\)"),
    (judge(), {"discriminate": 3}, "discriminate is 3; wanted a callable"),
    (judge(), {"group_size": 4}, "group_size=4 is for coupling='lockstep'"),
    (judge(), {"group_size": 3, "coupling": "lockstep"}, "num_slots is 4; wanted a multiple of group_size=3"),
])  # fmt: skip
def test_what_does_not_fit_is_told_with_the_line_that_mends_it(d, options, message):
    with pytest.raises(InputError, match=message):
        fr.Refiner(decoder(), d, FIXED, max_steps=1, num_slots=4, **options).refine(torch.randn(4, 4))


@pytest.mark.parametrize(("conditions", "message"), [
    ({"edges": torch.randn(3, 1)}, r"conditions\['edges'\] has shape \(3, 1\); wanted one row for each of 4 samples"),
    ({"labels": torch.randn(4, 1)}, "'labels' is no name"),
    ([torch.randn(4, 1)], "conditions is a list; wanted a dict"),
])  # fmt: skip
def test_conditions_that_do_not_fit_are_refused(conditions, message):
    one = fr.Refiner(decoder(), judge(), FIXED, max_steps=1, num_slots=4, discriminate=lambda D, x, **inputs: D(x))
    with pytest.raises(InputError, match=message):
        one.refine(torch.randn(4, 4), conditions=conditions)
    with pytest.raises(InputError, match="neither generate= nor discriminate= says"):
        one.replaced(discriminate=None).refine(torch.randn(4, 4), conditions={"edges": torch.randn(4, 1)})


CALLS = {
    "turned round": (judge(), lambda D, x: -D(x)),
    "an energy": (nn.Conv2d(3, 3, 3, 1, 1), lambda D, x: -(D(x) - x).abs().flatten(1).mean(1)),
    "flat patches": (nn.Sequential(judge(), nn.Linear(1, 5)), lambda D, x: D(x).mean(1)),
    "heads": (nn.ModuleList([judge(), nn.Conv2d(3, 1, 3, 2, 1)]), lambda D, x: [member(x) for member in D]),
}


@pytest.mark.parametrize("name", CALLS)
def test_shaping_calls_the_discriminator_as_the_refiner_does(name):
    torch.manual_seed(0)
    d, call = CALLS[name]
    real = torch.randn(32, 3, 8, 8) * 0.3
    one = fr.Refiner(decoder(), d, FIXED, max_steps=1, num_slots=8, prior=fr.Normal(4), discriminate=call)
    seen = []
    shaped = fr.shape_discriminator(one, real, 30, 16, 0.01, callback=seen.append)
    after = one.with_discriminator(shaped)
    gained = [r.score(real).mean() - r.sample(32).logits.mean() for r in (one, after)]
    assert gained[1] > gained[0], "real images lie higher above generated ones than before"


def conditional(**options):
    torch.manual_seed(0)
    given = {"max_steps": 2, "num_slots": 4, "prior": fr.Normal(4), "discriminate": lambda D, x, edges: D(x + edges)}
    return fr.Refiner(decoder(), judge(), FIXED, **given | options)


def test_real_images_come_with_their_conditions():
    real, edges = torch.randn(9, 3, 8, 8), torch.randn(9, 1, 8, 8)
    given = {"real": real, "stop": fr.stopping.MedianOfReal()}
    with pytest.raises(InputError, match=r"pass real_conditions=\{'edges': ...\}"):
        conditional(**given).sample(4, conditions={"edges": edges[:4]})
    one = conditional(**given, real_conditions={"edges": edges})
    out = one.sample(4, conditions={"edges": edges[:4]})
    torch.testing.assert_close(out.real_logits, one.score(real, conditions={"edges": edges}).double())
    assert torch.equal(out.conditions["edges"], edges[:4]) and torch.equal(out.select([2]).conditions["edges"], edges[2:3])


def test_shaping_gives_proposals_the_conditions_of_the_real_batch():
    """The real images follow from their condition, so a discriminator that reads it tells them from others."""
    torch.manual_seed(0)
    edges = torch.randn(64, 1, 8, 8)
    real, seen = edges.expand(-1, 3, -1, -1).contiguous(), []
    shaped = fr.shape_discriminator(conditional(), real, 40, 32, 0.01, real_conditions={"edges": edges}, callback=seen.append)
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    items = [(x, {"edges": e}) for x, e in zip(real, edges, strict=True)]
    same = fr.shape_discriminator(conditional(), items, 40, 32, 0.01)
    for a, b in zip(shaped.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_dataset_gives_each_sample_its_condition():
    edges = torch.randn(5, 1, 8, 8)
    for item in conditional().dataset(5, conditions={"edges": edges}, chunk=2):
        assert torch.equal(item["edges"], edges[item["id"]])


@pytest.mark.parametrize("by", ["labels", "edges"])
def test_a_discriminator_that_mixes_samples_by_a_further_input_is_found(by):
    """A relativistic one: the logit is taken against the mean over the batch of what it says to the other input."""

    def against_the_mean(D, x, labels=None, edges=None):
        other = labels[:, None].float() if by == "labels" else D(x.new_zeros(x.shape) + edges)
        return D(x) - other.mean()

    one = conditional(discriminate=against_the_mean)
    given = {"labels": torch.arange(8)} if by == "labels" else {"conditions": {"edges": torch.randn(8, 1, 8, 8)}}
    with pytest.raises(fr.CouplingError, match="mixes the samples of a batch"):
        one.sample(8, **given)


def test_fitting_calls_networks_as_it_is_told():
    """Real images follow from their condition, generated ones do not: D learns to tell them apart by it."""
    torch.manual_seed(0)
    edges = torch.randn(200, 1, 8, 8)
    real = edges.expand(-1, 3, -1, -1) * 0.5
    call = lambda D, x, edges: D(torch.cat([edges, x], 1))  # noqa: E731
    made = fr.fit_discriminator(
        decoder(), real, 60, prior=fr.Normal(4), discriminator=judge(4), real_conditions={"edges": edges}, discriminate=call,
        generate=lambda G, z, edges: G(z), batch_size=32, check_every=20, learning_rate=3e-3,
    )  # fmt: skip
    assert call(made, real, edges).mean() > call(made, decoder()(torch.randn(200, 4)), edges).mean() + 0.5
