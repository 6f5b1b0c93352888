"""Calibration against a density ratio known in closed form: distorted logits come back."""

import math

import pytest
import torch

import fastrefine as fr
from tests.support.selection_laws import optimal_logit, p_value, proposals, samples

METHODS = ("isotonic", "platt", "beta", "temperature")
DISTORTIONS = {"scaled": lambda d: 3 * d, "shifted": lambda d: d + 0.7, "both": lambda d: 0.4 * d - 1}


@pytest.mark.parametrize("distortion", DISTORTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_can_undo_it_undoes(method, distortion):
    if method == "temperature" and distortion != "scaled":
        pytest.skip("a temperature cannot shift")
    distort = DISTORTIONS[distortion]
    real, fake = samples(20_000, 20_000)
    found = fr.calibrate(distort(real), distort(fake), method=method)
    assert not found.before.trusted and found.after.trusted
    assert found.after.brier <= found.before.brier and found.after.ece < 0.015 < found.before.ece
    new = torch.linspace(-3, 0.5, 50, dtype=torch.float64)
    error = (found(distort(new)) - new).abs()
    if method in ("platt", "temperature"):  # the truth is among their maps
        assert error.max() < 0.15
    else:
        assert error.median() < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_decrease_and_keep_shape_and_dtype(method):
    found = fr.calibrate(*samples(300, 300), method=method)
    d = torch.linspace(-40, 40, 999)
    assert (found(d).diff() >= 0).all() and found(d).isfinite().all()
    assert found(d).dtype == torch.float32 and found(d.double()).dtype == torch.float64
    odd = torch.tensor([math.nan, 0.0, math.inf, -math.inf])
    assert torch.equal(found(odd).isfinite(), odd.isfinite()) and len(found(odd[:0])) == 0


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_weigh_the_same_whatever_their_numbers(method):
    few = fr.calibrate(*samples(2_000, 30_000), method=method)
    d = torch.linspace(-2, 0.3, 20, dtype=torch.float64)
    assert (few(d) - d).abs().median() < 0.25


@pytest.mark.parametrize("method", METHODS)
def test_a_discriminator_that_prefers_generated_images_knows_nothing(method):
    real, fake = samples(2_000, 2_000)
    found = fr.calibrate(-real, -fake, method=method)
    assert found(torch.linspace(-2, 2, 9)).abs().max() < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_equal_and_separable_logits_give_finite_maps(method):
    for real, fake in ((torch.zeros(5), torch.zeros(5)), (torch.ones(5) + 3, torch.zeros(5) - 3)):
        assert fr.calibrate(real, fake, method=method)(torch.linspace(-5, 5, 11)).isfinite().all()


def test_chains_over_calibrated_logits_follow_the_data():
    x = proposals(400_000, 9)
    found = fr.calibrate(*(3 * d for d in samples(30_000, 30_000, seed=5)), method="platt")
    chosen = fr.metropolis_hastings(found(3 * optimal_logit(x)), chain_length=40, seed=1).indices
    raw = fr.metropolis_hastings(3 * optimal_logit(x), chain_length=40, seed=1).indices
    assert p_value(x[chosen]) > 1e-4 > p_value(x[raw])


def test_a_step_of_few_real_images_gets_no_endless_ratio():
    real, fake = samples(3_000, 2_903)
    highest, next_to_it = torch.tensor([9.0, 9.1, 9.2]), torch.full((100,), 8.0)
    found = fr.calibrate(torch.cat([real, highest]), torch.cat([fake, next_to_it]))(torch.tensor([20.0]))
    assert float(found) == pytest.approx(math.log(3), abs=0.01)  # three real images, and one generated that might have been
    lowest = fr.calibrate(real, torch.cat([fake, torch.tensor([-99.0])]))(torch.tensor([-200.0]))
    assert -8 < float(lowest) < -2


def test_a_critics_scores_serve_as_tensors_and_as_results():
    real, fake = samples(500, 500)
    assert fr.calibrate(5 * real + 2, 5 * fake + 2, method="platt").after.ece < 0.2


@pytest.mark.parametrize(
    "call",
    [
        lambda: fr.calibrate(torch.zeros(3), torch.zeros(3), method="magic"),
        lambda: fr.calibrate(torch.zeros(1), torch.zeros(3)),
        lambda: fr.calibrate(torch.tensor([0.0, math.nan]), torch.zeros(3)),
        lambda: fr.calibrate(torch.zeros(3, 1), torch.zeros(3)),
        lambda: fr.calibrate(torch.zeros(3), torch.ones(3))(torch.zeros(2, 2)),
    ],
)
def test_what_cannot_be_calibrated_is_named(call):
    with pytest.raises(fr.InputError):
        call()


def test_a_diagnosis_of_logits_that_are_not_finite_is_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(fr.InputError, match="finite"):
            fr.diagnose(torch.tensor([0.0, bad]), torch.zeros(3))


def test_whole_numbers_are_calibrated_as_numbers():
    found = fr.calibrate(*samples(300, 300), method="platt")
    assert torch.equal(found(torch.tensor([1, 2])), found(torch.tensor([1.0, 2.0], dtype=torch.float64)))
