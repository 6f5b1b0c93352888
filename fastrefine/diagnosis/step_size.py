"""Whether a sampler's step size was good, judged by its results."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.result import Result, Status
from fastrefine.samplers.base import Sampler
from fastrefine.samplers.hmc import HMC

RARE, SURE = 0.1, 0.98  # a step size with less acceptance is called too large, one with more needlessly small
RESONANCE = 0.3  # radians: how near to a multiple of pi a trajectory of fixed length counts as coming back
ERRORS, FEWEST = 4.0, 16  # the mean logit counts as fallen by so many standard errors, of so many samples at least


@dataclass(frozen=True)
class StepDiagnosis:
    """How the updates of a run went.

    updates: of all samples together. falls: share of them, 0 ... 1, that gave a logit below the sample's current one (about
    one half for a noisy sampler at equilibrium). gain: mean of final minus initial logit; gain_error: its standard error.
    acceptance: mean share of accepted tests, None without tests. step_sizes: 10 %, 50 % and 90 % quantile of the last steps
    under backtracking or adaptation, else None. reached, nonfinite: share of samples with that status.
    stable: False where the step size is too large. advice: what to change, or empty.
    """

    updates: int
    falls: float
    gain: float
    gain_error: float
    acceptance: float | None
    step_sizes: tuple[float, float, float] | None
    reached: float
    nonfinite: float
    stable: bool
    advice: str


class Tally:
    """Sums over the parts of a run, on the device of the results: only ``diagnosis`` waits for it."""

    def __init__(self) -> None:
        self.samples = 0
        self._sums: Tensor | None = None

    def add(self, part: Result) -> None:
        gain = part.logits.double() - part.initial_logits.double()
        known = torch.isfinite(gain)
        gain = torch.where(known, gain, 0.0)
        first = torch.where(known, part.initial_logits.double(), 0.0)
        accepted = torch.full_like(gain, torch.nan) if part.acceptance is None else part.acceptance.double()
        tested = ~torch.isnan(accepted)
        columns = [
            part.steps, part.logit_falls, known, gain, gain * gain, tested, torch.where(tested, accepted, 0.0),
            part.status == Status.REACHED, part.status == Status.NONFINITE, first, first * first,
        ]  # fmt: skip
        sums = torch.stack([column.double().sum() for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums
        self.samples += len(part)

    def diagnosis(self, sampler: Sampler, step_sizes: tuple[float, float, float] | None = None) -> StepDiagnosis:
        """Of all parts added so far; ``sampler`` made them."""
        sums = [0.0] * 11 if self._sums is None else self._sums.tolist()
        updates, falls, known, gain, square, tested, accepted, reached, nonfinite, first, first_square = sums
        mean = gain / known if known else math.nan
        share, error = falls / updates if updates else 0.0, _spread(known, gain, square) / math.sqrt(max(known, 1))
        acceptance, n = accepted / tested if tested else None, max(self.samples, 1)
        least = max(ERRORS * error, _spread(known, first, first_square)) if known >= FEWEST else math.inf
        problem = _problem(sampler, share, mean, least, acceptance)
        return StepDiagnosis(
            updates=int(updates), falls=share, gain=mean, gain_error=error, acceptance=acceptance, step_sizes=step_sizes,
            reached=reached / n, nonfinite=nonfinite / n, stable=not problem, advice=problem or _hint(sampler, acceptance),
        )  # fmt: skip


def diagnose_steps(result: Result, sampler: Sampler) -> StepDiagnosis:
    """Diagnose the step size of ``sampler`` from one of its results, whose latents were drawn from the prior.

    Fixed steps without noise are too large where most updates lower the logit. Fewer falls do not prove that they are good
    (docs/samplers.md shows steps that ruin samples with a sixth). Steps of MALA and HMC are too large where fewer than a
    tenth of the proposals are accepted, and needlessly small where nearly all are. Nearly all are also accepted where HMC's
    trajectories come back to their start, as they may under a normal prior with jitter=0. DDLS with noise_scale 1 has a mean
    logit of at least the prior's in the limit, and DGflow ascends: their steps are too large where the mean logit fell by
    more than its standard deviation over the proposals (16 samples or more).

    Raises InputError for anything but a Result and a sampler.
    """
    if not isinstance(result, Result) or not isinstance(sampler, Sampler):
        raise InputError(f"wanted a Result and the sampler it came from, got {type(result).__name__}, {type(sampler).__name__}")
    tally = Tally()
    tally.add(result)
    if result.step_sizes is None or not len(result.step_sizes):
        return tally.diagnosis(sampler)
    sizes = result.step_sizes.double().sort().values
    low, middle, high = (sizes[int(q * (len(sizes) - 1))].item() for q in (0.1, 0.5, 0.9))
    return tally.diagnosis(sampler, (low, middle, high))


def _spread(count: float, total: float, square: float) -> float:
    """Standard deviation of ``count`` values from their sums; NaN of fewer than two."""
    return math.sqrt(max(square - total * total / count, 0.0) / (count - 1)) if count > 1 else math.nan


def _problem(sampler: Sampler, falls: float, gain: float, least: float, acceptance: float | None) -> str:
    """Why the step size is too large, or ""; least: the smallest fall of the mean logit that counts."""
    if acceptance is not None and acceptance < RARE:
        advice = "adapt for longer, or from a smaller one" if getattr(sampler, "adapt", 0) else "adapt= finds one by itself"
        return f"{acceptance:.1%} of the proposals were accepted: the step size is too large; {advice}"
    traits = sampler.traits
    if acceptance is not None or not traits.ascends or traits.rejects:
        return ""
    if not traits.stochastic and falls > 0.5:
        return f"{falls:.0%} of the updates lowered the logit: the step size is too large"
    if traits.stochastic and gain < -least:
        return f"the mean logit fell by {-gain:.3g}: the step size, or the noise, is too large"
    return ""


def _hint(sampler: Sampler, acceptance: float | None) -> str:
    if acceptance is None or acceptance <= SURE or getattr(sampler, "adapt", False):
        return ""
    found = f"{acceptance:.1%} of the proposals were accepted: "
    if isinstance(sampler, HMC) and _resonates(sampler):
        return (
            f"{found}leapfrog x step_size is near a multiple of pi, where trajectories under a normal prior come back to z or "
            "-z; jitter= mends it"
        )
    return f"{found}a larger step size would mix faster"


def _resonates(sampler: HMC) -> bool:
    """Whether a trajectory returns to nearly z or -z where d is flat and the prior normal."""
    turn = 2 * sampler.leapfrog * math.asin(min(sampler.step_size / 2, 1.0))  # rotation in radians, about leapfrog x step_size
    turns = round(turn / math.pi)
    return not sampler.jitter and turns > 0 and abs(turn - turns * math.pi) < RESONANCE
