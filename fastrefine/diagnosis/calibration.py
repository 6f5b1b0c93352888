"""How far a discriminator may be trusted as a density ratio, and maps that make its logits more trustworthy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import FastrefineWarning, InputError
from fastrefine.result import Result

TOLERANCE = 0.05  # of the calibration error: the density ratio off by a fifth where D is undecided
BOUNDED = 2000  # images, as many as z is judged on at most: a bias of 0.03 in the mean probability, however many there are

_Map = Callable[[np.ndarray], np.ndarray]


def logits_of(logits: Tensor | Result, what: str) -> Tensor:
    """(N,) float64 logits of a tensor, taken as logits, or of a result; InputError for a critic's scale."""
    if isinstance(logits, Result):
        if logits.scale == "critic":
            raise InputError(
                f"{what} needs logits of a probability, but the result comes from a Wasserstein critic; calibrate its "
                "scores and pass them as a tensor"
            )
        logits = logits.logits
    found = torch.as_tensor(logits).detach().double()
    if found.dim() != 1:
        raise InputError(f"{what} wants logits of shape (N,), got {tuple(found.shape)}")
    return found


@dataclass(frozen=True)
class Diagnosis:
    """Calibration of s(d) as the probability of being real; real and generated images weigh the same, whatever their numbers.

    brier: mean squared error of the probability, 0 best (Brier 1950) = reliability - resolution + uncertainty up to the
    spread within bins (Murphy 1973). z: sum(y - p) / sqrt(sum p (1 - p)) at equal numbers ([MHGAN] 3.2); its spread is at
    most 1 when calibrated, and it grows with the root of the numbers when not.
    ece, mce: mean (weighted) and largest |mean p - share of real| over equal-width bins (Guo et al. 2017).
    calibration_error: root of the reliability without what chance adds to it (Kumar et al. 2019), 0 where chance explains it.
    bin_predicted, bin_share: (bins,) mean p and share of real, NaN in empty bins. bin_real, bin_fake: (bins,) images.
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
    calibration_error: float
    bin_predicted: np.ndarray = field(repr=False, compare=False)
    bin_share: np.ndarray = field(repr=False, compare=False)
    bin_real: np.ndarray = field(repr=False, compare=False)
    bin_fake: np.ndarray = field(repr=False, compare=False)

    @property
    def trusted(self) -> bool:
        """Whether exp(d) may be read as a density ratio: by the size of what is wrong, not by its significance.

        calibration_error at most 0.05, and |z| at most 3, z being scaled down to that of 2000 images where there are more:
        a bound on z itself would refuse any bias, however small, on enough images, and one on ece any D on few. Below about
        200 images a side chance has its say.
        """
        effective = 4 / (1 / self.num_real + 1 / self.num_fake)
        return abs(self.z) * math.sqrt(min(1, BOUNDED / effective)) <= 3 and self.calibration_error <= TOLERANCE


def diagnose(real_logits: Tensor | Result, fake_logits: Tensor | Result, *, bins: int = 10) -> Diagnosis:
    """Diagnose logits (N,) of real and (M,) of generated images; use real images that D was not trained on.

    Raises InputError for empty or non-finite logits, and for the scores of a critic.
    """
    checks.count("bins", bins, 1)
    real, fake = (logits_of(x, "diagnose").to("cpu") for x in (real_logits, fake_logits))
    return _diagnose(real, fake, torch.ones_like(real), torch.ones_like(fake), bins)


def _diagnose(real: Tensor, fake: Tensor, real_weight: Tensor, fake_weight: Tensor, bins: int = 10) -> Diagnosis:
    """Each side's weights are scaled to a sum of one half."""
    if not len(real) or not len(fake):
        raise InputError(f"diagnose wants real and generated logits, got {len(real)} and {len(fake)}")
    logits = torch.cat([real, fake])
    if not bool(torch.isfinite(logits).all()):
        raise InputError("diagnose wants finite logits, got NaN or inf among them")
    p = torch.sigmoid(logits)
    y = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    sides = [w / w.sum() for w in (real_weight, fake_weight)]
    w = torch.cat(sides) / 2
    which = (p * bins).long().clamp(max=bins - 1)

    def binned(x: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add(0, which, x)

    mass = binned(w)
    filled = mass > 0
    mean_p, mean_y = binned(w * p) / mass, binned(w * y) / mass
    gap = torch.where(filled, (mean_p - mean_y).abs(), 0)
    # variance of w (y - p) over draws of either side when calibrated: there a real image at p stands for (1 - p) / p
    # generated ones, so that all images tell of both sides
    per_real, per_fake = (float((side**2).sum()) for side in sides)
    chance = w * p * (1 - p) * ((1 - p) * per_real + p * per_fake) / 2
    variance, excess = float(chance.sum()), float((w * (y - p)).sum())
    reliability = float((mass * gap**2).sum())
    return Diagnosis(
        brier=float((w * (p - y) ** 2).sum()),
        z=excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0,
        ece=float((mass * gap).sum()),
        mce=float(gap.max()),
        reliability=reliability,
        resolution=float((mass * (mean_y - 0.5) ** 2)[filled].sum()),
        uncertainty=0.25,
        num_real=len(real),
        num_fake=len(fake),
        calibration_error=math.sqrt(max(0.0, reliability - float((binned(chance) / mass)[filled].sum()))),
        bin_predicted=mean_p.numpy(),
        bin_share=mean_y.numpy(),
        bin_real=which[: len(real)].bincount(minlength=bins).numpy(),
        bin_fake=which[len(real) :].bincount(minlength=bins).numpy(),
    )


def judge(logits: Tensor | Result, what: str, untrusted: str) -> None:
    """Warn ("warn") or raise InputError ("refuse") where a result's real logits speak against its own; "allow" asks nothing.

    Real images weigh as the classes of the samples do where both are labelled. Tensors are taken as calibrated.
    """
    checks.choice("untrusted", untrusted, ("warn", "refuse", "allow"))
    if untrusted == "allow" or not isinstance(logits, Result):
        return
    found = diagnosis_of(logits)
    if found is None or found.trusted:
        return
    text = (
        f"{what}: D's logits are no density ratio of these samples: bias z = {found.z:.1f}, calibration error ece = "
        f"{found.ece:.3f} (mean over the bins) and {found.calibration_error:.3f} (root mean square, less what chance adds; "
        f"trusted up to {TOLERANCE}); calibrate(...) them on held-out images and pass the calibrated tensor, "
        "or pass untrusted='allow'"
    )
    if untrusted == "refuse":
        raise InputError(text)
    warnings.warn(text, FastrefineWarning, stacklevel=3)


def diagnosis_of(result: Result) -> Diagnosis | None:
    """Diagnosis of a result's logits against its ``real_logits``; None without them, or where no class is on both sides."""
    if result.real_logits is None:
        return None
    real, fake = result.real_logits.double().cpu(), result.logits.double().cpu()
    weights = [torch.ones_like(real), torch.isfinite(fake).double()]
    if result.labels is not None and result.real_labels is not None:
        given = [classes_of(y, "labels", len(y)).cpu() for y in (result.real_labels, result.labels)]
        classes, which = torch.cat(given).unique(return_inverse=True)
        of = which.split([len(real), len(fake)])
        number = [torch.zeros(len(classes), dtype=torch.float64).index_add(0, of[k], weights[k]) for k in range(2)]
        weights = [(number[1] / number[0])[of[0]], weights[1] * (number[0] > 0)[of[1]]]
    kept = [w > 0 for w in weights]
    if not (bool(kept[0].any()) and bool(kept[1].any())):
        return None
    return _diagnose(real[kept[0]], fake[kept[1]], weights[0][kept[0]], weights[1][kept[1]])


def classes_of(labels: Any, name: str, n: int) -> Tensor:
    """(n,) int64 classes of labels (n,), of vectors (n, C) by their largest entry, or of one class for all."""
    try:
        found = checks.labels(labels, n)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    assert found is not None
    return found.argmax(1) if found.dim() > 1 else found


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
        d = d if d.is_floating_point() else d.double()
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
    "isotonic"     the best non-decreasing step function (Zadrozny & Elkan 2002), with one more generated image above all and
                   one more real image below: else the topmost real ones get an endless density ratio, and hold every chain

    Raises InputError for fewer, for non-finite logits and for another method.
    """
    checks.choice("method", method, tuple(_FITS))
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

    everything = np.concatenate([real, fake])
    d, y, w = _training(np.append(real, everything.min()), np.append(fake, everything.max()))
    fit = IsotonicRegression(out_of_bounds="clip").fit(d, y, sample_weight=w)

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
