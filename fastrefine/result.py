"""What a run returns."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastrefine import slots

_WHOLE = ("real_logits", "real_labels")  # not a row for each sample


class Status(enum.IntEnum):
    """Why a sample retired; the values of ``Result.status``."""

    REACHED = slots.REACHED  # its logit reached the threshold
    EXHAUSTED = slots.EXHAUSTED  # it had all its steps
    NONFINITE = slots.NONFINITE  # a logit or gradient was not finite; the last finite state is returned
    STALLED = slots.STALLED  # it had all its steps, and every gradient was exactly zero


@dataclass(frozen=True, eq=False)
class Result:
    """N samples in order of sample id.

    images: (N, ...) in the generator's output range, float32 (float64 under precision="float64").
    logits, initial_logits: (N,) of the returned sample and of its proposal, as the step saw them (in its precision).
    steps: (N,) int32 updates made (rejected trials included). status: (N,) int8, values of Status.
    logit_falls: (N,) int32 how often an evaluation lay below the sample's standing logit: many mean too large a step.
    latents: (N, ...) what the generator was given; under at="input" the refined latent. activations: (N, ...) refined.
    labels: (N, ...) or None. acceptance: (N,) acceptance rate of MCMC samplers, else None.
    scale: "logit" | "critic". report: counts and speed of the run so far, see Refiner.
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
    real_logits: Tensor | None = None
    real_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Tensor | slice) -> Result:
        """The samples at ``indices`` (positions, not ids), e.g. those that metropolis_hastings chose."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {k: v[indices] for k, v in values.items() if isinstance(v, Tensor) and k not in _WHOLE}
        return Result(**values | rows | {"report": dict(self.report)})

    @classmethod
    def concatenate(cls, parts: list[Result]) -> Result:
        """One result from consecutive parts of a stream; the report is the last one's."""
        first, last = parts[0], parts[-1]
        values: dict[str, Any] = {f.name: getattr(first, f.name) for f in fields(cls)}
        for name, value in values.items():
            if isinstance(value, Tensor) and name not in _WHOLE:
                values[name] = torch.cat([getattr(part, name) for part in parts])
        return cls(**values | {"report": last.report})
