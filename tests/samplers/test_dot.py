"""DOT: the Lipschitz constant that it measures, its projection, its bounds, its energy."""

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.networks.probe import ROWS
from fastrefine.noise import Stream
from tests.support.closed_forms import serving
from tests.support.fault_networks import IMAGE, LATENT, discriminator, generator

G, D = generator().double(), discriminator().double()


def make(sampler, d=D, **options):
    options = {"prior": fr.Normal(LATENT), "max_steps": 6, "num_slots": 8, "precision": "float64"} | options
    return fr.Refiner(G, d, sampler, **options)


def run(sampler, d=D, n=20, **options):
    with serving("reference"):
        return make(sampler, d, **options).sample(n, seed=4)


def slope(d, prior, at):
    """The largest slope of the logit over 100 pairs of proposals, at the latent or in data space."""
    z = prior.sample(torch.arange(ROWS, ROWS + 200), 0, torch.float64, Stream.PROBE)
    x = G(z)
    a = z if at == "input" else x
    pairs = [(a[k] - a[k + 1], d(x[k : k + 1]) - d(x[k + 1 : k + 2])) for k in range(0, 200, 2)]
    return max(float(logit.abs().detach() / offset.square().sum().sqrt().detach()) for offset, logit in pairs)


@pytest.mark.parametrize("prior", [fr.Normal(LATENT), fr.Uniform(LATENT)], ids=repr)
@pytest.mark.parametrize("at", ["input", "output"])
def test_the_lipschitz_constant_is_the_largest_slope_of_100_pairs(at, prior):
    found = run(fr.DOT(0.05, "sgd"), at=at, prior=prior)
    k = slope(D, prior, at)
    torch.testing.assert_close(
        found.activations, run(fr.DOT(0.05, "sgd", k), at=at, prior=prior).activations, rtol=0, atol=1e-10
    )
    other = run(fr.DOT(0.05, "sgd", 1.001 * k), at=at, prior=prior)
    assert not torch.allclose(found.activations, other.activations, rtol=0, atol=1e-7)


def test_another_discriminator_is_measured_anew():
    other = nn.Sequential(*discriminator(5).double(), nn.Linear(1, 1).double())
    with torch.no_grad():
        other[-1].weight.fill_(3.0)
    sampler = fr.DOT(0.05, "sgd")
    with serving("reference"):
        refiner = make(sampler)
        first = refiner.sample(20, seed=4)
        second = refiner.with_discriminator(other).sample(20, seed=4)
        again = refiner.sample(20, seed=4)
    wanted = run(fr.DOT(0.05, "sgd", slope(other, fr.Normal(LATENT), "input")), other)
    torch.testing.assert_close(second.latents, wanted.latents, rtol=0, atol=1e-10)
    assert torch.equal(first.latents, again.latents) and not torch.allclose(first.latents, second.latents)


def test_a_measured_lipschitz_constant_needs_a_prior():
    with serving("reference"), pytest.raises(fr.InputError, match=r"lipschitz=None .* pass a number, or prior="):
        make(fr.DOT(0.1), prior=None).refine(torch.zeros(3, LATENT))
    with serving("reference"):
        found = make(fr.DOT(0.1, lipschitz=1.0), prior=None).refine(torch.ones(3, LATENT))
    assert found.latents.isfinite().all()


def one_step(projection, **options):
    """(z, what one step of size 1 took off) of 20 samples."""
    with serving("reference"):
        out = make(fr.DOT(1.0, "sgd", 0.5, projection), max_steps=1, **options).sample(20, seed=4, snapshots=(0,))
    start = out.snapshots[0].activations
    return start, start - out.activations


def test_the_radial_projection_takes_away_the_radial_part_exactly():
    z, whole = one_step("none")
    _, tangent = one_step("radial")
    torch.testing.assert_close((tangent * z).sum(1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)
    unit = z / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tangent, whole - unit * (whole * unit).sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert ((whole * unit).sum(1).abs() > 1e-3).all()


def test_the_published_projection_divides_by_the_root_of_the_dimension():
    z, whole = one_step("none")
    _, published = one_step("published")
    wanted = whole - z * (whole * z).sum(1, keepdim=True) / LATENT**0.5
    torch.testing.assert_close(published, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"at": "output"}, {"prior": fr.Uniform(LATENT, low=-9, high=9)}, {"at": "0"}], ids=str)
def test_only_normal_latents_are_projected(options):
    _, whole = one_step("none", **options)
    for projection in ("radial", "published"):
        assert torch.equal(one_step(projection, **options)[1], whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_bounded_latents_are_clipped_and_others_are_not(optimizer):
    sampler = fr.DOT(0.5, optimizer, 0.05)
    for prior, bound in ((fr.Uniform(LATENT), 1.0), (fr.TruncatedNormal(LATENT, bound=0.7), 0.7)):
        z = run(sampler, prior=prior).latents.abs()
        assert z.max() == bound
    assert run(sampler).latents.abs().max() > 2
    assert run(sampler, prior=fr.Uniform(LATENT), at="0").activations.abs().max() > 1


@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_small_steps_descend_the_energy(optimizer, at):
    k = 0.3
    sampler = fr.DOT(1e-5, optimizer, k, projection="none")  # never at the kink, which is 2e-3 from the start
    with serving("reference"):
        out = make(sampler, at=at, max_steps=40).sample(20, snapshots=range(0, 41, 4))
    states = [snapshot.activations for snapshot in out.snapshots.values()]
    assert states[0].shape[1] == (LATENT if at == "input" else IMAGE)
    cost = torch.stack([(a - states[0] + 1e-3).norm(dim=1) for a in states])
    logits = torch.stack([D(G(a) if at == "input" else a)[:, 0] for a in states])
    energy = (cost - logits / k).detach()
    assert (energy[1:] < energy[:-1]).all()
