"""Whether a sampler's step size was good, judged by its results."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastrefine.diagnosis.findings import Finding
from fastrefine.diagnosis.tally import Sums, Tally
from fastrefine.errors import InputError
from fastrefine.result import Result
from fastrefine.samplers.base import Sampler
from fastrefine.samplers.hmc import HMC

RARE, SURE = 0.1, 0.98  # a step size with less acceptance is called too large, one with more needlessly small
RESONANCE = 0.3  # radians: how near to a multiple of pi a trajectory of fixed length counts as coming back
ABOUT_STEPS = (
    "unmoved",
    "hardly_moved",
    "unrefined",
    "exhausted",
    "over_refined",
)  # findings of a run that belong into the advice
ERRORS, FEWEST = 4.0, 16  # the mean logit counts as fallen by so many standard errors, of so many samples at least


@dataclass(frozen=True)
class StepDiagnosis:
    """How the updates of a run went.

    updates: of all samples together. falls: share of them, 0 ... 1, that gave a logit below the sample's current one (about
    one half for a noisy sampler at equilibrium). gain: mean of final minus initial logit; gain_error: its standard error.
    acceptance: mean share of accepted tests, None without tests. step_sizes: 10 %, 50 % and 90 % quantile of the last steps
    under backtracking or adaptation, else None. reached, nonfinite: share of samples with that status.
    stable: False where the step size is too large; problem: then why. advice: what to change, or empty.

    Example: ``print(fr.diagnose_steps(out, refiner.sampler).advice)  # empty: nothing speaks against the step size``
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
    problem: Finding | None = None


def judged(sums: Sums, sampler: Sampler, step_sizes: tuple[float, float, float] | None = None) -> StepDiagnosis:
    """The diagnosis of a run from its sums; ``sampler`` made it."""
    known, updates, n = sums["known"], sums["updates"], max(sums["samples"], 1)
    mean = sums["gain"] / known if known else math.nan
    share = sums["falls"] / updates if updates else 0.0
    error = _spread(known, sums["gain"], sums["gain_square"]) / math.sqrt(max(known, 1))
    acceptance = sums["accepted"] / sums["tested"] if sums["tested"] else None
    least = max(ERRORS * error, _spread(known, sums["first"], sums["first_square"])) if known >= FEWEST else math.inf
    problem = _problem(sampler, share, mean, least, acceptance)
    return StepDiagnosis(
        updates=int(updates), falls=share, gain=mean, gain_error=error, acceptance=acceptance, step_sizes=step_sizes,
        reached=sums["REACHED"] / n, nonfinite=sums["NONFINITE"] / n, stable=problem is None, problem=problem,
        advice=problem.told() if problem else _hint(sampler, acceptance),
    )  # fmt: skip


def diagnose_steps(result: Result, sampler: Sampler) -> StepDiagnosis:
    """Diagnose the step size of ``sampler`` from one of its results, whose latents were drawn from the prior.

    Fixed steps without noise are too large where most updates lower the logit. Fewer falls do not prove that they are good
    (docs/samplers.md shows steps that ruin samples with a sixth). Steps of MALA, PCN and HMC are too large where fewer than a
    tenth of the proposals are accepted, and needlessly small where nearly all are. Nearly all are also accepted where HMC's
    trajectories come back to their start, as they may under a normal prior with jitter=0. DDLS with noise_scale 1 has a mean
    logit of at least the prior's in the limit, and DGflow ascends: their steps are too large where the mean logit fell by
    more than its standard deviation over the proposals (16 samples or more). What the run itself found (``Result.report``'s
    "findings") about thresholds that were passed at once, or never, stands in the advice too.

    Raises InputError for anything but a Result and a sampler.

    Example: ``print(fr.diagnose_steps(out, refiner.sampler))``
    """
    if not isinstance(result, Result) or not isinstance(sampler, Sampler):
        raise InputError(f"wanted a Result and the sampler it came from, got {type(result).__name__}, {type(sampler).__name__}")
    tally, sizes = Tally(), None
    tally.add(result)
    if result.step_sizes is not None and len(result.step_sizes):
        ordered = result.step_sizes.double().sort().values
        low, middle, high = (ordered[int(q * (len(ordered) - 1))].item() for q in (0.1, 0.5, 0.9))
        sizes = low, middle, high
    found = judged(tally.sums, sampler, sizes)
    if not found.stable:
        return found
    told = [
        f"{entry['text']}; {entry['advice']}" for entry in result.report.get("findings", ()) if entry["code"] in ABOUT_STEPS
    ]
    return replace(found, advice=". ".join(told) or found.advice)


def _spread(count: float, total: float, square: float) -> float:
    """Standard deviation of ``count`` values from their sums; NaN of fewer than two."""
    return math.sqrt(max(square - total * total / count, 0.0) / (count - 1)) if count > 1 else math.nan


def _problem(sampler: Sampler, falls: float, gain: float, least: float, acceptance: float | None) -> Finding | None:
    """Why the step size is too large, or None; least: the smallest fall of the mean logit that counts."""
    traits, smaller = sampler.traits, ("pass a smaller step_size", "give a smaller --step-size")
    every = getattr(sampler, "global_every", None)  # moves to fresh draws may all be rejected, and say nothing of the step
    if acceptance is not None and acceptance < RARE * (1 - 1 / every if every else 1):
        advice = "adapt= finds one by itself", "--sampler-args '{\"adapt\": 100}' finds one by itself"
        if getattr(sampler, "adapt", 0):
            advice = ("adapt for longer, or from a smaller one",) * 2
        return Finding("step_size", f"{acceptance:.1%} of the proposals were accepted: the step size is too large", *advice)
    if acceptance is not None or not traits.ascends or traits.rejects:
        return None
    if not traits.stochastic and falls > 0.5:
        return Finding("step_size", f"{falls:.0%} of the updates lowered the logit: the step size is too large", *smaller)
    if traits.stochastic and gain < -least:
        text = f"the mean logit fell by {-gain:.3g}: the step size, or the noise, is too large"
        return Finding("step_size", text, *smaller)
    return None


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
