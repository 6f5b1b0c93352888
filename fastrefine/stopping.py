"""Stop rules: each gives a sample, when it is proposed, a logit threshold and a last step; the step tests both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.noise import Stream, uniform

Draw = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RealLogits:
    """Logits (N,) of real images under the current discriminator, with their classes (N,) where the images are labelled."""

    logits: Tensor
    labels: Tensor | None = None

    def per_sample(self, labels: Tensor | None, pick: Callable[[Tensor, Tensor], Tensor], n: int) -> Tensor:
        """(n,) values: ``pick(logits of the class, positions of its samples)`` class by class; without labels one call.

        Raises InputError where a class has no real logit.
        """
        everyone = torch.arange(n, device=self.logits.device)
        if self.labels is None or labels is None:
            return pick(self.logits, everyone)
        result = self.logits.new_empty(n)
        for label in labels.unique().tolist():
            real, at = self.logits[self.labels == label], everyone[labels == label]
            if len(real) == 0:
                raise InputError(f"no real image has label {label}; give `real` images of every class that is sampled")
            result[at] = pick(real, at)
        return result

    def median(self, labels: Tensor | None, n: int) -> Tensor:
        """(n,) median real logit, per class if labelled."""
        return self.per_sample(labels, lambda logits, at: logits.median().expand(len(at)), n)

    def drawn(self, u: Tensor, labels: Tensor | None) -> Tensor:
        """(n,) logit of the real image that each uniform of u (n,) picks, of the sample's class if labelled."""

        def pick(logits: Tensor, at: Tensor) -> Tensor:
            return logits[(u[at] * len(logits)).long().clamp(max=len(logits) - 1)]

        return self.per_sample(labels, pick, len(u))

    def reference(self, ids: Tensor, seed: int, labels: Tensor | None) -> Tensor:
        """(n,) logit of a real image drawn for each sample by (seed, id), of the sample's class if labelled."""
        return self.drawn(_uniform(ids, seed, Stream.REFERENCE), labels)


def _uniform(ids: Tensor, seed: int, stream: int) -> Tensor:
    """(n,) uniforms, one for each sample id."""
    return uniform(seed, ids, torch.zeros_like(ids), 1, stream)[:, 0]


class StopRule:
    """Base of the stop rules: a sample retires when its logit reaches its threshold, or after its last step."""

    needs_real = False
    has_threshold = False  # whether samples may retire by their logit
    early = True  # whether samples may retire before ``max_steps``

    def bind(self, real: RealLogits | None) -> StopRule:
        """The rule with the real logits of the current discriminator filled in."""
        return self

    def draw(self, ids: Tensor, seed: int, max_steps: int, labels: Tensor | None = None) -> Draw:
        """(threshold (n,) float64, last step (n,) int32) of the samples ``ids``; a pure function of (seed, id)."""
        return self._thresholds(ids, seed, labels), self._last_steps(ids, seed, max_steps)

    def _thresholds(self, ids: Tensor, seed: int, labels: Tensor | None) -> Tensor:
        return torch.full((len(ids),), math.inf, dtype=torch.float64)

    def _last_steps(self, ids: Tensor, seed: int, max_steps: int) -> Tensor:
        return torch.full((len(ids),), max_steps, dtype=torch.int32)


@dataclass(frozen=True)
class FixedSteps(StopRule):
    """stop=None: every sample has ``max_steps`` updates."""

    early = False


@dataclass(frozen=True)
class Threshold(StopRule):
    """Retire when the logit is at least ``logit``."""

    has_threshold = True
    logit: float

    def __post_init__(self) -> None:
        checks.number("threshold logit", self.logit)

    def _thresholds(self, ids: Tensor, seed: int, labels: Tensor | None) -> Tensor:
        return torch.full((len(ids),), float(self.logit), dtype=torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class _FromReal(StopRule):
    """A rule that reads logits of real images: given here, else those of the Refiner's ``real``."""

    has_threshold = True
    logits: Tensor | None = None
    real: RealLogits | None = None

    def __post_init__(self) -> None:
        if self.logits is None:
            return
        try:
            logits = torch.as_tensor(self.logits).detach().flatten().double().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{type(self).__name__}: wanted real logits (N,), got {self.logits!r}") from error
        if len(logits) == 0 or not torch.isfinite(logits).all():
            raise InputError(f"{type(self).__name__}: wanted one or more finite real logits, got {len(logits)} values")
        object.__setattr__(self, "real", RealLogits(logits))

    def __repr__(self) -> str:
        given = "" if self.logits is None or self.real is None else f"{len(self.real.logits)} logits"
        return f"{type(self).__name__}({given})"

    @property
    def needs_real(self) -> bool:  # type: ignore[override]
        return self.logits is None

    def bind(self, real: RealLogits | None) -> StopRule:
        return replace(self, real=real) if self.logits is None else self

    def _known(self) -> RealLogits:
        if self.real is None:
            raise InputError(f"{type(self).__name__} needs real logits: give them, or `real` images to the Refiner")
        return self.real


class MedianOfReal(_FromReal):
    """Retire when the logit reaches the median real logit ([CS] Alg. 1), per class if ``real_labels`` are given."""

    def _thresholds(self, ids: Tensor, seed: int, labels: Tensor | None) -> Tensor:
        return self._known().median(labels, len(ids)).double()


class ReferenceSample(_FromReal):
    """Retire when the logit reaches that of a real image drawn for this sample, of its class if labelled."""

    def _thresholds(self, ids: Tensor, seed: int, labels: Tensor | None) -> Tensor:
        return self._known().reference(ids, seed, labels).double()


@dataclass(frozen=True)
class Hazard(StopRule):
    """Retire after each evaluation with a constant probability: a geometric last step, 0 included ([CS] 3.2)."""

    probability: float

    def __post_init__(self) -> None:
        checks.number("hazard probability", self.probability, 0.0, 1.0, open_low=True)

    def _last_steps(self, ids: Tensor, seed: int, max_steps: int) -> Tensor:
        log_stay = math.log1p(-self.probability) if self.probability < 1 else -math.inf
        return torch.floor(torch.log(_uniform(ids, seed, Stream.LAST_STEP)) / log_stay).clamp(0, max_steps).int()


@dataclass(frozen=True)
class UniformStep(StopRule):
    """Retire after a step drawn uniformly from 0 ... max_steps (the public code's "probabilistic" refinement)."""

    def _last_steps(self, ids: Tensor, seed: int, max_steps: int) -> Tensor:
        return torch.floor(_uniform(ids, seed, Stream.LAST_STEP) * (max_steps + 1)).clamp(max=max_steps).int()


def as_rule(stop: StopRule | float | str | None) -> StopRule:
    """None -> always max_steps, a number -> Threshold, a rule as it is; or its name on the command line, e.g. "median".

    Raises InputError on anything else.
    """
    if stop is None:
        return FixedSteps()
    if isinstance(stop, StopRule):
        return stop
    if isinstance(stop, str):
        checks.choice("stop", stop, tuple(checks.STOPS))
        return globals()[checks.STOPS[stop]]()
    if isinstance(stop, Tensor) and stop.numel() == 1:
        stop = stop.item()
    if isinstance(stop, Real) and not isinstance(stop, bool):
        return Threshold(float(stop))
    names = ", ".join(map(repr, checks.STOPS))
    raise InputError(f"stop is {checks.shown(stop)}; wanted None, a logit, an object of fastrefine.stopping, or one of {names}")


def shown(rule: StopRule) -> str:
    """How a rule is printed: always max_steps as None, which one passes for it."""
    return "None" if isinstance(rule, FixedSteps) else repr(rule)


def described(rule: StopRule) -> str | float:
    """The JSON value from which ``as_rule`` makes this rule; InputError for one that has no name there."""
    if isinstance(rule, Threshold):
        return float(rule.logit)
    for name, kind in checks.STOPS.items():
        if type(rule) is globals()[kind] and getattr(rule, "logits", None) is None:
            return name
    raise InputError(f"stop is {rule!r}, which cannot be written down; wanted a logit or one of {', '.join(checks.STOPS)}")
