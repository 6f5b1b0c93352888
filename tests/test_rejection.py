"""Rejection by the discriminator: laws known in closed form, budgets, edges. False-alarm rate ALPHA, fixed seeds."""

import dataclasses
import math

import pytest
import torch
from scipy import stats

import fastrefine as fr
from fastrefine import selection
from fastrefine.noise import Stream
from tests.support.refiners import refiner
from tests.support.selection_laws import ALPHA, SUP, acceptance, drs, optimal_logit, p_value, proposals


@pytest.mark.parametrize("log_m", [None, -0.5])
@pytest.mark.parametrize("percentile", [0, 80, 95, 100])
def test_rejection_accepts_with_the_published_probability(percentile, log_m):
    d = optimal_logit(proposals(20_000))
    indices = fr.rejection_sample(d, percentile=percentile, log_m=log_m, seed=1)
    wanted = drs(d, percentile, log_m)
    assert acceptance(wanted, indices) > ALPHA
    assert acceptance(drs(d, abs(percentile - 5), log_m), indices) < ALPHA, "the test can fail"
    assert torch.equal(indices, indices.sort().values)


def test_m_of_a_pilot_pass_rises_with_later_logits_and_not_before():
    d = torch.linspace(-3, 3, 4_000, dtype=torch.float64)  # each is the largest so far: all are accepted alike
    accepted = len(fr.rejection_sample(d, log_m=-9.0))
    assert abs(accepted - 2_000) < stats.norm.isf(ALPHA / 2) * math.sqrt(1_000)


def test_a_higher_percentile_accepts_fewer_and_better():
    d = optimal_logit(proposals(20_000))
    chosen = [fr.rejection_sample(d, percentile=p) for p in (50, 80, 95)]
    assert len(chosen[0]) > len(chosen[1]) > len(chosen[2]) > 0
    assert d.mean() < d[chosen[0]].mean() < d[chosen[1]].mean() < d[chosen[2]].mean()


def test_budgeted_rejection_samples_the_data_where_the_budget_allows_it():
    x = proposals(60_000)
    indices = fr.budgeted_rejection(optimal_logit(x), budget=0.95 * math.exp(-SUP), seed=3)
    assert p_value(x[indices]) > ALPHA
    wrong = fr.budgeted_rejection(1.1 * optimal_logit(x), budget=0.5 * math.exp(-SUP), seed=3)
    assert p_value(x[wrong]) < ALPHA, "the test can fail"


@pytest.mark.parametrize("budget", [1e-3, 0.1, 0.25, 0.9, 0.999, 1.0])
def test_acceptance_equals_the_budget(budget):
    d = torch.cat([optimal_logit(proposals(5_000)), torch.zeros(100), torch.tensor([30.0, 31.0])]).double()
    t = selection.log_scale(d, budget * len(d))
    accept = torch.exp(torch.clamp(d + t, max=0))
    assert float(accept.mean()) == pytest.approx(budget, rel=1e-9)
    indices = fr.budgeted_rejection(d, budget, seed=2)
    assert acceptance(accept, indices) > ALPHA if budget < 1 else len(indices) == len(d)


def test_selection_is_a_function_of_seed_and_position():
    d = optimal_logit(proposals(1000))
    for select in (fr.rejection_sample, lambda d, seed: fr.budgeted_rejection(d, 0.3, seed)):
        assert torch.equal(select(d, seed=4), select(d, seed=4))
        assert not torch.equal(select(d, seed=4), select(d, seed=5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_logits_are_never_chosen(bad):
    d = torch.tensor([0.0, bad, 1.0, bad, 0.5, 0.2], dtype=torch.float64)
    for indices in (fr.rejection_sample(d, 0), fr.budgeted_rejection(d, 1.0), fr.best_of_n(d, 2)):
        assert not {1, 3} & set(indices.tolist())
    assert fr.budgeted_rejection(d, 1.0).tolist() == [0, 2, 4, 5]
    nothing = torch.full((4,), bad)
    for select in (fr.rejection_sample, lambda d: fr.budgeted_rejection(d, 0.5)):
        with pytest.warns(fr.FastrefineWarning, match="accepted none of 4 proposals"):
            assert len(select(nothing)) == 0


def test_an_acceptance_near_zero_gives_a_partial_result_and_says_when_it_is_empty(recwarn):
    """FAULTS 26"""
    d = optimal_logit(proposals(20_000))
    few = fr.rejection_sample(torch.cat([d, torch.full((20,), 60.0)]), percentile=100)
    assert 0 < len(few) < 20 and (few >= 20_000).all() and not recwarn
    with pytest.warns(fr.FastrefineWarning, match="rejection_sample: accepted none of 3 proposals"):
        assert len(fr.rejection_sample(torch.tensor([-50.0, 0.0, -60.0]), percentile=100, log_m=-99.0, seed=1)) == 0
    with pytest.warns(fr.FastrefineWarning, match="budgeted_rejection: accepted none of 20000 proposals") as told:
        assert len(fr.budgeted_rejection(d, 1e-9)) == 0
    assert told[0].filename == __file__


def test_quantiles_are_those_of_torch():
    x = proposals(1001)
    for q in (0, 0.123, 0.5, 0.95, 1):
        assert selection.quantile(x, q) == pytest.approx(float(torch.quantile(x, q)), rel=1e-12)


def test_few_proposals_and_none():
    one = torch.zeros(1)
    assert fr.budgeted_rejection(one, 1.0).tolist() == [0] and fr.best_of_n(one, 1).tolist() == [0]
    assert len(fr.rejection_sample(torch.zeros(0))) == len(fr.budgeted_rejection(torch.zeros(0), 0.5)) == 0


def test_best_of_n_takes_the_highest_of_each_group():
    d = torch.randn(35, generator=torch.Generator().manual_seed(0))
    indices = fr.best_of_n(d, 4)
    assert len(indices) == 8 and (indices // 4).tolist() == list(range(8))
    assert torch.equal(d[indices], d[:32].view(8, 4).max(1).values)


def test_a_critic_is_refused_where_a_density_ratio_is_read():
    out = refiner(discriminator_output="critic", sampler=fr.Collaborative(0.1, loss="wasserstein")).sample(16)
    for select in (fr.rejection_sample, lambda out: fr.budgeted_rejection(out, 0.5)):
        with pytest.raises(fr.InputError, match="critic"):
            select(out)
    assert len(fr.best_of_n(out, 4)) == 4
    logits = dataclasses.replace(out, scale="logit")
    assert len(fr.budgeted_rejection(logits, 1.0)) == 16


@pytest.mark.parametrize(
    "call",
    [
        lambda: fr.rejection_sample(torch.zeros(3), percentile=101),
        lambda: fr.rejection_sample(torch.zeros(3), percentile="a"),
        lambda: fr.rejection_sample(torch.zeros(3), log_m=math.nan), lambda: fr.rejection_sample(torch.zeros(3, 1)),
        lambda: fr.budgeted_rejection(torch.zeros(3), 0.0), lambda: fr.budgeted_rejection(torch.zeros(3), 1.5),
        lambda: fr.best_of_n(torch.zeros(3), 4), lambda: fr.best_of_n(torch.zeros(3), 0),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_named(call):
    with pytest.raises(fr.InputError):
        call()


def test_a_million_proposals_take_no_loop():
    d = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert 240_000 < len(fr.budgeted_rejection(d, 0.25)) < 260_000
    assert 0 < len(fr.rejection_sample(d)) < 1_000_000


def test_its_numbers_are_not_those_of_the_chains():
    assert Stream.REJECTION not in (Stream.SELECTION, Stream.REFERENCE, Stream.ACCEPT)
