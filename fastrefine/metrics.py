"""Quality of samples, measured on the features and class probabilities of a classifier.

With the original Inception-v3 these are FID, IS and KID. Values depend on the classifier: compare only figures of the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastrefine.checks import count
from fastrefine.errors import InputError

NEIGHBOURS = 3  # of precision and recall (Kynkaanniemi et al. 2019)
BLOCK = 500  # rows of a matrix of distances at once
RESAMPLED = 2000  # rows of a set at most, in the bootstrap of the kernel distance


def _silent() -> None:
    """Tell nobody."""


def frechet_distance(features_a: ArrayLike | torch.Tensor, features_b: ArrayLike | torch.Tensor) -> float:
    """Frechet (2-Wasserstein) distance, squared, between Gaussians fitted to two sets of features [Heusel et al. 2017].

    ``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, covariances over N - 1, in float64: what FID reports. features_a:
    (N, F), features_b: (M, F); lower is better, 0 for equal moments. It is biased upwards by O(1/N): compare sets of one size.
    The trace is taken as ``tr (S C_b S)^(1/2)`` with ``S = C_a^(1/2)``: both roots are of symmetric matrices, so singular
    covariances (N <= F, dead features) do no harm.

    Raises InputError where a set is not a finite (N, F) array with N >= 2, or where the two F differ.
    """
    a, b = _two_sets(2, features_a=features_a, features_b=features_b)
    moments = _moments(a)
    return _distance(moments, _root(moments[1]), _moments(b))


def frechet_standard_error(
    features: ArrayLike | torch.Tensor, reference: ArrayLike | torch.Tensor, resamples: int = 50, seed: int = 0, *,
    paired: ArrayLike | torch.Tensor | None = None, tick: Callable[[], None] = _silent,
) -> float:  # fmt: skip
    """Standard error of ``frechet_distance(features, reference)``: its deviation over bootstrap samples of ``features``.

    features: (N, F), reference: (M, F), which is held as it is. So it tells how far the distance would be from this one for N
    other samples of the same generator. It does not tell of the bias, which is O(1/N). resamples: at least 2. paired: (N, F),
    rows that belong to those of ``features``, for example of the same latents before refinement; then the standard error is
    that of the difference of the two distances, which is far smaller where the rows are alike. tick: called after each sample.

    Example: ``frechet_standard_error(torch.randn(500, 8), torch.randn(500, 8))  # about 0.01``

    Raises InputError as ``frechet_distance`` does, and where ``paired`` has another shape than ``features``.
    """
    if paired is not None:
        features, paired = _rows(features, "features"), _rows(paired, "paired")
        if paired.shape != features.shape:
            raise InputError(f"paired has shape {paired.shape}, features {features.shape}; wanted equal ones")
    draws = frechet_draws(features, reference, resamples, seed, tick=tick)
    if paired is not None:
        draws = draws - frechet_draws(paired, reference, resamples, seed, tick=tick)
    return float(np.std(draws, ddof=1))


def frechet_draws(
    features: ArrayLike | torch.Tensor, reference: ArrayLike | torch.Tensor, resamples: int = 50, seed: int = 0, *,
    tick: Callable[[], None] = _silent,
) -> np.ndarray:  # fmt: skip
    """(resamples,) Frechet distances of bootstrap samples of ``features``: the same rows for sets of equal number."""
    x, fixed = _two_sets(2, features=features, reference=reference)
    random, moments = np.random.RandomState(seed), _moments(fixed)
    root, found = _root(moments[1]), []
    for _ in range(count("resamples", resamples, 2)):
        found.append(_distance(moments, root, _moments(x[random.randint(len(x), size=len(x))])))
        tick()
    return np.array(found)


class KernelDistance(NamedTuple):
    """A kernel distance. value: (lower is better, 0 on average for one distribution); standard_error: of it."""

    value: float
    standard_error: float


def kernel_distance(
    features_a: ArrayLike | torch.Tensor, features_b: ArrayLike | torch.Tensor, subset_size: int = 1000, subsets: int = 100,
    resamples: int = 50, seed: int = 0, *, tick: Callable[[], None] = _silent,
) -> KernelDistance:  # fmt: skip
    """Squared maximum mean discrepancy under the kernel ``(x.y / F + 1)^3``, unbiased: KID [Binkowski et al. 2018].

    features_a: (N, F), features_b: (M, F). The value is the mean over ``subsets`` random subsets of ``subset_size`` rows of
    each set, at most half of the smaller set. The standard error is the deviation over ``resamples`` bootstrap samples of
    features_a, with features_b held as it is, as for ``frechet_standard_error``; that of the mean over the subsets is added.
    The bootstrap computes with 2,000 rows of each set at most, and scales what it finds. Computed in float64. tick: called
    after each subset.

    Example: ``kernel_distance(torch.randn(500, 8), torch.randn(500, 8)).value  # about 0``

    Raises InputError where a set is not a finite (N, F) array with N >= 4, or where the two F differ.
    """
    a, b = _two_sets(4, features_a=features_a, features_b=features_b)
    n = min(len(a), len(b))
    size, random = min(count("subset_size", subset_size, 2), n // 2), np.random.RandomState(seed)
    found = []
    for _ in range(count("subsets", subsets, 2)):
        x, y = (set_[random.choice(len(set_), size, replace=False)] for set_ in (a, b))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        found.append(within - 2 * _kernel(x, y).mean())
        tick()
    of_subsets = float(np.var(found, ddof=1)) / subsets
    return KernelDistance(float(np.mean(found)), float(np.sqrt(_resampled_variance(a, b, resamples, random) + of_subsets)))


def _resampled_variance(a: np.ndarray, b: np.ndarray, resamples: int, random: np.random.RandomState) -> float:
    """Variance of the kernel distance of ``a`` (N, F) and ``b`` (M, F) over bootstrap samples of the rows of ``a``."""
    x, y = (set_[random.permutation(len(set_))[:RESAMPLED]] for set_ in (a, b))
    n = len(x)
    within, between = _kernel(x, x), _kernel(x, y).mean(1)
    np.fill_diagonal(within, 0)  # a row that is drawn twice is no pair
    weights = random.multinomial(n, np.full(n, 1 / n), size=count("resamples", resamples, 2)).astype(np.float64)
    draws = ((weights @ within) * weights).sum(1) / (n * (n - 1)) - 2 * (weights @ between) / n
    return float(np.var(draws, ddof=1)) * n / len(a)


def covered(
    features: ArrayLike | torch.Tensor, manifold: ArrayLike | torch.Tensor, neighbours: int = NEIGHBOURS, *,
    tick: Callable[[], None] = _silent,
) -> np.ndarray:  # fmt: skip
    """Which features lie nearer to some point of ``manifold`` than its ``neighbours``-th neighbour there: (N,) bool.

    features: (N, F), manifold: (M, F) with M > neighbours. Of generated images against real ones the share is the precision;
    of real ones against generated ones the recall [Kynkaanniemi et al. 2019]. tick: called after each BLOCK rows of either.

    Example: ``precision, recall = covered(fake, real).mean(), covered(real, fake).mean()``

    Raises InputError where a set is not a finite (N, F) array, where the two F differ, or where M is too small.
    """
    x, y = _two_sets(1, features=features, manifold=manifold)
    if len(y) <= neighbours:
        raise InputError(f"manifold has {len(y)} rows; wanted more than neighbours={neighbours}")
    offset = y.mean(0)  # without it a large common offset would cost cdist its precision
    points, centres = (torch.from_numpy((part - offset).astype(np.float32)) for part in (x, y))
    radii, inside = [], []
    for part in centres.split(BLOCK):
        radii.append(torch.cdist(part, centres).kthvalue(neighbours + 1).values)  # the nearest is the point itself
        tick()
    radius = torch.cat(radii)
    for part in points.split(BLOCK):
        inside.append((torch.cdist(part, centres) <= radius).any(1))
        tick()
    return torch.cat(inside).numpy()


def classifier_score(probabilities: ArrayLike | torch.Tensor) -> float:
    """Inception-score formula ``exp(E_x KL(p(y|x) || p(y)))`` on given class probabilities [Salimans et al. 2016].

    probabilities: (N, C), each row a distribution over classes. Higher is better, from 1 (all rows equal) to C (each row
    certain, classes in equal shares). p(y) is the mean over all N rows: one split, not ten. Computed in float64.

    Raises InputError where the rows are not finite, not in [0, 1], or do not sum to 1 within 1e-3 (logits, say).
    """
    p = _rows(probabilities, "probabilities")
    if not len(p):
        raise InputError("classifier_score: got no rows; wanted (N, C) with N >= 1")
    if p.min() < 0 or p.max() > 1 + 1e-3 or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise InputError("classifier_score: rows are not in [0, 1] with sum 1; take the softmax of logits first")
    marginal = p.mean(0)
    log_p = np.log(p, out=np.zeros_like(p), where=p > 0)  # 0 log 0 = 0
    log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
    return float(np.exp((p * (log_p - log_marginal)).sum(1).mean()))


Moments = tuple[np.ndarray, np.ndarray]  # mean (F,), covariance (F, F)


def _moments(x: np.ndarray) -> Moments:
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _distance(a: Moments, root_a: np.ndarray, b: Moments) -> float:
    difference = a[0] - b[0]
    cross = np.linalg.eigvalsh(root_a @ b[1] @ root_a).clip(min=0)
    distance = difference @ difference + np.trace(a[1]) + np.trace(b[1]) - 2 * np.sqrt(cross).sum()
    return max(float(distance), 0.0)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _two_sets(least: int, **sets: Any) -> tuple[np.ndarray, np.ndarray]:
    (name_a, a), (name_b, b) = ((name, _rows(values, name)) for name, values in sets.items())
    if a.shape[1] != b.shape[1]:
        raise InputError(f"{name_a} has {a.shape[1]} columns, {name_b} {b.shape[1]}: wanted equal")
    if min(len(a), len(b)) < least:
        raise InputError(f"{name_a} has {len(a)} rows and {name_b} {len(b)}; wanted at least {least} of each")
    return a, b


def _rows(values: ArrayLike | torch.Tensor, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    try:
        array = np.asarray(values, np.float64)
    except (ValueError, TypeError) as error:  # rows of different lengths, words
        raise InputError(f"{name}: no array of numbers ({error}); wanted (N, features)") from error
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{name}: got shape {array.shape}; wanted (N, features)")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: {int((~np.isfinite(array)).any(1).sum())} of {len(array)} rows are not finite")
    return array
