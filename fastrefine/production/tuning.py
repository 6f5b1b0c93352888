"""Which step size, how many steps, which temperature: a search by successive halving for one pair and one budget."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import FastrefineWarning, InputError, warn
from fastrefine.metrics import frechet_distance, frechet_standard_error
from fastrefine.refiner import Refiner
from fastrefine.samplers import DDLS, Sampler

FACTORS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)  # of the sampler's own step size
TEMPERATURES = (1.0, 0.5, 0.25)  # of the noise of DDLS; of a law's logit_scale their inverses
KEPT = 3  # a third of the settings stays in each round, and gets as many times the samples
STEPS = (1, 2, 3, 4, 6, 9, 14, 19, 29, 39, 49, 74, 99, 149, 199)  # numbers of steps that are compared, and the most allowed
SIDE, DIMENSIONS = 8, 32  # of the features: pictures are averaged to so many pixels a side, and so many components are kept
ERRORS = 2.0  # standard errors of the difference, by which the found setting must be better than the given one
FIRST_SEED = 1_000_000  # of the search; nobody reports on these


@dataclass(frozen=True)
class TunedSampler:
    """What ``tune_sampler`` found.

    refiner: with the best setting; sampler, max_steps: of it. Where nothing beat them, they are as they were. quality:
    distances on the search's last seed, lower is better: "raw" samples, "before" (the settings given) and "after".
    evaluations: of D, in the whole search; seconds: it took. trials: a dict for each setting of each round.

    Example: ``tuned = fr.tune_sampler(refiner, real, budget=4); print(tuned.sampler, tuned.quality["after"])``
    """

    refiner: Refiner = field(repr=False)
    sampler: Sampler
    max_steps: int
    quality: dict[str, float]
    evaluations: int
    seconds: float
    trials: tuple[dict[str, Any], ...] = field(repr=False)


def tune_sampler(
    refiner: Refiner, real: Tensor, budget: int = 50, *, samples: int = 200, seed: int = 0,
    features: Callable[[Tensor], Tensor] | None = None, labels: Any = None,
) -> TunedSampler:  # fmt: skip
    """Find the sampler's step size, number of steps and temperature for at most ``budget`` evaluations of D for each image.

    Settings of all step sizes (1/64 to 64 times the sampler's) and temperatures (noise_scale of DDLS, logit_scale of MALA, PCN
    and HMC) make ``samples`` images each; the best third makes three times as many, with another seed, until one is left.
    Every number of steps up to the budget is read off the same run. The last one is compared with the settings given, on a
    seed of its own and from the same latents, and wins only where its distance is lower by more than two standard errors of
    the difference. Distances of so few samples are biased, more so for images that differ more: give more ``samples`` where it
    matters. Otherwise, and in all else, the refiner stays as it is. This is for better images: another logit_scale or
    noise_scale is another law.

    refiner: with a prior. Of a sampler that finds its step size itself (``fr.Collaborative()``) the number of steps is tuned.
    real: (R, ...) real images in the generator's range, 100 or more, best such as you do not report on. budget: 2 or more.
    features: images (n, ...) -> (n, F), by whose Frechet distance settings are compared. None: 32 principal components of
    ``real`` averaged to 8 x 8 pixels, which no usual report is made of. seed: another one gives another search; it uses
    seeds from 1,000,000 on. labels: one class, of which ``real`` should be then, or (L,) labels that the samples
    take in turn, for example those of ``real``.

    Warns where the best setting's images are no better than the generator's. Raises InputError for what does not fit, and for a
    sampler whose step size is a schedule.

    Example: ``tuned = fr.tune_sampler(refiner, real, budget=20); out = tuned.refiner.sample(8)``
    """
    began, budget = time.perf_counter(), checks.count("budget", budget, 2)
    samples, seed = checks.count("samples", samples, 50), FIRST_SEED + checks.count("seed", seed, 0, 2**32)
    real = checks.tensor("real", real)
    if len(real) < 100:
        raise InputError(f"real holds {len(real)} images; wanted 100 or more, or distances are noise")
    if refiner.prior is None:
        raise InputError("tune_sampler draws samples: pass prior= to the Refiner, e.g. fastrefine.Normal(64)")
    features, left, spent = features or _Components(real), settings(refiner.sampler), 0
    wanted, trials = features(real), []
    prepared: dict[float, Refiner] = {}  # by temperature: settings that differ in the step size share a recorded step

    def made(sampler: Sampler, numbers: list[int], n: int, at: int) -> dict[int, Tensor]:
        """The images after each number of steps."""
        nonlocal spent
        like = prepared.get(sampler.logit_scale, refiner)
        own = like.replaced(sampler=sampler, max_steps=numbers[-1], keep="last", progress=False)
        prepared[sampler.logit_scale] = own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastrefineWarning)  # of step sizes that are too large: they lose by themselves
            out = own.sample(n, seed=at, snapshots=numbers, labels=_repeated(labels, n))
        spent += out.report["evaluations"]
        return {k: out.snapshots[k].images for k in numbers}

    def distance(images: Tensor) -> float:
        return frechet_distance(features(images), wanted) if bool(torch.isfinite(images).all()) else math.inf

    for number in itertools.count():
        found = []
        for sampler in left:
            numbers = allowed(sampler, budget)
            by_steps = {k: distance(images) for k, images in made(sampler, numbers, samples, seed + number).items()}
            best = min(by_steps, key=lambda k: by_steps[k])
            found.append((by_steps[best], best, sampler))
            trials.append({"round": number, "samples": samples, "sampler": sampler, "steps": best, "distance": by_steps[best]})
        found.sort(key=lambda one: one[0])
        left = [sampler for *_, sampler in found[: -(-len(found) // KEPT)]]
        if len(found) <= KEPT:
            break
        samples *= KEPT
    _, steps, sampler = found[0]
    last = seed + number + 1
    given = min(refiner.max_steps, max(allowed(refiner.sampler, budget)))
    before = made(refiner.sampler, sorted({0, given}), samples, last)
    after = made(sampler, [steps], samples, last)[steps]
    quality = {"raw": distance(before[0]), "before": distance(before[given]), "after": distance(after)}
    doubt = 0.0
    if math.isfinite(quality["before"] - quality["after"]):  # sample by sample the two have the same latents
        doubt = ERRORS * frechet_standard_error(features(after), wanted, paired=features(before[given]))
    if not quality["after"] < quality["before"] - doubt:
        sampler, steps, quality["after"] = refiner.sampler, given, quality["before"]
    if not quality["after"] < quality["raw"]:
        warn(
            f"no setting made images better than the generator's: distance {quality['after']:.4g} with the best of them, "
            f"{quality['raw']:.4g} raw. Shape D first (fastrefine.shape_discriminator), or do not refine with this pair"
        )
    chosen = refiner.replaced(sampler=sampler, max_steps=steps)
    return TunedSampler(chosen, sampler, steps, quality, spent, time.perf_counter() - began, tuple(trials))


def settings(sampler: Sampler) -> list[Sampler]:
    """The samplers that are compared: other step sizes and temperatures, the given one among them."""
    names, size = {f.name for f in fields(sampler)}, getattr(sampler, "step_size", None)  # type: ignore[arg-type]
    if isinstance(size, tuple) or isinstance(getattr(sampler, "noise_scale", 1.0), tuple):
        raise InputError(f"{type(sampler).__name__} has a schedule; tune_sampler wants one number for all steps")
    sizes = [{}] if size is None else [{"step_size": size * factor} for factor in FACTORS]
    heats: list[dict[str, float]] = [{}]
    if isinstance(sampler, DDLS):
        heats = [{"noise_scale": float(sampler.noise_scale) * heat} for heat in TEMPERATURES]  # type: ignore[arg-type]
    elif "logit_scale" in names:
        heats = [{"logit_scale": sampler.logit_scale / heat} for heat in TEMPERATURES]
    made: list[Sampler] = []
    for one, other in itertools.product(sizes, heats):
        try:
            made.append(replace(sampler, **one, **other))  # type: ignore[type-var]
        except InputError:  # beyond the sampler's largest step size
            continue
    return made


def allowed(sampler: Sampler, budget: int) -> list[int]:
    """Numbers of steps, whole transitions, with at most ``budget`` evaluations: one more than steps."""
    unit = sampler.traits.transition_steps
    most = (budget - 1) // unit * unit
    if not most:
        raise InputError(f"budget is {budget}; one transition of {type(sampler).__name__} takes {unit + 1} evaluations")
    return sorted({k // unit * unit for k in (*STEPS, most) if unit <= k <= most})


def _repeated(labels: Any, n: int) -> Any:
    """Labels of n samples: those given, in turn. One class stays one, and what are no labels is refused by the samples."""
    if labels is None or isinstance(labels, int | str) or getattr(labels, "ndim", 1) == 0 or not len(labels):
        return labels
    given = checks.labels(labels, len(labels))
    assert given is not None
    return given[torch.arange(n) % len(given)]


class _Components:
    """Principal components of real images (n, ...), averaged to SIDE x SIDE pixels where they are larger pictures."""

    def __init__(self, real: Tensor):
        x = self._small(real)
        self.mean = x.mean(0)
        self.axes = torch.linalg.svd(x - self.mean, full_matrices=False).Vh[: min(DIMENSIONS, len(x) // 3)].T

    def __call__(self, images: Tensor) -> Tensor:
        return (self._small(images) - self.mean) @ self.axes

    def _small(self, x: Tensor) -> Tensor:
        x = x.detach().cpu().double()
        if x.dim() == 4 and max(x.shape[2:]) > SIDE:
            x = F.adaptive_avg_pool2d(x, SIDE)
        return x.flatten(1)
