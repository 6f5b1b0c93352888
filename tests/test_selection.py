"""Metropolis-Hastings selection and calibration against laws known in closed form."""

import math

import pytest
import torch
from scipy import stats

import fastrefine as fr
from fastrefine.noise import Stream, uniform
from tests.support.selection_laws import ALPHA, M, S, optimal_logit, p_value, proposals


def variance_p_value(x):
    q = float((((x - M) / S) ** 2).sum())
    tail = stats.chi2(len(x)).cdf(q)
    return 2 * min(tail, 1 - tail)


def select(x, logits, length, **options):
    return x[fr.metropolis_hastings(logits, chain_length=length, **options).indices]


def test_chain_ends_follow_the_data_law():
    # total variation to the data law is at most (1 - exp(-SUP))^30 = 1e-9
    length, chains = 31, 20_000
    x = proposals(chains * length)
    chosen = select(x, optimal_logit(x), length)
    assert p_value(chosen) > ALPHA and variance_p_value(chosen) > ALPHA


@pytest.mark.parametrize("mutant", ["probability ratio", "chain too short", "scaled logits"])
def test_mutants_of_the_chain_are_rejected(mutant):
    length = 4 if mutant == "chain too short" else 31
    x = proposals(20_000 * length)
    d = optimal_logit(x)
    d = {"probability ratio": torch.nn.functional.logsigmoid(d), "scaled logits": 0.9 * d}.get(mutant, d)
    chosen = select(x, d, length)
    assert min(p_value(chosen), variance_p_value(chosen)) < ALPHA


# Three states: proposed with Q, data P, so that the density ratio is at most 4.5 and a chain's law is a power of a matrix.
Q, P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.tensor([0.25, 0.3, 0.45], dtype=torch.float64)


def law_after(tests):
    ratio = P / Q
    accept = (ratio[None, :] / ratio[:, None]).clamp(max=1) * Q[None, :]
    move = accept + torch.diag(1 - accept.sum(1))
    return Q @ torch.linalg.matrix_power(move, tests)


@pytest.mark.parametrize("tests", [0, 1, 2, 5, 12])
def test_chains_of_any_length_have_their_exact_law_which_is_within_the_bound(tests):
    chains = 100_000
    state = torch.multinomial(Q, chains * (tests + 1), replacement=True, generator=torch.Generator().manual_seed(tests))
    found = state[fr.metropolis_hastings((P / Q).log()[state], tests + 1, seed=7).indices].bincount(minlength=3)

    def p_value_of(law):
        return stats.chisquare(found.numpy(), (chains * law).numpy()).pvalue

    assert p_value_of(law_after(tests)) > ALPHA
    if tests < 12:
        assert p_value_of(law_after(tests + 1)) < ALPHA, "the test can fail"
    distance = 0.5 * float((law_after(tests) - P).abs().sum())
    assert distance <= (1 - 1 / 4.5) ** tests * (1 + 1e-9)
    noise = 4 * math.sqrt(3 / chains)
    assert 0.5 * float((found / chains - P).abs().sum()) <= (1 - 1 / 4.5) ** tests + noise


def test_chains_that_start_from_real_logits_follow_the_data_law_at_once():
    # a chain started in its stationary law stays there; those that never moved are flagged and left out of the law
    length, chains = 31, 20_000
    x, real = proposals(chains * length, 1), M + S * proposals(50_000, 2)
    result = fr.metropolis_hastings(optimal_logit(x), length, initial_logits=optimal_logit(real))
    assert result.moved.double().mean() > 0.999
    assert p_value(x[result.indices[result.moved]]) > ALPHA


def test_acceptance_rate_is_that_of_a_plain_loop():
    x = optimal_logit(proposals(40 * 20))
    result = fr.metropolis_hastings(x, 20, seed=3)
    accepted, indices, moved = 0, [], []
    for chain in range(40):
        at, here = chain * 20, 0
        for k in range(1, 20):
            u = uniform(3, torch.tensor([chain]), torch.tensor([k]), 1, Stream.SELECTION)[0, 0]
            if math.log(u) < x[chain * 20 + k] - x[at]:
                at, here = chain * 20 + k, here + 1
        accepted += here
        indices.append(at)
        moved.append(here > 0)
    assert result.indices.tolist() == indices and result.moved.tolist() == moved
    assert result.acceptance_rate == pytest.approx(accepted / (40 * 19))


def test_a_chain_that_never_moves_takes_its_first_proposal_and_is_flagged():
    with pytest.warns(fr.FastrefineWarning, match="0 of 3 chains moved in 20 proposals") as told:
        result = fr.metropolis_hastings(torch.full((60,), -1e6), 20, initial_logits=torch.tensor([1e6]))
    assert len(told) == 1 and told[0].filename == __file__
    assert result.indices.tolist() == [0, 20, 40] and not result.moved.any() and result.acceptance_rate == 0


def test_logits_far_from_zero_do_not_overflow_and_nonfinite_ones_are_never_chosen():
    logits = torch.tensor([5000.0, 5001.0, math.nan, math.inf, -math.inf, 4990.0] * 10)
    result = fr.metropolis_hastings(logits, 6)
    assert torch.isfinite(logits[result.indices]).all()


def test_chains_without_a_test_are_not_said_to_be_stuck(recwarn):
    assert fr.metropolis_hastings(torch.zeros(5), 1).indices.tolist() == [0, 1, 2, 3, 4]
    assert not recwarn


def test_left_over_proposals_are_unused_and_bad_input_is_named():
    assert len(fr.metropolis_hastings(torch.randn(59), 20).indices) == 2
    with pytest.raises(fr.InputError, match="do not make one chain of 20"):
        fr.metropolis_hastings(torch.randn(19), 20)
    with pytest.raises(fr.InputError, match="shape"):
        fr.metropolis_hastings(torch.randn(20, 2), 20)
    with pytest.raises(fr.InputError, match="chain_length"):
        fr.metropolis_hastings(torch.randn(20), 0)


def test_diagnosis_of_a_calibrated_discriminator():
    x, real = proposals(50_000, 3), M + S * proposals(50_000, 4)
    found = fr.diagnose(optimal_logit(real), optimal_logit(x))
    assert abs(found.z) < stats.norm.isf(ALPHA / 2)
    assert found.ece < 0.01
    assert found.brier == pytest.approx(found.reliability - found.resolution + found.uncertainty, abs=2e-3)


@pytest.mark.parametrize("distort", [lambda d: d + 0.3, lambda d: 3 * d])
def test_diagnosis_tells_a_miscalibrated_discriminator(distort):
    x, real = proposals(50_000, 3), M + S * proposals(50_000, 4)
    good = fr.diagnose(optimal_logit(real), optimal_logit(x))
    bad = fr.diagnose(distort(optimal_logit(real)), distort(optimal_logit(x)))
    assert bad.ece > 3 * good.ece and bad.brier > good.brier
    assert abs(bad.z) > 4


def test_diagnosis_of_values_worked_out_by_hand():
    found = fr.diagnose(torch.tensor([math.log(3)]), torch.tensor([-math.log(3)]))  # p = 3/4 and 1/4
    assert found.brier == pytest.approx(1 / 16)
    assert found.z == pytest.approx(0)
    assert found.ece == pytest.approx(1 / 4) and found.mce == pytest.approx(1 / 4)
    assert found.reliability == pytest.approx(1 / 16) and found.resolution == pytest.approx(1 / 4)
    assert found.uncertainty == pytest.approx(1 / 4)


def test_results_of_a_critic_are_refused_with_advice():
    g, d = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    one = fr.Refiner(
        g,
        d,
        fr.Collaborative(0.1, "wasserstein"),
        prior=fr.Normal(2),
        max_steps=1,
        num_slots=4,
        discriminator_output="critic",
    )
    out = one.sample(40)
    for call in (lambda: fr.metropolis_hastings(out), lambda: fr.diagnose(out, out)):
        with pytest.raises(fr.InputError, match="critic; calibrate"):
            call()
    assert len(fr.metropolis_hastings(out.logits).indices) == 2
