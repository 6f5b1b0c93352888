"""The diagnosis of step sizes: what each sampler's results say, and what a run warns of."""

import warnings

import pytest
import torch
from torch import nn

import fastrefine as fr


class Bowl(nn.Module):
    """d(x) = -curvature |x|^2 / 2: an ascent by fixed steps is stable below 2 / curvature."""

    def __init__(self, curvature=1.0):
        super().__init__()
        self.curvature = nn.Parameter(torch.tensor(curvature))

    def forward(self, x):
        return -0.5 * self.curvature * x.square().sum(1)


def run(sampler, curvature=1.0, max_steps=20, n=64, **options):
    options = {"at": "input", "prior": fr.Normal(3), **options}
    refiner = fr.Refiner(nn.Identity(), Bowl(curvature), sampler=sampler, max_steps=max_steps, num_slots=64, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = refiner.sample(n)
    return fr.diagnose_steps(out, sampler), out, [str(w.message) for w in caught]


def plain(step_size):
    return fr.Collaborative(step_size, loss="wasserstein", control="fixed")


def test_a_fixed_step_within_stability_is_not_complained_of():
    found, out, warned = run(plain(1.9))
    assert found.stable and found.advice == "" and not warned
    assert found.falls == 0 and found.gain > 0 and found.acceptance is None and found.step_sizes is None
    assert found.updates == int(out.steps.sum()) == 64 * 20
    assert found.gain == pytest.approx(float((out.logits - out.initial_logits).mean()), rel=1e-5)
    spread = float((out.logits - out.initial_logits).std()) / 8
    assert found.gain_error == pytest.approx(spread, rel=1e-4)


def test_a_fixed_step_beyond_stability_is_told():
    found, _, warned = run(plain(2.1))
    assert not found.stable and found.falls == 1
    assert "100% of the updates lowered the logit" in found.advice and found.advice in warned


def test_backtracking_reaches_a_stable_step_from_one_beyond_stability():
    found, _, warned = run(fr.Collaborative(200.0, loss="wasserstein"))
    assert found.stable and not warned and found.gain > 0
    low, middle, high = found.step_sizes
    assert low <= middle <= high < 20, "far below the 200 that it began with"


@pytest.mark.parametrize(("step_size", "stable"), [(0.1, True), (9.0, False)])
def test_langevin_beyond_stability_lowers_the_mean_logit(step_size, stable):
    found, _, warned = run(fr.DDLS(step_size))
    assert found.stable is stable and bool(warned) is not stable
    if not stable:
        assert "the mean logit fell" in found.advice
    else:
        assert 0.2 < found.falls < 0.6


def test_given_latents_may_lose_logit_without_a_warning():
    refiner = fr.Refiner(nn.Identity(), Bowl(), sampler=fr.DDLS(0.5), prior=fr.Normal(3), max_steps=20, num_slots=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = refiner.refine(torch.full((64, 3), 0.01))
    assert out.logits.mean() < out.initial_logits.mean()


@pytest.mark.parametrize("sampler", [fr.MALA, lambda e, **k: fr.HMC(e, leapfrog=2, **k)])
def test_rare_and_sure_acceptance_are_told(sampler):
    rare, _, warned = run(sampler(40.0))
    assert not rare.stable and rare.acceptance < 0.1 and rare.advice in warned and "adapt=" in rare.advice
    sure, out, warned = run(sampler(1e-3))
    assert sure.stable and "mix faster" in sure.advice and not warned
    assert sure.acceptance == pytest.approx(float(out.acceptance.mean()), rel=1e-6)
    adapted, _, warned = run(sampler(40.0, adapt=100), max_steps=100)
    assert adapted.stable and not warned and adapted.step_sizes[2] < 40


def test_acceptance_by_resonance_is_no_reason_for_a_larger_step():
    def advice(sampler):
        return run(sampler, curvature=1e-4, max_steps=40)[0].advice

    for leapfrog in (10, 20):
        told = advice(fr.HMC(0.314, leapfrog, jitter=0))
        assert "near a multiple of pi" in told and "jitter=" in told and "larger" not in told
    for sampler in (fr.HMC(0.314, 10), fr.HMC(0.2, 10, jitter=0), fr.HMC(0.01, 10, jitter=0)):
        assert "larger step size would mix faster" in advice(sampler)


def test_transport_is_not_judged_by_its_logit():
    assert run(fr.DOT(0.5, lipschitz=100.0), curvature=0.01)[0].stable


def test_shares_of_samples_that_reached_the_threshold_or_broke():
    found, out, _ = run(plain(0.5), stop=-0.5)
    assert found.reached == float((out.status == fr.Status.REACHED).float().mean()) == 1.0
    assert found.nonfinite == 0


def test_nothing_is_said_of_no_samples():
    found, _, warned = run(plain(0.5), n=0)
    assert found.stable and found.updates == 0 and not warned
