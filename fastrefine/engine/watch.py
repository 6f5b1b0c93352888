"""What a run tells its caller: that preparation takes long, and at the end what is wrong with samples, images and steps."""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
from collections.abc import Iterator

from fastrefine.diagnosis.findings import Finding, judge, of_shaped
from fastrefine.diagnosis.step_size import judged
from fastrefine.diagnosis.tally import Sums, Tally
from fastrefine.errors import NonFiniteError
from fastrefine.options import Options
from fastrefine.result import Result, Status

_told = False  # that preparation takes long


class Watch:
    """Judges a run by its parts, and raises the error for non-finite samples where that was asked for."""

    def __init__(self, options: Options, drawn: bool, shaped: bool):
        self.options, self.drawn = options, drawn  # drawn: latents are of the prior, which some judgements assume
        self.shaped = shaped  # whether D is
        self.tally = Tally()

    def see(self, part: Result, highest: float) -> None:
        """Take in a part, without waiting for a device unless errors were asked for; highest: the highest real logit."""
        if self.options.on_nonfinite == "error" and bool((bad := part.status == Status.NONFINITE).any()):
            ids = part.ids[bad].tolist()
            raise NonFiniteError(f"logit or gradient not finite for {len(ids)} samples, first ids {ids[:5]}")
        self.tally.add(part, highest)

    def findings(self) -> list[Finding]:
        """What there is to say against the run so far."""
        return findings_of(self.tally.sums, self.options, self.drawn, self.shaped)


def findings_of(sums: Sums, options: Options, drawn: bool = True, shaped: bool = False) -> list[Finding]:
    """What there is to say against a run of these options with these sums; shaped: whether its discriminator is."""
    traits = options.sampler.traits
    problem = judged(sums, options.sampler).problem
    found = judge(sums, options.max_steps, options.stop, ascends=traits.ascends and not traits.targets_density)
    if problem is not None and (drawn or not traits.stochastic):
        found = [*(one for one in found if one.code not in ("unmoved", "hardly_moved")), problem]
    return [of_shaped(one) for one in found] if shaped else found


@contextlib.contextmanager
def told_when_slow(may_be: bool, seconds: float = 5.0) -> Iterator[None]:
    """One line in a process on stderr where what is inside, if it ``may_be`` slow at all, takes longer than that."""
    if _told or not may_be:  # a thread costs a millisecond
        yield
        return
    stream = sys.stderr  # of the caller, for a rung of the ladder may redirect it
    text = "fastrefine: preparing the networks; this is done once for each pair and number of slots"
    lasts = threading.Lock()
    lasts.acquire()

    def tell() -> None:
        global _told
        if not lasts.acquire(timeout=seconds):
            _told = True
            print(text, file=stream, flush=True)

    _thread.start_new_thread(tell, ())  # threading's own would make the run wait until it has begun
    try:
        yield
    finally:
        lasts.release()
