"""HMC's jitter: trajectories of many lengths do not resonate, each has one, and jitter=0 is the leapfrog of one length."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

import fastrefine as fr
from fastrefine import ops
from fastrefine.noise import Noise, Stream, normal, uniform
from fastrefine.ops import slots
from fastrefine.samplers import Evaluation, Latent
from tests.support.closed_forms import ALPHA, BACKENDS, chains, gaussian
from tests.support.step_machine import device_of

SEED, SLOPE = 2**40 + 3, 2.0


class Along(nn.Module):
    """d(x) = SLOPE x_0, flat in all other directions: the law is N(SLOPE, 1) along the first, N(0, 1) along the others."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(SLOPE))

    def forward(self, x):
        return self.slope * x[:, 0]


# Resonance. Steps of .314 turn a flat direction by 3.153, so cos = -.9999; with jitter .2 the mean of the cosines is -.935
# and that of their squares .88. 100 transitions leave .935^100 = .0012 of the first mean's distance: .0024, a twentieth of
# the error of the mean of 2000 chains, .022, times the 3.9 of ALPHA.
CHAINS, TRANSITIONS = 2000, 100


def from_the_prior(sampler):
    """(first coordinate, all others, correlation of the others' length with that at the start) of CHAINS chains."""
    prior, backend = fr.Normal(16), ops.choose(torch.device("cpu"), "hmc")  # whichever is fast: formulas agree elsewhere
    out = chains(sampler, Along(), prior, CHAINS, TRANSITIONS * sampler.traits.transition_steps, backend=backend, seed=SEED)
    lengths = [x[:, 1:].norm(dim=1) for x in (prior.sample(out.ids, SEED), out.latents)]
    return out.latents[:, 0], out.latents[:, 1:], float(torch.corrcoef(torch.stack(lengths))[0, 1])


def test_hmc_whose_trajectories_are_half_a_turn_arrives_at_its_law():
    first, others, correlation = from_the_prior(fr.HMC(0.314))
    assert gaussian(SLOPE, 1.0).p_value(first) > ALPHA
    assert abs(float(first.mean()) - SLOPE) < 0.09
    assert gaussian(0.0, 1.0).p_value(others) > ALPHA
    assert abs(correlation) < 4 / math.sqrt(CHAINS)


def test_hmc_of_one_length_half_a_turn_stays_where_it_was():
    """The check above can fail: this is what the jitter is for."""
    first, _, correlation = from_the_prior(fr.HMC(0.314, jitter=0))
    assert float(first.mean()) < 0.5 and correlation > 0.9


# The draws


def test_a_trajectory_has_one_size_and_the_next_another():
    ids, length = torch.tensor([0, 1, 2**31, 2**32 - 1]), 5
    found = torch.stack(
        [Noise(SEED, ids, torch.full((4,), step), 3, torch.float32).jitter(step % length) for step in range(4 * length)]
    ).view(4, length, 4)
    assert (found == found[:, :1]).all() and len(found.unique()) == 16
    over = Noise(SEED, ids, torch.full((4,), 2 * length), 3, torch.float32).jitter(length)
    assert torch.equal(over, found[1, 0]), "the test at its end finds the trajectory's own"
    for seed, others in ((SEED + 1, ids), (SEED, ids + 7)):
        assert not torch.isin(Noise(seed, others, torch.zeros(4), 3, torch.float32).jitter(0), found).any()


def test_the_jitter_is_uniform_and_of_a_stream_of_its_own():
    noise = Noise(SEED, torch.arange(200_000), torch.full((200_000,), 30), 1, torch.float64)
    drawn = noise.jitter(0)
    assert drawn.dtype == torch.float64 and stats.kstest(drawn.numpy(), stats.uniform(-1, 2).cdf).pvalue > ALPHA
    for stream in set(Stream) - {Stream.JITTER}:
        assert abs(float(torch.corrcoef(torch.stack([drawn, noise.uniform(stream)]))[0, 1])) < 4 / math.sqrt(len(drawn))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_jitter_knows_neither_slots_nor_companions(backend):
    """Step sizes far apart: a draw of another sample or transition would show."""
    options = dict(prior=fr.Normal(4), max_steps=12, precision="float64")
    device_of(backend)
    with fr.use_backend(backend):
        wanted = fr.Refiner(nn.Identity(), Along(), fr.HMC(0.4, 3, jitter=0.9), num_slots=20, **options).sample(20, seed=SEED)
        for num_slots in (1, 7):
            refiner = fr.Refiner(nn.Identity(), Along(), fr.HMC(0.4, 3, jitter=0.9), num_slots=num_slots, **options)
            torch.testing.assert_close(refiner.sample(20, seed=SEED).latents, wanted.latents, rtol=0, atol=1e-12)
            part = refiner.sample(5, first_id=9, seed=SEED)
            torch.testing.assert_close(part.latents, wanted.latents[9:14], rtol=0, atol=1e-12)
        fixed = fr.Refiner(nn.Identity(), Along(), fr.HMC(0.4, 3, jitter=0), num_slots=20, **options).sample(20, seed=SEED)
    assert (wanted.latents != fixed.latents).any(1).all()
    assert (wanted.step_sizes == 0.4).all(), "what is reported is the size before the jitter"


# jitter=0

N, F, TRANSITIONS_OF_FEW = 2, 6, 3
WEIGHT, CENTRE = torch.linspace(0.2, 3, F), torch.linspace(-1, 2, F)


def evaluate(a):
    """A quadratic loss and its gradient, row by row."""
    weight, centre = WEIGHT.to(a), CENTRE.to(a)
    loss = (0.5 * weight * (a - centre) ** 2).sum(1)
    return Evaluation(-loss, loss, weight * (a - centre))


def of_one_length(z, eps, leapfrog, latent):
    """(positions, share accepted) by the textbook, the roundings in the order of the code before there was a jitter."""

    def energy(a):
        found = evaluate(a)
        return found.loss - latent.log_prob(a), found.grad - latent.score(a)

    ids, eps = torch.arange(N), torch.full((N, 1), eps, dtype=z.dtype)
    (u, g), accepted = energy(z), torch.zeros(N)
    for step in range(0, TRANSITIONS_OF_FEW * leapfrog, leapfrog):
        drawn = normal(SEED, ids, torch.full((N,), step), F, Stream.PROPOSAL, z.dtype)
        p, q = drawn - 0.5 * eps * g, z
        for inner in range(leapfrog):
            p = p - eps * g2 if inner else p  # noqa: F821
            q = q + eps * p
            u2, g2 = energy(q)
        before, after = drawn.double(), p.double() - 0.5 * eps.double() * g2.double()
        ratio = (u - u2).double() + (0.5 * ((before - after) * (before + after))).sum(1)
        drawn = uniform(SEED, ids, torch.full((N,), step + leapfrog), 1, Stream.ACCEPT)[:, 0]
        accept = torch.log(drawn.to(z.dtype).double()) < ratio
        z, g = (torch.where(accept[:, None], new, old) for new, old in ((q, z), (g2, g)))
        u, accepted = torch.where(accept, u2, u), accepted + accept
    return z, accepted / TRANSITIONS_OF_FEW


def by_the_step(sampler, z, backend):
    device = torch.device(device_of(backend))
    own, pool, outputs = slots.allocate(N, F, N, N, slots.Rule(sampler, SEED), z.dtype, device)
    pool.activation.copy_(z)
    pool.last_step.fill_(TRANSITIONS_OF_FEW * sampler.leapfrog)
    pool.threshold.fill_(torch.inf)
    pool.counters[slots.END] = N
    ops.refine_step(own, None, pool, outputs, slots.Rule(sampler, SEED), backend=backend)
    while pool.counters[slots.LIVE] > 0:
        ops.refine_step(own, evaluate(own.activation), pool, outputs, slots.Rule(sampler, SEED), backend=backend)
    return outputs.activation[:N].cpu()


@pytest.mark.parametrize(("leapfrog", "dtype"), [(1, torch.float32), (3, torch.float64)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_without_jitter_hmc_is_the_leapfrog_of_one_length(backend, leapfrog, dtype):
    """Bit by bit where the normals are, in the other backends to their rounding."""
    z = torch.randn(N, F, generator=torch.Generator().manual_seed(5)).to(dtype)
    table = torch.tensor([[1.0], [-torch.inf], [torch.inf]], dtype=dtype).repeat(1, F)
    wanted, share = of_one_length(z, 0.7, leapfrog, Latent(table))
    assert 0.3 < share.mean() < 0.95
    latent = Latent(table.to(device_of(backend)))
    found = by_the_step(fr.HMC(0.7, leapfrog, jitter=0, latent=latent), z, backend)
    if backend == "reference":
        assert torch.equal(found, wanted)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    other = by_the_step(fr.HMC(0.7, leapfrog, jitter=1e-3, latent=latent), z, backend)
    assert not torch.allclose(other, wanted, rtol=0, atol=2e-5)
