"""How far a discriminator may be trusted as a density ratio, and maps that make its logits more trustworthy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.result import Result
from fastrefine.samplers.base import check_choice
from fastrefine.selection import logits_of

_Map = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Diagnosis:
    """Calibration of s(d) as the probability of being real, on as many real as generated images as were given.

    brier: mean squared error of the probability, 0 best (Brier 1950) = reliability - resolution + uncertainty up to the
    spread within bins (Murphy 1973). z: sum(y - p) / sqrt(sum p (1 - p)), standard normal when calibrated ([MHGAN] 3.2).
    ece, mce: mean (weighted) and largest |mean p - share of real| over equal-width bins (Guo et al. 2017).
    """

    brier: float
    z: float
    ece: float
    mce: float
    reliability: float
    resolution: float
    uncertainty: float
    num_real: int
    num_fake: int

    @property
    def trusted(self) -> bool:
        """Whether exp(d) may be read as a density ratio: |z| at most 3 and ece at most 0.05, on this many images."""
        return abs(self.z) <= 3 and self.ece <= 0.05


def diagnose(real_logits: Tensor | Result, fake_logits: Tensor | Result, *, bins: int = 10) -> Diagnosis:
    """Diagnose logits (N,) of real and (M,) of generated images; use held-out real images and equal counts.

    Raises InputError for empty or non-finite logits, and for the scores of a critic.
    """
    checks.count("bins", bins, 1)
    real, fake = logits_of(real_logits, "diagnose"), logits_of(fake_logits, "diagnose").to("cpu")
    real = real.to("cpu")
    if not len(real) or not len(fake):
        raise InputError(f"diagnose wants real and generated logits, got {len(real)} and {len(fake)}")
    p = torch.sigmoid(torch.cat([real, fake]))
    if not bool(torch.isfinite(p).all()):
        raise InputError("diagnose wants logits without NaN")
    y = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    which = (p * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, which, torch.ones_like(p))
    mean_p = torch.zeros(bins, dtype=torch.float64).index_add(0, which, p) / count.clamp(min=1)
    mean_y = torch.zeros(bins, dtype=torch.float64).index_add(0, which, y) / count.clamp(min=1)
    weight, gap, base = count / len(p), (mean_p - mean_y).abs(), y.mean()
    variance = float((p * (1 - p)).sum())
    excess = float((y - p).sum())
    return Diagnosis(
        brier=float(((p - y) ** 2).mean()),
        z=excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0,
        ece=float((weight * gap).sum()),
        mce=float(gap.max()),
        reliability=float((weight * gap**2).sum()),
        resolution=float((weight * (mean_y - base) ** 2).sum()),
        uncertainty=float(base * (1 - base)),
        num_real=len(real),
        num_fake=len(fake),
    )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Logits (n,) -> calibrated logits (n,), monotone; what ``calibrate`` returns.

    before, after: diagnosis of the logits that were given, and of the same calibrated by a map fitted on the other half of
    them: what to expect on new images. Non-finite logits stay as they are.
    """

    method: str
    before: Diagnosis
    after: Diagnosis
    _apply: _Map = field(repr=False)

    def __call__(self, logits: Tensor | Result) -> Tensor:
        d = torch.as_tensor(logits.logits if isinstance(logits, Result) else logits).detach()
        if d.dim() != 1:
            raise InputError(f"a calibration wants logits of shape (N,), got {tuple(d.shape)}")
        known = torch.isfinite(d)
        found = d.clone()
        found[known] = torch.from_numpy(self._apply(d[known].double().cpu().numpy())).to(d)
        return found


def calibrate(real_logits: Tensor | Result, fake_logits: Tensor | Result, method: str = "isotonic") -> Calibration:
    """Fit a map of logits after which exp(d) is nearer to the density ratio of real to generated images ([MHGAN] 3.2).

    real_logits (N,), fake_logits (M,): two or more each, of images that D was not trained on; also a critic's scores, as
    tensors. Both sides weigh the same, whatever N and M. With s the sigmoid:

    "temperature"  w d, w >= 0 (Guo et al. 2017)      "platt"  w d + b, w >= 0 (Platt 1999)
    "beta"         a log s(d) - b log(1 - s(d)) + c, a, b >= 0 (Kull et al. 2017)
    "isotonic"     the best non-decreasing step function (Zadrozny & Elkan 2002), with probabilities 1 / (N + M) from 0 and 1

    Raises InputError for fewer, for non-finite logits and for another method.
    """
    check_choice("method", method, tuple(_FITS))
    given = [
        torch.as_tensor(x.logits if isinstance(x, Result) else x).detach().double().cpu() for x in (real_logits, fake_logits)
    ]
    if any(x.dim() != 1 or len(x) < 2 or not bool(torch.isfinite(x).all()) for x in given):
        raise InputError("calibrate wants two or more finite logits (N,) of real and of generated images")
    halves = [[x[0::2].numpy() for x in given], [x[1::2].numpy() for x in given]]
    maps = [_FITS[method](*half) for half in halves]
    crossed = [np.concatenate([maps[1](halves[0][k]), maps[0](halves[1][k])]) for k in range(2)]
    after = diagnose(torch.from_numpy(crossed[0]), torch.from_numpy(crossed[1]))
    return Calibration(method, diagnose(*given), after, _FITS[method](given[0].numpy(), given[1].numpy()))


def _training(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, targets, weights); both sides weigh half."""
    y = np.concatenate([np.ones(len(real)), np.zeros(len(fake))])
    w = np.concatenate([np.full(len(real), 0.5 / len(real)), np.full(len(fake), 0.5 / len(fake))])
    return np.concatenate([real, fake]), y, w * len(y)


def _logistic(columns: Callable[[np.ndarray], list[np.ndarray]], real: np.ndarray, fake: np.ndarray, intercept: bool) -> _Map:
    """Logistic regression on columns of the logits, with weights that are not negative: such a column is left out."""
    from sklearn.linear_model import LogisticRegression

    d, y, w = _training(real, fake)
    every, kept = columns(d), list(range(len(columns(d[:1]))))
    while kept:
        fit = LogisticRegression(C=1e6, fit_intercept=intercept, tol=1e-8, max_iter=1000)
        fit.fit(np.stack([every[k] for k in kept], 1), y, sample_weight=w)
        slopes = fit.coef_[0]
        if (slopes >= 0).all():
            constant = float(fit.intercept_[0]) if intercept else 0.0
            return lambda x: sum((s * columns(x)[k] for s, k in zip(slopes, kept, strict=True)), np.zeros_like(x)) + constant
        kept.pop(int(slopes.argmin()))
    return np.zeros_like  # nothing speaks for higher logits: it knows nothing


def _isotonic(real: np.ndarray, fake: np.ndarray) -> _Map:
    from sklearn.isotonic import IsotonicRegression

    d, y, w = _training(real, fake)
    least = 1 / len(d)
    fit = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(d, y, sample_weight=w)

    def apply(x: np.ndarray) -> np.ndarray:
        if not len(x):
            return x
        p = fit.predict(x)
        return np.log(p) - np.log1p(-p)

    return apply


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


_FITS: dict[str, Callable[[np.ndarray, np.ndarray], _Map]] = {
    "isotonic": _isotonic,
    "platt": lambda real, fake: _logistic(lambda x: [x], real, fake, True),
    "beta": lambda real, fake: _logistic(lambda x: [-_softplus(-x), _softplus(x)], real, fake, True),
    "temperature": lambda real, fake: _logistic(lambda x: [x], real, fake, False),
}
