"""What a run tells its caller: that preparation takes long, and at the end warnings about samples, images and steps."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from fastrefine.diagnosis.step_size import Tally
from fastrefine.errors import FastrefineWarning, NonFiniteError
from fastrefine.options import Options
from fastrefine.result import Result, Status


class Watch:
    """What a run tells its caller at the end, and the error for non-finite samples where that was asked for."""

    def __init__(self, options: Options, drawn: bool):
        self.options, self.drawn = options, drawn  # drawn: latents are of the prior, which some judgements assume
        self.tally = Tally()
        self.count = 0
        self.sums: Tensor | None = None  # of the rows below, where the results are

    def see(self, part: Result, highest: float) -> None:
        """Take in a part, without waiting for a device unless errors were asked for; highest: the highest real logit."""
        bad = part.status == Status.NONFINITE
        if self.options.on_nonfinite == "error" and bool(bad.any()):
            ids = part.ids[bad].tolist()
            raise NonFiniteError(f"logit or gradient not finite for {len(ids)} samples, first ids {ids[:5]}")
        hidden = ~part.images.isfinite()
        hidden = hidden.flatten(1).any(1) if hidden.dim() > 1 else hidden
        stalled = part.status == Status.STALLED
        unmoved = (part.status == Status.REACHED) & (part.steps == 0)
        rows = torch.stack([bad, hidden, stalled, part.logits > highest, unmoved, part.status == Status.EXHAUSTED])
        sums = rows.sum(1, dtype=torch.int64)
        self.sums = sums if self.sums is None else self.sums + sums
        self.tally.add(part)
        self.count += len(part)

    def tell(self) -> None:
        if self.sums is None:
            return
        nonfinite, hidden, stalled, above, unmoved, exhausted = self.sums.tolist()
        if nonfinite:
            _warn(f"{nonfinite} of {self.count} samples met a non-finite logit or gradient (status NONFINITE)")
        if hidden:
            _warn(f"{hidden} of {self.count} images hold non-finite values")
        if self.count and stalled == self.count:
            _warn(f"0 of {self.count} samples moved: every gradient was exactly zero (status STALLED)")
        if self.options.max_steps and unmoved > self.count / 2:
            _warn(
                f"{unmoved} of {self.count} proposals were at the stop threshold before their first step, so they were not "
                "refined: D scores generated images as high as real ones. Shape it first (fastrefine.shape_discriminator, or "
                "`fastrefine shape`), or pass a higher logit as stop"
            )
        if self.options.max_steps and self.options.stop.has_threshold and exhausted == self.count > 0:
            _warn(
                f"none of {self.count} samples reached the stop threshold within max_steps={self.options.max_steps}: take more "
                "or larger steps, or shape D first; to refine by a fixed number of steps leave stop out"
            )
        if above > self.count / 2:
            _warn(f"{above} of {self.count} logits passed the highest real logit: too many or too large steps?")
        found = self.tally.diagnosis(self.options.sampler)
        if not found.stable and (self.drawn or not self.options.sampler.traits.stochastic):
            _warn(found.advice)


@contextlib.contextmanager
def told_when_slow(seconds: float = 5.0) -> Iterator[None]:
    """A line on stderr where what is inside takes longer than that."""
    stream = sys.stderr  # of the caller, for a rung of the ladder may redirect it
    text = "fastrefine: preparing the networks; this is done once for each pair and number of slots"
    timer = threading.Timer(seconds, lambda: print(text, file=stream, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _warn(text: str) -> None:
    warnings.warn(text, FastrefineWarning, stacklevel=2)
