"""What a run returns."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.ops import slots

_WHOLE = ("real_logits", "real_labels")  # not a row for each sample


class Status(enum.IntEnum):
    """Why a sample retired; the values of ``Result.status``."""

    REACHED = slots.REACHED  # its logit reached the threshold
    EXHAUSTED = slots.EXHAUSTED  # it had all its steps
    NONFINITE = slots.NONFINITE  # a logit or gradient was not finite; the last finite state is returned
    STALLED = slots.STALLED  # it had all its steps, and every gradient was exactly zero


@dataclass
class Progress:
    """Counts of a run, updated whenever the counters are read. It survives a restart with fewer slots."""

    evaluations: int = 0
    slot_steps: int = 0
    iterations: int = 0
    host_syncs: int = 0  # readings of the counters, and images that the host had to wait for
    finished: int = 0
    delivered: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # backend, driver, precision, threads, num_slots, ...

    def add(self, now: list[int], before: list[int], num_slots: int) -> int:
        """Take in counters (see ``slots``) and those of the reading before; the engine steps between the two."""
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
    """Samples as they stood after so many steps; those that had retired before, as they are returned.

    images: (N, ...). logits: (N,). activations: (N, ...), under at="input" the latents.
    """

    images: Tensor
    logits: Tensor
    activations: Tensor

    def select(self, indices: Tensor | slice) -> Snapshot:
        """The samples at ``indices``."""
        return Snapshot(**{name: tensor[indices] for name, tensor in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Result:
    """N samples in order of sample id.

    images: (N, ...) in the generator's output range, float32 (float64 under precision="float64").
    logits, initial_logits: (N,) of the returned sample and of its proposal, as the step saw them (in its precision).
    steps: (N,) int32 updates made (rejected trials included). status: (N,) int8, values of Status.
    logit_falls: (N,) int32 how often an evaluation lay below the sample's standing logit: many mean too large a step.
    latents: (N, ...) what the generator was given; under at="input" the refined latent. activations: (N, ...) refined.
    labels: (N, ...) or None. acceptance: (N,) accepted share of the Metropolis tests of MALA and HMC, else None; NaN
    without a test. step_sizes: (N,) reached under backtracking or adaptation, None for other samplers.
    scale: "logit" | "critic". report: counts and speed of the run so far, see Refiner.
    snapshots: by the number of steps, where they were asked for.
    real_logits: (R,) float64 on the CPU, of the refiner's ``real`` under the discriminator of this run, else None.
    real_labels: (R,) their classes, or None. Both belong to the result as a whole: select and concatenate leave them alone.
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
        indices = chosen if isinstance(chosen, Tensor) else indices
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        rows: dict[str, Any] = {k: v[indices] for k, v in values.items() if isinstance(v, Tensor) and k not in _WHOLE}
        rows["snapshots"] = {step: snapshot.select(indices) for step, snapshot in self.snapshots.items()}
        return Result(**values | rows | {"report": dict(self.report)})

    @classmethod
    def concatenate(cls, parts: list[Result]) -> Result:
        """One result from consecutive parts of a stream; the report is the last one's."""
        first, last = parts[0], parts[-1]
        if any(part.snapshots.keys() != first.snapshots.keys() for part in parts):
            raise InputError("the parts have snapshots after different numbers of steps")
        values: dict[str, Any] = {f.name: getattr(first, f.name) for f in fields(cls)}
        for name, value in values.items():
            if isinstance(value, Tensor) and name not in _WHOLE:
                values[name] = torch.cat([getattr(part, name) for part in parts])
        values["snapshots"] = {
            step: Snapshot(**{k: torch.cat([getattr(part.snapshots[step], k) for part in parts]) for k in vars(snapshot)})
            for step, snapshot in first.snapshots.items()
        }
        return cls(**values | {"report": last.report})

    def tensors(self) -> list[Tensor]:
        """All tensors of samples, those of the snapshots too."""
        own = [t for k, t in vars(self).items() if isinstance(t, Tensor) and k not in _WHOLE]
        return own + [t for snapshot in self.snapshots.values() for t in vars(snapshot).values()]

    def moved(self, tensors: list[Tensor]) -> Result:
        """The same result with these in place of ``tensors()``, in that order."""
        arriving = iter(tensors)
        values: dict[str, Any] = vars(self) | {
            k: next(arriving) for k, v in vars(self).items() if isinstance(v, Tensor) and k not in _WHOLE
        }
        values["snapshots"] = {
            step: Snapshot(**{k: next(arriving) for k in vars(snapshot)}) for step, snapshot in self.snapshots.items()
        }
        return Result(**values)
