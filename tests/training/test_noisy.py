"""The extended latent space: noise of its own at a generator's output."""

import copy

import pytest
import torch
from torch import nn

import fastrefine as fr


def networks():
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6), nn.Unflatten(1, (2, 3)))
    return g, nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def test_the_image_is_the_generators_plus_scaled_noise():
    g, d = networks()
    prior = fr.Product(fr.Normal(4), fr.Normal(2, 3))
    refiner = fr.Refiner(fr.NoisyOutput(g, 0.1), d, sampler=fr.DDLS(0.01), max_steps=3, prior=prior, num_slots=8)
    out = refiner.sample(20)
    z = out.latents
    assert z.shape == (20, 10) and out.report["route"] == "flat"
    wanted = g(z[:, :4]).detach() + 0.1 * z[:, 4:].view(-1, 2, 3)
    assert torch.allclose(out.images, wanted, atol=1e-6)
    assert float((out.images - g(z[:, :4]).detach()).abs().mean()) > 0.05


def test_the_noise_is_refined_too():
    g, d = networks()
    prior = fr.Product(fr.Normal(4), fr.Normal(6))
    sampler = fr.DDLS(0.5, noise_scale=0.0, logit_scale=20.0)
    out = fr.Refiner(fr.NoisyOutput(g, 0.5), d, sampler=sampler, max_steps=1, prior=prior).sample(50)
    start = prior.sample(out.ids, 0)
    x = (g(start[:, :4]).flatten(1) + 0.5 * start[:, 4:]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(d(x).sum(), x)
    wanted = start[:, 4:] + 0.25 * (20.0 * 0.5 * slope - start[:, 4:])
    assert torch.allclose(out.latents[:, 4:], wanted, atol=1e-5)


class Conditional(nn.Module):
    def __init__(self, required):
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.out = nn.Linear(4, 6)
        if not required:
            self.forward = self.optional

    def forward(self, z, labels):
        return self.out(z + self.table(labels))

    def optional(self, z, labels=None):
        return self.out(z if labels is None else z + self.table(labels))


@pytest.mark.parametrize("required", [True, False])
def test_labels_reach_a_conditional_generator(required):
    g, z, y = Conditional(required), torch.randn(5, 10), torch.tensor([0, 1, 2, 0, 1])
    noisy = copy.deepcopy(fr.NoisyOutput(g, 0.1))
    assert torch.allclose(noisy(z, y), g(z[:, :4], y) + 0.1 * z[:, 4:])
    if not required:
        assert torch.allclose(noisy(z), g(z[:, :4]) + 0.1 * z[:, 4:])


def test_labels_for_a_generator_without_any_are_refused():
    g, d = networks()
    prior = fr.Product(fr.Normal(4), fr.Normal(6))
    refiner = fr.Refiner(fr.NoisyOutput(g, 0.1), d, sampler=fr.DDLS(0.01), prior=prior, max_steps=1)
    with pytest.raises(fr.InputError, match="neither the generator nor the discriminator takes them"):
        refiner.sample(3, labels=1)


def test_the_latents_shape_is_read_off_or_asked_for():
    assert fr.NoisyOutput(nn.Sequential(nn.ConvTranspose2d(7, 3, 4)), 0.1).latent_shape == (7, 1, 1)
    assert fr.NoisyOutput(nn.Tanh(), 0.1, latent_shape=(2, 5)).latent_shape == (2, 5)
    with pytest.raises(fr.InputError, match="pass latent_shape="):
        fr.NoisyOutput(nn.Tanh(), 0.1)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "x"])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(fr.InputError, match="scale"):
        fr.NoisyOutput(nn.Linear(2, 2), scale)


def test_a_prior_that_does_not_fit_is_told_what_would():
    g, d = networks()
    refiner = fr.Refiner(fr.NoisyOutput(g, 0.1), d, sampler=fr.DDLS(0.01), prior=fr.Normal(4))
    with pytest.raises(fr.InputError, match=r"4 \+ 6"):
        refiner.sample(3)
