"""What a run returns."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks, pictures
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

    evaluations: int = 0  # by the slots
    proposed: int = 0  # evaluations of proposals, forward only, of which each sample starts from the best
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
            "evaluations": self.evaluations + self.proposed,
            "proposal_evaluations": self.proposed,
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
    acceptance: (N,) accepted share of the Metropolis tests of MALA, PCN and HMC, NaN without a test; None for other samplers.
    step_sizes: (N,) last ones under backtracking or adaptation; None for other samplers.
    scale: "logit" | "critic". report: counts and speed of the run so far, see Refiner.
    snapshots: {number of steps: Snapshot}, where they were asked for.
    real_logits: (R,) float64 on the CPU, of the refiner's ``real`` under the discriminator of this run, else None.
    real_labels: (R,) their classes, or None. select and concatenate leave both as they are.
    initial: ids (n,) -> the images of these samples before refinement; see ``initial_images``.
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
    initial: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def initial_images(self) -> Tensor:
        """The images before refinement, (N, ...) in the order of ``images`` and of their dtype: a run with max_steps=0.

        They are rendered at the first access, by one pass of the generator for each block of samples, and then kept. For a few
        of many samples, select first. They are rendered with the generator as it was in the run, also if yours was updated.
        Raises InputError where the result does not know its run any more: it was read from a file, or joined from several runs;
        and where latents that you gave, or a module that ``generate`` reads, were changed since.

        Example: ``(out.images - out.initial_images).flatten(1).norm(dim=1)``  # how far each sample moved
        """
        if self.initial is None:
            raise InputError(
                "this result does not know its run, as it was read from a file or joined from several runs; read "
                "initial_images before that, or sample the same ids and seed with refiner.replaced(max_steps=0)"
            )
        return self.initial(self.ids) if len(self) else self.images.clone()

    def save_grid(
        self, path: str | Path, rows: Sequence[str] = ("initial", "refined", "difference"), *, count: int = 16,
        image_range: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Write a picture of the first ``count`` samples, e.g. as .png, with a row for each of ``rows``.

        rows: some of "initial", "refined" and "difference" (red where refinement made the image brighter, blue where darker).
        image_range: (low, high) of the images. None: the first of (0, 1) and (-1, 1) that holds them, else their own lowest and
        highest value. Images are (N, 1 or 3, H, W); small ones are enlarged. Under them is the logit before and after.
        Raises InputError on other images, on unknown rows, and as ``initial_images`` does.

        Example: ``out.save_grid("grid.png")``; ``out.select(torch.randperm(len(out))[:16]).save_grid("random.png")``
        """
        few = self.select(slice(0, checks.count("count", count, 1)))
        if few.images.dim() != 4 or few.images.shape[1] not in (1, 3) or not len(few):
            raise InputError(f"images are {tuple(self.images.shape)}; a picture needs some (N, 1 or 3, H, W)")
        after = few.images.detach().float().cpu()
        before = few.initial_images.detach().float().cpu() if {"initial", "difference"} & {*rows} else after
        limits = image_range or pictures.likely_range(torch.stack([before, after]))
        logits = list(zip(few.initial_logits.tolist(), few.logits.tolist(), strict=True))
        title = f"The first {len(few)} of {len(self)} samples"
        pictures.grid(path, pictures.levels(before, limits), pictures.levels(after, limits), logits, title, rows)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        of = "x".join(map(str, self.images.shape[1:]))
        means = ", ".join(f"{t.float().mean():.3g}" for t in (self.initial_logits, self.logits, self.steps))
        counts = {status.name: int((self.status == status).sum()) for status in Status}
        ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if counts["EXHAUSTED"] == len(self) and len(self) and not int(self.steps.sum()):
            ended = "no steps were allowed"
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
        of_one_run = all(part.initial is parts[0].initial for part in parts)
        return replace(joined, report=parts[-1].report, initial=joined.initial if of_one_run else None)

    def tensors(self) -> list[Tensor]:
        """All tensors of samples, those of the snapshots too."""
        return [
            *self._columns().values(),
            *self.conditions.values(),
            *(t for snap in self.snapshots.values() for t in vars(snap).values()),
        ]

    def moved(self, tensors: list[Tensor]) -> Result:
        """The same result with these in place of ``tensors()``, in that order."""
        arriving = iter(tensors)
        return self._mapped(lambda _: next(arriving), self.report)

    def _mapped(self, change: Callable[[Tensor], Tensor], report: dict[str, Any]) -> Result:
        """The result with ``change`` applied to every one of ``tensors()``, in that order."""
        own: dict[str, Any] = {name: change(value) for name, value in self._columns().items()}
        conditions = {name: change(value) for name, value in self.conditions.items()}
        snapshots = {step: snapshot._mapped(change) for step, snapshot in self.snapshots.items()}
        return replace(self, **own, conditions=conditions, snapshots=snapshots, report=report)

    def _columns(self) -> dict[str, Tensor]:
        """The fields that are tensors with a row for each sample."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _WHOLE}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
