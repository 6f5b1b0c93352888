"""What a run returns."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.ops import slots

_WHOLE = ("real_logits", "real_labels")  # tensors that belong to the result as a whole: their rows are not samples


class Status(enum.IntEnum):
    """Why a sample retired; the values of ``Result.status``."""

    REACHED = slots.REACHED  # its logit reached the threshold
    EXHAUSTED = slots.EXHAUSTED  # it had all its steps
    NONFINITE = slots.NONFINITE  # a logit or gradient was not finite; the last finite state is returned
    STALLED = slots.STALLED  # it had all its steps, and every gradient was exactly zero


@dataclass
class Progress:
    """Counts of a run, updated whenever the host reads the counters. A restart with fewer slots keeps them."""

    evaluations: int = 0
    slot_steps: int = 0
    iterations: int = 0
    host_syncs: int = 0  # readings of the counters, and images that the host had to wait for
    finished: int = 0
    delivered: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # backend, driver, precision, threads, num_slots, ...

    def add(self, now: list[int], before: list[int], num_slots: int) -> int:
        """Add what the counters (see ``slots``) gained since the last reading; returns the engine steps since then."""
        new = [a - b for a, b in zip(now, before, strict=True)]
        self.evaluations += new[slots.EVALUATIONS]
        self.finished += new[slots.FINISHED]
        self.iterations += new[slots.ITERATIONS]
        self.slot_steps += new[slots.ITERATIONS] * num_slots
        self.host_syncs += 1
        return new[slots.ITERATIONS]

    def report(self) -> dict[str, Any]:
        """The dict that users see as ``Result.report``."""
        return {
            "evaluations": self.evaluations,
            "slot_steps": self.slot_steps,
            "slot_efficiency": self.evaluations / self.slot_steps if self.slot_steps else 1.0,
            "iterations": self.iterations,
            "host_syncs_per_step": self.host_syncs / self.iterations if self.iterations else 0.0,
            "seconds": self.seconds,
            "images_per_second": self.delivered / self.seconds if self.seconds > 0 else 0.0,
            **self.facts,
        }


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The samples after a given number of steps; those that had retired before are as in the result.

    images: (N, ...). logits: (N,). activations: (N, ...), under at="input" the latents.
    """

    images: Tensor
    logits: Tensor
    activations: Tensor

    def __repr__(self) -> str:
        of = "x".join(map(str, self.images.shape[1:]))
        return f"Snapshot({len(self.images)} images of {of}; mean logit {self.logits.float().mean():.3g})"

    def select(self, indices: Tensor | slice) -> Snapshot:
        """The samples at ``indices``."""
        return self._mapped(lambda tensor: tensor[indices])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Snapshot:
        return Snapshot(**{name: change(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Result:
    """N samples in order of sample id.

    images: (N, ...) in the generator's output range, float32 (float64 under precision="float64").
    logits, initial_logits: (N,) of the returned sample and of its proposal, as the step saw them (in its precision).
    steps: (N,) int32 updates made (rejected trials included). status: (N,) int8, values of Status.
    logit_falls: (N,) int32 how often an evaluation was below the sample's current logit; many mean too large a step.
    latents: (N, ...) the generator's inputs, refined under at="input". activations: (N, ...) refined.
    labels: (N, ...) or None. conditions: {name: (N, ...)}, as given.
    acceptance: (N,) accepted share of the Metropolis tests of MALA and HMC, NaN without a test; None for other samplers.
    step_sizes: (N,) last ones under backtracking or adaptation; None for other samplers.
    scale: "logit" | "critic". report: counts and speed of the run so far, see Refiner.
    snapshots: {number of steps: Snapshot}, where they were asked for.
    real_logits: (R,) float64 on the CPU, of the refiner's ``real`` under the discriminator of this run, else None.
    real_labels: (R,) their classes, or None. select and concatenate leave both as they are.
    """

    images: Tensor
    logits: Tensor
    initial_logits: Tensor
    steps: Tensor
    status: Tensor
    ids: Tensor
    latents: Tensor
    activations: Tensor
    logit_falls: Tensor
    labels: Tensor | None
    acceptance: Tensor | None
    scale: str
    report: dict[str, Any]
    step_sizes: Tensor | None = None
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    conditions: dict[str, Tensor] = field(default_factory=dict)
    real_logits: Tensor | None = None
    real_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        of = "x".join(map(str, self.images.shape[1:]))
        means = ", ".join(f"{t.float().mean():.3g}" for t in (self.initial_logits, self.logits, self.steps))
        counts = {status.name: int((self.status == status).sum()) for status in Status}
        ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"Result({len(self)} images of {of}; mean logit before, after, mean steps: {means}; {ended or 'none'})"

    def select(self, indices: Any) -> Result:
        """The samples at ``indices`` (positions, not ids), or those that metropolis_hastings chose, given its result."""
        chosen = getattr(indices, "indices", None)
        rows = chosen if isinstance(chosen, Tensor) else indices
        return self._mapped(lambda tensor: tensor[rows], dict(self.report))

    @classmethod
    def concatenate(cls, parts: list[Result]) -> Result:
        """One result from consecutive parts of a stream; the report is the last one's."""
        if any(part.snapshots.keys() != parts[0].snapshots.keys() for part in parts):
            raise InputError("the parts have snapshots after different numbers of steps")
        columns = zip(*(part.tensors() for part in parts), strict=True)
        joined = parts[0].moved([torch.cat(column) for column in columns])
        return replace(joined, report=parts[-1].report)

    def tensors(self) -> list[Tensor]:
        """All tensors of samples, those of the snapshots too."""
        own = [t for k, t in vars(self).items() if isinstance(t, Tensor) and k not in _WHOLE]
        return [*own, *self.conditions.values(), *(t for snap in self.snapshots.values() for t in vars(snap).values())]

    def moved(self, tensors: list[Tensor]) -> Result:
        """The same result with these in place of ``tensors()``, in that order."""
        arriving = iter(tensors)
        return self._mapped(lambda _: next(arriving), self.report)

    def _mapped(self, change: Callable[[Tensor], Tensor], report: dict[str, Any]) -> Result:
        """The result with ``change`` applied to every one of ``tensors()``, in that order."""
        own: dict[str, Any] = {k: change(t) for k, t in vars(self).items() if isinstance(t, Tensor) and k not in _WHOLE}
        conditions = {name: change(value) for name, value in self.conditions.items()}
        snapshots = {step: snapshot._mapped(change) for step, snapshot in self.snapshots.items()}
        return replace(self, **own, conditions=conditions, snapshots=snapshots, report=report)
