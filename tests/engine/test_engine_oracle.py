"""The engine against a per-sample loop written from [CS] Alg. 1, with plain autograd and no engine code."""

import math

import pytest
import torch

import fastrefine as fr
from fastrefine.noise import Stream, normal
from tests.support.algorithm_1 import CUTS, SAMPLERS, K, Mixed, networks, oracle

# Every sampler meets every cut and every number of slots, and so does every cut.
SLOTS = [(name, at, (1, 7, 64, 1000)[(s + c) % 4]) for s, name in enumerate(SAMPLERS) for c, at in enumerate(CUTS)]


@pytest.mark.parametrize(("name", "at", "slots"), SLOTS)
def test_engine_equals_algorithm_1_sample_by_sample_for_any_number_of_slots(name, at, slots):
    n = 30
    g, d, real, threshold, images, logits, steps = oracle(name, at, n)
    assert len(set(steps.tolist())) > 2, "samples must retire at different times"
    assert (logits >= threshold).any()
    refiner = fr.Refiner(
        g, d, SAMPLERS[name], at=at, max_steps=K, stop=Mixed(threshold), prior=fr.Normal(4), real=real, num_slots=slots,
        precision="float64",
    )  # fmt: skip
    out = refiner.sample(n, seed=5)
    assert torch.equal(out.steps.long(), steps)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("name", "at"), [(name, list(CUTS)[(s + c) % 4]) for s, name in enumerate(SAMPLERS) for c in (0, 1)])
def test_a_float32_step_agrees_with_the_float64_step(name, at):
    (g, d), outs = networks(), {}
    real = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for precision in ("float32", "float64"):
        sampler = SAMPLERS[name]
        refiner = fr.Refiner(
            g, d, sampler, at=at, max_steps=1, prior=fr.Normal(4), real=real, num_slots=16, precision=precision
        )
        outs[precision] = refiner.sample(40, seed=5).activations.double()
    difference = (outs["float32"] - outs["float64"]).abs()
    if name in ("adam", "ladam"):  # the first update is a sign: only where |g| is above rounding can it agree
        settled = difference < 1e-5 * outs["float64"].abs().max()
        assert settled.double().mean() > 0.98
    else:
        assert difference.max() <= 1e-5 * outs["float64"].abs().max()


@pytest.mark.parametrize(("divergence", "loss"), [("logD", "nonsaturating"), ("JS", "minimax"), ("KL", "wasserstein")])
def test_dgflow_without_noise_is_collaborative_of_its_loss(divergence, loss):
    g, d = networks()
    for at in ("input", "output"):
        kwargs = dict(at=at, max_steps=K, prior=fr.Normal(4), num_slots=16, precision="float64")
        flow = fr.Refiner(g, d, fr.DGflow(0.1, divergence, gamma=0.0), **kwargs).sample(30)
        collaborative = fr.Refiner(g, d, fr.Collaborative(0.1, loss, control="fixed"), **kwargs).sample(30)
        torch.testing.assert_close(flow.images, collaborative.images, rtol=0, atol=1e-10)


def test_dgflow_equals_its_equation_with_the_noise_of_sample_and_step():
    g, d = networks()
    n, eta, gamma = 12, 0.1, 0.05
    refiner = fr.Refiner(g, d, fr.DGflow(eta, "JS", gamma), max_steps=K, prior=fr.Normal(4), num_slots=5, precision="float64")
    out = refiner.sample(n, seed=9)
    ids = torch.arange(n)
    z = fr.Normal(4).sample(ids, 9, torch.float64)
    for k in range(K):
        z = z.requires_grad_()
        logit = d(g(z))[:, 0]
        (grad,) = torch.autograd.grad(logit.sum(), z)
        xi = normal(9, ids, torch.full((n,), k), 4, Stream.PROPOSAL, torch.float64)
        z = (z + eta * torch.sigmoid(logit)[:, None] * grad + math.sqrt(2 * eta * gamma) * xi).detach()
    torch.testing.assert_close(out.latents, z, rtol=0, atol=1e-8)


@pytest.mark.parametrize("control", ["backtracking", "barzilai_borwein"])
@pytest.mark.parametrize("at", CUTS)
def test_a_step_size_a_hundred_times_too_large_ends_no_sample_worse_than_its_proposal(at, control):
    g, d = networks()
    good = 0.3
    for loss in ("nonsaturating", "minimax", "wasserstein"):
        refiner = fr.Refiner(
            g,
            d,
            fr.Collaborative(100 * good, loss, control=control),
            at=at,
            max_steps=50,
            prior=fr.Normal(4),
            num_slots=64,
            precision="float64",
        )
        out = refiner.sample(200)
        assert (out.logits >= out.initial_logits).all()
        assert (out.logits > out.initial_logits).double().mean() >= 0.95
