"""Whether a discriminator's logits may be read as log density ratios, and maps that calibrate them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import FastrefineWarning, InputError, warn
from fastrefine.result import Result

TOLERANCE = 0.05  # largest trusted calibration error: near s(d) = 0.5 the density ratio is then wrong by a fifth
FIGURES = {  # what is shown of a Diagnosis, in words
    "error": f"of D's probabilities (root mean square, less what chance explains); up to {TOLERANCE} is trusted",
    "ece": "the mean of their errors (expected calibration error), chance included; 0 is the best",
    "z": "whether they lean to one side, in standard deviations; -3 to 3 is trusted",
    "brier": "their mean squared error; 0.25 is that of guessing, 0 the best",
}
BOUNDED = 2000  # images: z of more is scaled down to so many, so that the bound is a bias of 0.03 in the mean probability

_Map = Callable[[np.ndarray], np.ndarray]


def logits_of(logits: Tensor | Result, what: str, *, critic: bool = False) -> Tensor:
    """(N,) float64 logits of a tensor or a result; InputError for a critic's result unless ``critic`` allows its scores."""
    if isinstance(logits, Result):
        if logits.scale == "critic" and not critic:
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
    """How well s(d) is calibrated as the probability of being real. Both sides weigh the same, whatever their numbers.

    brier: mean squared error of the probability, 0 best (Brier 1950) = reliability - resolution + uncertainty, up to the
    spread within bins (Murphy 1973). z: sum(y - p) / sqrt(sum p (1 - p)) ([MHGAN] 3.2); its standard deviation is at most 1
    for calibrated logits; for others it grows with the square root of the number of images.
    ece, mce: weighted mean and maximum of |mean p - share of real| over equal-width bins (Guo et al. 2017).
    calibration_error: square root of the reliability minus its expectation by chance (Kumar et al. 2019), at least 0.
    bin_predicted, bin_share: (bins,) mean p and share of real, NaN in empty bins. bin_real, bin_fake: (bins,) images.

    Example: ``print(fr.diagnose(real_logits, out).ece)  # 0 for a perfect density ratio, at most 1``
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

    def __str__(self) -> str:
        text = ", ".join(f"{name} {value:.{1 if name == 'z' else 3}f}" for name, value in self.figures.items())
        verdict = "D may be trusted as a density ratio" if self.trusted else "D may not be trusted as a density ratio"
        return f"{text} ({self.num_real} real, {self.num_fake} generated): {verdict}"

    @property
    def figures(self) -> dict[str, float]:
        """The four figures that a check and a report show, by the names of FIGURES."""
        return {"error": self.calibration_error, "ece": self.ece, "z": self.z, "brier": self.brier}

    @property
    def trusted(self) -> bool:
        """Whether exp(d) may be read as a density ratio: calibration_error is at most 0.05, and |z| at most 3.

        z is first scaled down to 2000 images where there are more: otherwise enough images would refuse any bias, however
        small. With fewer than about 200 images a side the verdict depends on chance.
        """
        effective = 4 / (1 / self.num_real + 1 / self.num_fake)
        return abs(self.z) * math.sqrt(min(1, BOUNDED / effective)) <= 3 and self.calibration_error <= TOLERANCE


def diagnose(real_logits: Tensor | Result, fake_logits: Tensor | Result, *, bins: int = 10) -> Diagnosis:
    """Diagnose logits (N,) of real and (M,) of generated images; use real images that D was not trained on.

    Raises InputError for empty or non-finite logits, and for the scores of a critic.

    Example: ``print(fr.diagnose(refiner.score(real), out))``
    """
    checks.count("bins", bins, 1)
    real, fake = (logits_of(x, "diagnose").to("cpu") for x in (real_logits, fake_logits))
    return _diagnose(real, fake, torch.ones_like(real), torch.ones_like(fake), bins)


def _diagnose(real: Tensor, fake: Tensor, real_weight: Tensor, fake_weight: Tensor, bins: int = 10) -> Diagnosis:
    """``diagnose`` of weighted logits; the weights of each side are scaled to a sum of one half."""
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
    # Variance of w (y - p) if the logits are calibrated. One real image at p then stands for (1 - p) / p generated ones,
    # so the images of both sides serve to estimate the variance of either.
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


def check_trust(logits: Tensor | Result, what: str, untrusted: str) -> None:
    """Warn ("warn") or raise InputError ("refuse") where ``diagnosis_of`` a result is not trusted; "allow" skips the check.

    Tensors are taken as calibrated.
    """
    checks.choice("untrusted", untrusted, ("warn", "refuse", "allow"))
    if untrusted == "allow" or not isinstance(logits, Result):
        return
    found = diagnosis_of(logits)
    if found is None or found.trusted:
        return
    text = (
        f"{what}: D's logits are no density ratio of these samples: z = {found.z:.1f} (-3 to 3 is trusted), error = "
        f"{found.calibration_error:.3f} (up to {TOLERANCE} is trusted), ece = {found.ece:.3f}; "
    )
    python = f"{text}calibrate(...) them on held-out images and pass the calibrated tensor, or pass untrusted='allow'"
    command = f"{text}give --calibrate isotonic, and as --held-out real images that D was not trained on"
    if untrusted == "refuse":
        raise InputError(python, command)
    warn(FastrefineWarning(python, command))


def diagnosis_of(result: Result) -> Diagnosis | None:
    """Diagnosis of a result's logits against its ``real_logits``; None without them, or where no class is on both sides.

    Where both sides are labelled, every class weighs among the real images as much as among the samples.
    """
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
    """Monotone map of logits (n,) to calibrated logits (n,), as ``calibrate`` returns it. Non-finite logits stay as they are.

    before: diagnosis of the logits that it was fitted on. after: diagnosis of the same logits, each half calibrated by a map
    that was fitted on the other half; so it estimates the calibration on new images.

    Example: ``fr.calibrate(real_logits, out)(out.logits).shape  # (64,), and calibrated``
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

    real_logits (N,), fake_logits (M,): two or more each, of images that D was not trained on; a critic's scores may be given
    too. Both sides weigh the same, whatever N and M. With s the sigmoid:

    "temperature"  w d, w >= 0 (Guo et al. 2017)      "platt"  w d + b, w >= 0 (Platt 1999)
    "beta"         a log s(d) - b log(1 - s(d)) + c, a, b >= 0 (Kull et al. 2017)
    "isotonic"     the best non-decreasing step function (Zadrozny & Elkan 2002). One generated image is added at the highest
                   logit and one real image at the lowest, or the highest real logits would get an infinite density ratio

    Raises InputError for fewer, for non-finite logits and for another method.

    Example: ``calibration = fr.calibrate(real_logits, out, "platt"); print(calibration.after)``
    """
    checks.choice("method", method, tuple(_FITS))
    given = [logits_of(x, "calibrate", critic=True).cpu() for x in (real_logits, fake_logits)]
    if any(len(x) < 2 or not bool(torch.isfinite(x).all()) for x in given):
        raise InputError("calibrate wants two or more finite logits (N,) of real and of generated images")
    even, odd = ([x[start::2].numpy() for x in given] for start in (0, 1))
    fit = _FITS[method]
    of_even, of_odd = fit(*even), fit(*odd)
    crossed = [torch.from_numpy(np.concatenate([of_odd(even[k]), of_even(odd[k])])) for k in range(2)]
    return Calibration(method, diagnose(*given), diagnose(*crossed), fit(*(x.numpy() for x in given)))


def _training(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, targets, weights); the weights of each side sum to half of all."""
    y = np.concatenate([np.ones(len(real)), np.zeros(len(fake))])
    w = np.concatenate([np.full(len(real), 0.5 / len(real)), np.full(len(fake), 0.5 / len(fake))])
    return np.concatenate([real, fake]), y, w * len(y)


def _logistic(columns: Callable[[np.ndarray], list[np.ndarray]], real: np.ndarray, fake: np.ndarray, intercept: bool) -> _Map:
    """Logistic regression on columns of the logits; a column whose weight would be negative is left out."""
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
    return np.zeros_like  # no column rises with the probability of being real: every image gets logit 0


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


_FITS: dict[str, Callable[[np.ndarray, np.ndarray], _Map]] = {
    "isotonic": _isotonic,
    "platt": lambda real, fake: _logistic(lambda x: [x], real, fake, True),
    "beta": lambda real, fake: _logistic(lambda x: [-np.logaddexp(0.0, -x), np.logaddexp(0.0, x)], real, fake, True),
    "temperature": lambda real, fake: _logistic(lambda x: [x], real, fake, False),
}
