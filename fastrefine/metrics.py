"""Quality of samples, measured on the features and class probabilities of a classifier.

With the original Inception-v3 these are FID and IS. Values depend on the classifier: compare only figures of the same one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastrefine.errors import InputError


def frechet_distance(features_a: ArrayLike | torch.Tensor, features_b: ArrayLike | torch.Tensor) -> float:
    """Frechet (2-Wasserstein) distance, squared, between Gaussians fitted to two sets of features [Heusel et al. 2017].

    ``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, covariances over N - 1, in float64: what FID reports. features_a:
    (N, F), features_b: (M, F); lower is better, 0 for equal moments. It is biased upwards by O(1/N): compare sets of one size.
    The trace is taken as ``tr (S C_b S)^(1/2)`` with ``S = C_a^(1/2)``: both roots are of symmetric matrices, so singular
    covariances (N <= F, dead features) do no harm.

    Raises InputError where a set is not a finite (N, F) array with N >= 2, or where the two F differ.
    """
    a, b = _rows(features_a, "features_a"), _rows(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features_a has {a.shape[1]} columns, features_b {b.shape[1]}: wanted equal")
    if min(len(a), len(b)) < 2:
        raise InputError(f"frechet_distance: got {len(a)} and {len(b)} rows; a covariance needs at least 2")
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()
    return max(float(distance), 0.0)


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


def _rows(values: ArrayLike | torch.Tensor, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{name}: got shape {array.shape}; wanted (N, features)")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: {int((~np.isfinite(array)).any(1).sum())} of {len(array)} rows are not finite")
    return array
