"""Every sampler against its published formula: one sample at a time, textbook formulas, autograd of the stated energy."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

import fastrefine as fr
from fastrefine.noise import Stream, normal, uniform
from tests.support.closed_forms import BACKENDS, serving
from tests.support.step_machine import device_of

DIM, STEPS, SEED, N = 4, 12, 2**40 + 9, 9


def networks():
    torch.manual_seed(3)
    g = nn.Sequential(nn.Linear(DIM, 24), nn.BatchNorm1d(24), nn.Linear(24, 6), nn.Tanh())
    d = nn.Sequential(nn.Linear(6, 24), nn.Softplus(), nn.Linear(24, 1))
    with torch.no_grad():
        g[1].running_mean.normal_()
        d[2].weight.mul_(12)
    return g.double().eval(), d.double().eval()


G, D = networks()
PRIORS = {"normal": fr.Normal(DIM), "uniform": fr.Uniform(DIM), "truncated": fr.TruncatedNormal(DIM, bound=1.2)}


def log_prior(prior, z):
    """log p0 up to a constant, inside the support."""
    return torch.zeros(()) if isinstance(prior, fr.Uniform) else -0.5 * (z * z).sum()


def bounds(prior):
    return (prior.low, prior.high) if isinstance(prior, fr.Uniform) else (-prior.bound, prior.bound)


def inside(prior, z):
    return isinstance(prior, fr.Normal) or bool(((z >= bounds(prior)[0]) & (z <= bounds(prior)[1])).all())


def reflect(prior, x):
    """(x bounced off the walls one bounce at a time, number of bounces) of one number."""
    if isinstance(prior, fr.Normal):
        return x, 0
    (low, high), bounces = bounds(prior), 0
    while not low <= x <= high:
        x, bounces = (2 * low - x if x < low else 2 * high - x), bounces + 1
    return x, bounces


def logit(x):
    return D(x[None])[0, 0]


def energy(sampler, prior, a, origin, at="input"):
    """The energy that the sampler's docstring states."""
    image = a if at == "output" else G(a[None])[0]
    d = logit(image)
    if isinstance(sampler, fr.DOT):
        return (a - origin + 1e-3).square().sum().sqrt() - d / sampler.lipschitz
    if isinstance(sampler, fr.DGflow):
        return {"KL": -d, "JS": torch.log(1 - torch.sigmoid(d)), "logD": -torch.log(torch.sigmoid(d))}[sampler.divergence]
    return -log_prior(prior, a) - sampler.logit_scale * d


def gradient(value, a):
    a = a.clone().requires_grad_()
    u = value(a)
    return u.item(), torch.autograd.grad(u, a)[0]


def draws(kind, identity, step, features):
    who = torch.tensor([identity]), torch.tensor([step])
    if kind == "normal":
        return normal(SEED, *who, features, Stream.PROPOSAL, torch.float64)[0]
    return uniform(SEED, *who, 1, Stream.ACCEPT)[0, 0].item()


def at_step(value, k):
    return value if isinstance(value, float) else value[min(k, len(value) - 1)]


def langevin(sampler, prior, value, z, identity):
    """[DDLS] Alg. 1, folded."""
    for k in range(STEPS):
        eps, scale = at_step(sampler.step_size, k), at_step(sampler.noise_scale, k)
        z = z - eps / 2 * gradient(value, z)[1] + math.sqrt(eps) * scale * draws("normal", identity, k, DIM)
        z = torch.tensor([reflect(prior, x)[0] for x in z.tolist()], dtype=torch.float64)
    return z, {}


def adapted(size, first, tests, accept, sampler):
    """Robbins-Monro on log eps, gain k^-.6."""
    size = size * math.exp(tests**-0.6 * (accept - sampler.target))
    return min(max(size, 1e-6 * first), 1e6 * first)


def from_prior(prior, xi):
    """A latent of the prior by its inverse distribution function, of the uniforms that the normals xi stand for."""
    if isinstance(prior, fr.Normal):
        return xi
    low, high = bounds(prior)
    law = stats.uniform(low, high - low) if isinstance(prior, fr.Uniform) else stats.truncnorm(low, high)
    return torch.from_numpy(law.ppf(stats.norm.cdf(xi.numpy())))


def mala(sampler, prior, value, z, identity):
    """Roberts & Tweedie 1996; every k-th transition Metropolis & Hastings' with independent proposals of the prior."""
    eps, accepted = sampler.step_size, 0

    def log_q(to, start, score):
        return -((to - start + eps / 2 * score) ** 2).sum().item() / (2 * eps)

    u, g = gradient(value, z)
    for k in range(1, STEPS + 1):
        xi, anew = draws("normal", identity, k - 1, DIM), bool(sampler.global_every) and k % sampler.global_every == 0
        trial = from_prior(prior, xi) if anew else z - eps / 2 * g + math.sqrt(eps) * xi
        probability = 0.0
        if inside(prior, trial):
            u2, g2 = gradient(value, trial)
            back, there = log_q(z, trial, g2), log_q(trial, z, g)
            if anew:
                back, there = log_prior(prior, z).item(), log_prior(prior, trial).item()
            probability = math.exp(min(0.0, u - u2 + back - there))
        if draws("uniform", identity, k, 1) < probability:
            z, u, g, accepted = trial, u2, g2, accepted + 1
        if k <= sampler.adapt and not anew:
            eps = adapted(eps, sampler.step_size, k, probability, sampler)
    return z, {"acceptance": accepted / STEPS, "step_sizes": eps}


def pcn(sampler, prior, value, z, identity):
    """Cotter et al. 2013, the Crank-Nicolson Langevin proposal of step delta; its density in the ratio as it is written."""
    eps, accepted = sampler.step_size, 0

    def proposal(start, grad):
        delta = eps / 2
        slope = grad - start  # of V alone
        return ((2 - delta) * start - 2 * delta * slope) / (2 + delta), math.sqrt(8 * delta) / (2 + delta)

    def log_q(to, start, grad):
        mean, sd = proposal(start, grad)
        return -((to - mean) ** 2).sum().item() / (2 * sd**2)

    u, g = gradient(value, z)
    for k in range(1, STEPS + 1):
        mean, sd = proposal(z, g)
        trial = mean + sd * draws("normal", identity, k - 1, DIM)
        u2, g2 = gradient(value, trial)
        probability = math.exp(min(0.0, u - u2 + log_q(z, trial, g2) - log_q(trial, z, g)))
        if draws("uniform", identity, k, 1) < probability:
            z, u, g, accepted = trial, u2, g2, accepted + 1
        if k <= sampler.adapt:
            eps = min(adapted(eps, sampler.step_size, k, probability, sampler), 4.0)
    return z, {"acceptance": accepted / STEPS, "step_sizes": eps}


def jittered(eps, sampler, identity, step):
    """Neal 2011, section 3.2: eps times a uniform factor in 1 - jitter ... 1 + jitter, drawn before the trajectory."""
    u = uniform(SEED, torch.tensor([identity]), torch.tensor([step]), 1, Stream.JITTER)[0, 0].item()
    return eps * (1 - sampler.jitter + 2 * sampler.jitter * u)


def hmc(sampler, prior, value, z, identity):
    """Neal 2011, with walls."""
    base, count, accepted, length = sampler.step_size, STEPS // sampler.leapfrog, 0, sampler.leapfrog
    for k in range(count):
        p, eps = draws("normal", identity, k * length, DIM), jittered(base, sampler, identity, k * length)
        q, before = z, value(z).item() + 0.5 * (p * p).sum().item()
        for _ in range(length):
            p = p - eps / 2 * gradient(value, q)[1]
            bounced = [reflect(prior, x) for x in (q + eps * p).tolist()]
            q = torch.tensor([x for x, _ in bounced], dtype=torch.float64)
            p = p * torch.tensor([(-1.0) ** bounces for _, bounces in bounced], dtype=torch.float64)
            p = p - eps / 2 * gradient(value, q)[1]
        probability = math.exp(min(0.0, before - value(q).item() - 0.5 * (p * p).sum().item()))
        if draws("uniform", identity, (k + 1) * length, 1) < probability:
            z, accepted = q, accepted + 1
        if (k + 1) * length <= sampler.adapt:
            base = adapted(base, sampler.step_size, k + 1, probability, sampler)
    return z, {"acceptance": accepted / count, "step_sizes": base}


def flow(sampler, prior, value, a, identity):
    """[DGflow] Alg. 1."""
    eta, gamma = sampler.step_size, sampler.gamma
    for k in range(STEPS):
        xi = draws("normal", identity, k, len(a))
        a = a - eta * gradient(value, a)[1] + math.sqrt(2 * eta * gamma) * xi
    return a, {}


def transport(sampler, prior, value, a, identity):
    """[DOT] Alg. 1 and 2."""
    m, v = torch.zeros_like(a), torch.zeros_like(a)
    for k in range(STEPS):
        g = gradient(value, a)[1]
        if sampler.projection == "radial":
            g = g - a * (g @ a) / (a @ a)
        elif sampler.projection == "published":
            g = g - a * (g @ a) / math.sqrt(len(a))
        if sampler.optimizer == "adam":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            g = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        a = a - sampler.step_size * g
        if prior is not None and not isinstance(prior, fr.Normal):
            a = a.clamp(*bounds(prior))
    return a, {}


RUNS = {
    "ddls": (fr.DDLS(0.1), "normal", langevin),
    "ddls, scaled": (fr.DDLS(0.1, 0.5, 0.7), "truncated", langevin),
    "ddls, scheduled": (fr.DDLS((0.4, 0.2), (1.0, 0.5, 0.1)), "uniform", langevin),
    "mala": (fr.MALA(1.2), "normal", mala),
    "mala on a box": (fr.MALA(0.15, logit_scale=0.8), "uniform", mala),
    "mala, adapted": (fr.MALA(0.5, adapt=8), "truncated", mala),
    "mala, global": (fr.MALA(0.9, global_every=5), "normal", mala),
    "mala, global, adapted": (fr.MALA(0.5, 0.8, 5, adapt=8), "normal", mala),
    "pcn": (fr.PCN(2.0, logit_scale=8.0), "normal", pcn),  # which accepts nearly all that a gentle D proposes
    "pcn, adapted": (fr.PCN(0.5, 0.8, adapt=8), "normal", pcn),
    "hmc": (fr.HMC(0.8, 3), "normal", hmc),
    "hmc of one length": (fr.HMC(0.8, 3, jitter=0), "normal", hmc),
    "hmc on a box": (fr.HMC(0.9, 4, logit_scale=0.8, jitter=0.5), "uniform", hmc),
    "hmc, adapted": (fr.HMC(0.3, 2, adapt=8), "truncated", hmc),
    "dgflow KL": (fr.DGflow(0.05, "KL", 0.02), "normal", flow),
    "dgflow JS": (fr.DGflow(0.1, "JS", 0.02), "normal", flow),
    "dgflow logD": (fr.DGflow(0.1, "logD", 0.02), "uniform", flow),
    "dot": (fr.DOT(0.02, lipschitz=2.0), "normal", transport),
    "dot, published": (fr.DOT(0.02, lipschitz=2.0, projection="published"), "normal", transport),
    "dot, sgd": (fr.DOT(0.05, "sgd", lipschitz=2.0), "normal", transport),
    "dot on a box": (fr.DOT(0.3, "sgd", lipschitz=0.2, projection="none"), "uniform", transport),
}


@functools.cache
def published(name):
    """Latents (N, DIM) and numbers of the run ``name``, sample by sample."""
    sampler, prior, method = RUNS[name]
    prior = PRIORS[prior]
    rows = []
    for identity, start in enumerate(prior.sample(torch.arange(N), SEED, torch.float64)):
        rows.append(method(sampler, prior, lambda a, z=start: energy(sampler, prior, a, z), start, identity))
    numbers = {key: torch.tensor([row[1][key] for row in rows], dtype=torch.float64) for key in rows[0][1]}
    return torch.stack([row[0] for row in rows]).detach(), numbers


@functools.cache
def refiner(sampler, prior, **options):
    """One for all backends: the networks are prepared once."""
    return fr.Refiner(G, D, sampler, prior=prior, **{"max_steps": STEPS, "num_slots": 16, "precision": "float64"} | options)


def run(name, backend="reference", **changes):
    sampler, prior, _ = RUNS[name]
    with serving(backend):
        return refiner(replace(sampler, **changes), PRIORS[prior], num_slots=5).sample(N, seed=SEED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RUNS)
def test_samplers_equal_their_published_formulas(name, backend):
    latents, numbers = published(name)
    out = run(name, backend)
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.logits, D(G(latents)).detach()[:, 0], rtol=0, atol=1e-7)
    for key, wanted in numbers.items():
        torch.testing.assert_close(getattr(out, key).double(), wanted, rtol=1e-9, atol=0)


def test_the_runs_meet_acceptance_and_rejection_and_walls(monkeypatch):
    for name in ("mala", "mala on a box", "mala, global", "pcn", "hmc", "hmc on a box", "hmc, adapted"):
        assert 0.1 < published(name)[1]["acceptance"].mean() < 0.95
    plain, seen = reflect, []
    monkeypatch.setitem(globals(), "reflect", lambda *args: seen.append(plain(*args)) or seen[-1])
    for name in ("ddls, scheduled", "hmc on a box"):
        seen.clear()
        published.__wrapped__(name)
        assert sum(bounces for _, bounces in seen) > 0.02 * len(seen)
    assert (published("dot on a box")[0].abs() == 1).any()


@pytest.mark.parametrize("prior", ["uniform", "truncated"])
def test_moves_to_fresh_draws_of_a_bounded_prior_equal_the_formula(prior, monkeypatch):
    """By the PyTorch formulas alone: C++ and Triton draw from a normal prior, and are refused by name for others."""
    monkeypatch.setitem(RUNS, "global on a box", (fr.MALA(0.15, global_every=2, adapt=6), prior, mala))
    published.cache_clear()
    latents, numbers = published("global on a box")
    published.cache_clear()
    out = run("global on a box")
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.acceptance.double(), numbers["acceptance"], rtol=1e-9, atol=0)
    torch.testing.assert_close(out.step_sizes.double(), numbers["step_sizes"], rtol=1e-9, atol=0)
    device_of("cpu")
    with fr.use_backend("cpu"), pytest.raises(fr.BackendError, match="this sampler with this prior; use backend 'reference'"):
        refiner(RUNS["global on a box"][0], PRIORS[prior], num_slots=5).sample(N, seed=SEED)
    assert refiner(RUNS["global on a box"][0], PRIORS[prior], num_slots=5).sample(N).report["backend"] == "reference"


def test_fresh_draws_of_a_prior_do_not_depend_on_slots_or_chunks():
    own = refiner(fr.MALA(0.3, global_every=2), PRIORS["normal"], num_slots=16)
    whole = own.sample(30, seed=SEED)
    parts = list(own.replaced(num_slots=4).stream(30, seed=SEED, chunk=7))
    torch.testing.assert_close(torch.cat([part.latents for part in parts]), whole.latents, rtol=0, atol=1e-9)


def test_pcn_refuses_priors_that_are_not_normal():
    for prior in ("uniform", "truncated"):
        with pytest.raises(fr.InputError, match="standard normal priors.*fr.MALA or fr.HMC"):
            refiner(fr.PCN(0.1), PRIORS[prior]).sample(2)
    with pytest.raises(fr.InputError, match="at most 4"):
        fr.PCN(4.5)
    with pytest.raises(fr.InputError, match="global_every is 0"):
        fr.MALA(0.1, global_every=0)


@pytest.mark.parametrize("name", RUNS)
def test_the_formulas_tell_a_step_size_one_percent_off(name):
    latents, _ = published(name)
    sampler = RUNS[name][0]
    other = 1.01 * sampler.step_size if isinstance(sampler.step_size, float) else (0.4, 0.202)
    assert (run(name, step_size=other).latents - latents).abs().max() > 1e-4


DRIFTS = {
    "ddls": (fr.DDLS(1e-3, 0.0, 0.7), 0.5e-3),
    "dgflow KL": (fr.DGflow(1e-3, "KL", 0.0), 1e-3),
    "dgflow JS": (fr.DGflow(1e-3, "JS", 0.0), 1e-3),
    "dgflow logD": (fr.DGflow(1e-3, "logD", 0.0), 1e-3),
    "dot": (fr.DOT(1e-3, "sgd", lipschitz=2.0, projection="none"), 1e-3),
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", DRIFTS)
def test_the_drift_is_autograd_of_the_stated_energy(name, prior):
    sampler, size = DRIFTS[name]
    prior = PRIORS[prior]
    start = 0.9 * prior.sample(torch.arange(N), SEED, torch.float64)
    with serving("reference"):
        moved = refiner(sampler, prior, max_steps=1, num_slots=4).refine(start).latents
    wanted = torch.stack([gradient(lambda a, z=z: energy(sampler, prior, a, z), z)[1] for z in start])
    torch.testing.assert_close((start - moved) / size, wanted, rtol=0, atol=1e-9)


def test_without_noise_ddls_climbs_the_log_posterior():
    prior = PRIORS["normal"]
    with serving("reference"):
        out = refiner(fr.DDLS(0.02, 0.0), prior, max_steps=40, num_slots=N).sample(N, snapshots=range(0, 41, 5))
    states = [snapshot.activations for snapshot in out.snapshots.values()]
    values = torch.stack([prior.log_prob(z) + D(G(z))[:, 0] for z in states]).detach()
    assert (values[1:] > values[:-1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapt", [0, 6])
def test_hmc_of_one_leapfrog_step_is_mala(adapt, backend):
    """Proposals and acceptance are equal when the step sizes are: eps of MALA is the square of HMC's, without jitter."""
    size, found = 1.1, []
    for sampler in (fr.MALA(size**2, adapt=adapt, target=0.6), fr.HMC(size, 1, adapt=0, target=0.6, jitter=0)):
        with serving(backend):
            found.append(refiner(sampler, PRIORS["normal"]).sample(64, seed=SEED))
    if adapt:  # of the step size they adapt different powers: the check must be able to fail
        assert not torch.allclose(found[0].latents, found[1].latents)
        return
    assert torch.equal(found[0].acceptance, found[1].acceptance)
    assert 0.1 < found[0].acceptance.mean() < 0.95
    torch.testing.assert_close(found[0].latents, found[1].latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize(("divergence", "loss"), [("KL", "wasserstein"), ("JS", "minimax"), ("logD", "nonsaturating")])
def test_flows_without_noise_are_collaborative_of_their_loss(divergence, loss, at, backend):
    found = []
    for sampler in (fr.DGflow(0.1, divergence, 0.0), fr.Collaborative(0.1, loss, control="fixed")):
        with serving(backend):
            found.append(refiner(sampler, PRIORS["normal"], at=at).sample(30).activations)
    assert torch.equal(*found)
