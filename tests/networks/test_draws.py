"""on_noise="freeze": what a network draws belongs to the sample. pack: D judges several samples as one. Fixed batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr
from fastrefine import noise
from fastrefine.networks.draws import SampleDraws
from tests.networks.test_freezing import STEP, Generator, Head, InlineDeviation

FIXED = fr.Collaborative(step_size=STEP, control="fixed")


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Everything(nn.Module):
    """Random operations of the common kinds, in place, by module, by function, with and without a sample axis."""

    def forward(self, x):
        n = len(x)
        x = F.dropout(x, 0.3, training=True)
        x = x * torch.empty(n, 1, 1, 1).uniform_(0.5, 1.5) + torch.rand(n, 1, 1, 1) + 0.1 * torch.randn(x.shape[1], 1, 1)
        x = x + torch.normal(0.0, 0.1, size=x.shape) + 0.1 * torch.zeros_like(x).normal_()
        x = F.dropout2d(x, 0.2, training=True)
        return x + F.gumbel_softmax(x, dim=1) * torch.randint(0, 2, (n, 1, 1, 1))


def networks(*layers):
    torch.manual_seed(0)
    return Generator(), nn.Sequential(*layers, Head(3))


@pytest.mark.parametrize(
    ("at", "in_generator", "in_discriminator"),
    [("input", (Everything,), (Noise,)), ("0", (Noise,), (Everything,)), ("output", (Everything,), ())],
)
def test_draws_belong_to_the_sample(at, in_generator, in_discriminator):
    g, d = networks(*(kind() for kind in in_discriminator))
    g.extend(kind() for kind in in_generator)
    made = fr.Refiner(g, d, FIXED, at=at, max_steps=2, on_noise="freeze", prior=fr.Normal(4), num_slots=4)
    state = torch.get_rng_state()
    out = made.sample(9, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert out.report["route"] == "flat" and out.report["repeatable"] == "bitwise"
    few = made if at == "input" else made.replaced(num_slots=2)
    torch.testing.assert_close(few.sample(2, first_id=4, seed=3).images, out.images[4:6], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made.sample(9, seed=4).images, out.images, atol=1e-2)


def test_a_step_uses_the_numbers_of_the_first_pass():
    """Against a plain loop in which each pass draws by the samples' keys."""
    g, d = networks(Noise())
    g.append(Noise())
    z = torch.randn(5, 4)
    out = fr.Refiner(g, d, FIXED, max_steps=3, on_noise="freeze").refine(z)
    key, a = noise.keys(0, torch.arange(5)), z
    drawn = (noise.normal(0, key[:, 0], key[:, 1], 192, stream, torch.float32) for stream in (0, 1 << 16))
    added = [numbers.view(5, 3, 8, 8) for numbers in drawn]

    def images(a):
        return g[1](g[0](a)) + 0.1 * added[0]

    for _ in range(3):
        a = a.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.softplus(-d[1](images(a) + 0.1 * added[1])).sum(), a)
        a = a - STEP * grad
    torch.testing.assert_close(out.images, images(a).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("draw", "mean", "variance"),
    [
        (lambda n: torch.randn(n), 0, 1),
        (lambda n: torch.rand(n), 0.5, 1 / 12),
        (lambda n: torch.normal(torch.full((n,), 2.0), 0.5), 2, 0.25),
        (lambda n: torch.empty(n).uniform_(-1, 3), 1, 4 / 3),
        (lambda n: torch.empty(n).exponential_(2.0), 0.5, 0.25),
        (lambda n: torch.empty(n).bernoulli_(0.3), 0.3, 0.21),
        (lambda n: torch.bernoulli(torch.full((n,), 0.3)), 0.3, 0.21),
        (lambda n: torch.randint(2, 6, (n,)).float(), 3.5, 1.25),
        (lambda n: F.dropout(torch.ones(n), 0.2, training=True), 1, 0.25),
    ],
)
def test_draws_have_the_law_of_their_operation(draw, mean, variance):
    """Mean and variance of 20,000 draws within 5 standard errors (false-alarm rate 1e-5, fixed keys)."""
    n = 20_000
    with SampleDraws(noise.keys(0, torch.arange(n)), 0):
        x = draw(n).double()
    spread = (x - x.mean()).square()
    assert abs(float(x.mean()) - mean) < 5 * (variance / n) ** 0.5
    assert abs(float(spread.mean()) - variance) < 5 * float(spread.std()) / n**0.5


def test_a_random_function_is_named_with_its_place():
    g, d = networks(Noise())
    with pytest.raises(fr.CouplingError, match=r"'0' \(Noise\).*randn_like at test_draws.py:\d+.*on_noise='freeze'"):
        fr.Refiner(g, d, FIXED, max_steps=2).refine(torch.randn(4, 4))


def test_noise_and_statistics_are_held_together():
    torch.manual_seed(0)
    g, d = Generator(), nn.Sequential(Noise(), InlineDeviation(), Head(4))
    real = torch.randn(32, 3, 8, 8)
    made = fr.Refiner(g, d, FIXED, max_steps=2, on_noise="freeze", coupling="freeze", real=real, prior=fr.Normal(4))
    out = made.sample(9)
    assert out.report["coupling"]["held"]
    torch.testing.assert_close(made.sample(2, first_id=4).images, out.images[4:6], atol=1e-5, rtol=1e-5)


def test_members_of_a_pack_share_its_logit_and_the_gradient_of_its_loss():
    torch.manual_seed(0)
    g, d = Generator(), Head(6)
    z = torch.randn(6, 4)
    made = fr.Refiner(g, d, FIXED, max_steps=2, pack=2, coupling="lockstep", group_size=2)
    out, a = made.refine(z), z
    for _ in range(2):
        a = a.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.softplus(-d(g(a).reshape(3, 6, 8, 8))).sum(), a)
        a = a - STEP * grad
    torch.testing.assert_close(out.images, g(a).detach(), atol=1e-5, rtol=1e-5)
    wanted = d(g(a).reshape(3, 6, 8, 8)).detach().repeat_interleave(2)
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.score(out.images[:4]), wanted[:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"coupling": "lockstep"}, {"coupling": "lockstep", "group_size": 3}])
def test_a_pack_wants_groups_of_whole_packs(options):
    with pytest.raises(fr.InputError, match="pack=2 needs coupling='lockstep' and a group_size that is a multiple"):
        fr.Refiner(Generator(), Head(6), FIXED, pack=2, **options)


class FixedBatch(nn.Module):
    """A batch of 16, whatever comes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.view(16, *x.shape[1:]))


def test_a_batch_size_that_the_networks_fix_is_the_number_of_slots():
    torch.manual_seed(0)
    g, d = Generator(), Head(3)
    real, z = torch.randn(40, 3, 8, 8), torch.randn(20, 4)
    given = {"max_steps": 2, "num_slots": 16, "real": real, "stop": fr.stopping.MedianOfReal()}
    wanted = fr.Refiner(g, d, FIXED, **given).refine(z)
    made = fr.Refiner(FixedBatch(g), FixedBatch(d), FIXED, **given)
    out = made.refine(z)
    torch.testing.assert_close(out.images, wanted.images, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made.score(real[:21]), d(real[:21])[:, 0].detach(), atol=1e-6, rtol=1e-6)
    with pytest.raises(fr.InputError, match=r"shape .*\(4, 4\)|batch of shape"):
        fr.Refiner(FixedBatch(g), d, FIXED, num_slots=8).refine(z)


def test_networks_that_need_two_samples_say_so():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Head(3)

        def forward(self, x):
            assert len(x) > 1
            return self.inner(x)

    made = fr.Refiner(Generator(), Several(), FIXED, max_steps=2, prior=fr.Normal(4))
    with pytest.raises(fr.InputError, match="pass num_slots=2 or more"):
        made.sample(1)
    assert len(made.replaced(num_slots=2).sample(1)) == 1
