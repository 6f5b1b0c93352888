"""Metrics against closed forms: Gaussians with known distance, distributions with known score."""

import math

import numpy as np
import pytest
import torch

from fastrefine import metrics
from fastrefine.errors import InputError
from fastrefine.metrics import classifier_score, covered, frechet_distance, frechet_standard_error, kernel_distance


def whitened(n: int, features: int, seed: int = 0) -> np.ndarray:
    """(n, features) with mean exactly 0 and covariance exactly the identity."""
    x = np.random.RandomState(seed).standard_normal((n, features))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = np.random.RandomState(1).standard_normal((300, 7))
    assert frechet_distance(x, x) < 1e-9
    assert frechet_distance(x, x[::-1]) < 1e-9


def test_frechet_distance_of_a_shift_is_its_squared_length():
    x, shift = whitened(400, 5), np.array([1.0, -2.0, 0.0, 3.0, 0.5])
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    x, scale_a, scale_b = whitened(500, 4), np.array([1.0, 2.0, 0.1, 5.0]), np.array([3.0, 0.5, 0.1, 1.0])
    assert frechet_distance(x * scale_a, x * scale_b) == pytest.approx(((scale_a - scale_b) ** 2).sum(), rel=1e-9)


def test_frechet_distance_of_general_covariances_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.RandomState(2)
    a = random.standard_normal((200, 6)) @ random.standard_normal((6, 6))
    b = random.standard_normal((150, 6)) @ random.standard_normal((6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    mean = a.mean(0) - b.mean(0)
    expected = mean @ mean + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    rotation = np.linalg.qr(random.standard_normal((6, 6)))[0]
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_finite_and_not_negative_for_singular_covariances():
    x = np.random.RandomState(3).standard_normal((10, 40))
    x[:, 5] = 0
    assert 0 <= frechet_distance(x, x) < 1e-6
    assert math.isfinite(frechet_distance(x, x[:4] + 1))


def test_frechet_distance_takes_tensors_one_feature_and_float32():
    x = torch.tensor([[0.0], [2.0]])
    assert frechet_distance(x, x + 3) == pytest.approx(9)
    twice = frechet_distance(x.requires_grad_(), 2 * x)  # means 1 and 2, deviations sqrt 2 and 2 sqrt 2
    assert twice == pytest.approx(1 + 2)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), "wanted equal"),
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2"),
        (np.zeros(5), np.zeros((5, 1)), "features_a"),
        (np.zeros((5, 2)), np.full((5, 2), np.nan), "not finite"),
    ],
)
def test_frechet_distance_refuses(a, b, words):
    with pytest.raises(InputError, match=words):
        frechet_distance(a, b)


def test_classifier_score_is_one_when_all_rows_are_the_same():
    assert classifier_score(np.full((20, 10), 0.1)) == pytest.approx(1)
    assert classifier_score(np.tile([0.7, 0.2, 0.1], (5, 1))) == pytest.approx(1)


def test_classifier_score_is_the_number_of_classes_when_rows_are_sure_and_balanced():
    assert classifier_score(np.eye(10).repeat(3, 0)) == pytest.approx(10)
    assert classifier_score(torch.eye(4)) == pytest.approx(4)


def test_classifier_score_of_sure_rows_is_the_exponential_of_the_entropy_of_the_classes():
    p = np.eye(3)[[0, 0, 1, 2]]  # shares 1/2, 1/4, 1/4: entropy 1.5 log 2
    assert classifier_score(p) == pytest.approx(2**1.5)


def test_classifier_score_is_the_written_formula():
    p = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)
    marginal = p.mean(0)
    assert classifier_score(p) == pytest.approx(float((p * (p / marginal).log()).sum(1).mean().exp()), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.randn(5, 10), "softmax"),
        (np.full((5, 10), 0.2), "softmax"),
        (np.zeros((0, 10)), "no rows"),
        (np.full((2, 2), np.inf), "not finite"),
        (np.ones(3), "shape"),
    ],
)
def test_classifier_score_refuses(values, words):
    with pytest.raises(InputError, match=words):
        classifier_score(values)


def test_the_standard_error_of_the_distance_is_its_spread_over_samples():
    random = np.random.RandomState(0)
    y = 1.2 * random.standard_normal((400, 5)) + 0.3
    samples = [random.standard_normal((200, 5)) for _ in range(60)]
    spread = np.std([frechet_distance(x, y) for x in samples])
    assert np.mean([frechet_standard_error(x, y, 20) for x in samples[:10]]) == pytest.approx(spread, rel=0.3)
    assert frechet_standard_error(samples[0], y) == frechet_standard_error(samples[0], y)


def test_the_standard_error_of_a_difference_is_that_of_paired_rows():
    random = np.random.RandomState(0)
    y = 1.2 * random.standard_normal((400, 5)) + 0.3
    samples = [random.standard_normal((200, 5)) for _ in range(60)]
    differences = [frechet_distance(x, y) - frechet_distance(1.05 * x, y) for x in samples]
    found = [frechet_standard_error(x, y, 20, paired=1.05 * x) for x in samples[:10]]
    assert np.mean(found) == pytest.approx(np.std(differences), rel=0.3)
    assert np.mean(found) < 0.3 * frechet_standard_error(samples[0], y)
    assert frechet_standard_error(samples[0], y, paired=samples[0]) == 0
    with pytest.raises(InputError, match=r"paired has shape \(199, 5\), features \(200, 5\)"):
        frechet_standard_error(samples[0], y, paired=samples[0][1:])


def test_kernel_distance_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.kid")
    random = np.random.RandomState(0)
    a, b = random.standard_normal((600, 6)), random.standard_normal((500, 6)) * 1.3 + 0.4
    network = torch.nn.Identity()
    network.num_features = 6
    theirs = image.KernelInceptionDistance(feature=network, subsets=100, subset_size=200)
    theirs.update(torch.from_numpy(a), real=True)
    theirs.update(torch.from_numpy(b), real=False)
    mean, _ = theirs.compute()
    found = kernel_distance(a, b, subset_size=200)
    assert found.value == pytest.approx(float(mean), rel=0.1)
    assert abs(found.value - kernel_distance(b, a, subset_size=200, seed=1).value) < 3 * found.standard_error


def test_kernel_distance_is_unbiased_and_its_standard_error_is_its_spread_over_samples():
    random = np.random.RandomState(0)
    pairs = [(random.standard_normal((100, 4)), random.standard_normal((100, 4))) for _ in range(60)]
    values = np.array([kernel_distance(a, b, subsets=20).value for a, b in pairs])  # 1000, the usual subset, is the whole set
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)
    # as if other images of one generator were judged by the same real ones; of equal distributions it is on the safe side
    for shift, n, most in ((0.0, 200, 2.0), (0.8, 200, 1.35), (0.8, 800, 1.35)):
        y = random.standard_normal((150, 4))
        found = [kernel_distance(random.standard_normal((n, 4)) + shift, y, subsets=40) for _ in range(40)]
        spread = np.std([one.value for one in found], ddof=1)
        assert 0.65 * spread < np.mean([one.standard_error for one in found]) < most * spread, (shift, n)


def test_the_bootstrap_of_many_rows_scales_what_it_finds_in_some(monkeypatch):
    random = np.random.RandomState(0)
    a, b = random.standard_normal((900, 4)) + 0.8, random.standard_normal((300, 4))
    whole = kernel_distance(a, b).standard_error
    monkeypatch.setattr(metrics, "RESAMPLED", 300)
    assert kernel_distance(a, b).standard_error == pytest.approx(whole, rel=0.35)


def test_covered_counts_what_lies_within_the_reach_of_a_neighbour():
    line = np.arange(10.0)[:, None]
    assert covered([[4.0], [4.4], [12.0], [12.1]], line, neighbours=3).tolist() == [True, True, True, False]
    x, y = (np.random.RandomState(seed).standard_normal((200, 3)) for seed in (0, 1))
    plain, moved = (covered(x + offset, y + offset) for offset in (0.0, 500.0))
    assert np.array_equal(plain, moved) and 0.5 < plain.mean() < 1
    with pytest.raises(InputError, match="manifold has 3 rows; wanted more than neighbours=3"):
        covered(x, y[:3])
