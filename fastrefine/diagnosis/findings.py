"""What is wrong with a run, found in its sums: each finding is a code, a sentence, and advice for each kind of caller.

The same findings stand in Python's warnings, ``Result.report["findings"]``, what the commands print and a run's manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastrefine.errors import FastrefineWarning
from fastrefine.stopping import MedianOfReal, ReferenceSample, StopRule

if TYPE_CHECKING:
    from fastrefine.diagnosis.tally import Sums

BARELY = 0.05, 0.01  # of the way from raw to real images, of the spread of the raw logits: a run that gained less hardly moved
SHAPE_FIRST = "shape D first"
SHAPE_LONGER = "shape D for longer"  # where it is shaped already
SHAPE_ANEW = "if D was shaped for long, shape the D that it was made of for fewer iterations"
SHAPE = f"{SHAPE_FIRST} (fastrefine.shape_discriminator)", f"{SHAPE_FIRST} (`fastrefine shape`)"  # in Python, as a command


@dataclass(frozen=True)
class Finding:
    """code: a name that does not change. text: what was found. python, command: what to do next, in either's words."""

    code: str
    text: str
    python: str = ""
    command: str = ""

    def told(self, *, command: bool = False) -> str:
        """The finding and the advice in one line."""
        advice = self.command if command else self.python
        return f"{self.text}; {advice}" if advice else self.text

    def entry(self, *, command: bool = False) -> dict[str, str]:
        """As JSON values: {"code", "text", "advice"}."""
        return {"code": self.code, "text": self.text, "advice": self.command if command else self.python}

    def warning(self) -> FastrefineWarning:
        """The warning, which knows both forms."""
        return FastrefineWarning(self.told(), self.told(command=True))


def of_shaped(found: Finding) -> Finding:
    """The finding about a D that is shaped already: where shaping was advised, what may help instead."""
    if found.code == "exhausted":  # D may stand too far above what the generator can reach
        python = f"{SHAPE_ANEW} (fastrefine.shape_discriminator)"
        return replace(found, python=found.python.replace(SHAPE[0], python),
                       command=found.command.replace(SHAPE[1], f"{SHAPE_ANEW} (`fastrefine shape`)"))  # fmt: skip
    python, command = (text.replace(SHAPE_FIRST, SHAPE_LONGER) for text in (found.python, found.command))
    return replace(found, python=python, command=command)


def judge(sums: Sums, max_steps: int, stop: StopRule, *, ascends: bool = True) -> list[Finding]:
    """What the sums of a finished run say against it; ascends: whether the sampler's aim is a higher logit."""
    found: list[Finding] = []
    n, nonfinite, hidden, above, before = (int(sums[k]) for k in ("samples", "NONFINITE", "hidden", "above", "above_before"))
    unrefined, unchanged, reached, stalled = (int(sums[k]) for k in ("unrefined", "unchanged", "REACHED", "STALLED"))
    if not n:
        return found
    if nonfinite:
        found.append(Finding("nonfinite", f"{nonfinite} of {n} samples met a non-finite logit or gradient (status NONFINITE)"))
    if hidden:
        found.append(Finding("nonfinite_images", f"{hidden} of {n} images hold non-finite values"))
    if stalled == n:
        found.append(Finding(
            "stalled", f"0 of {n} samples moved: every gradient was exactly zero (status STALLED)",
            "refine at another place (at=), or take another discriminator",
            "refine at another place (--at), or take another discriminator",
        ))  # fmt: skip
    elif max_steps and unchanged == n and unrefined < n and sums["updates"]:
        found.append(Finding(
            "unmoved", f"nothing moved: no logit of {n} samples changed in {sums['updates'] / n:.3g} steps on average",
            "take a larger step_size, or leave it out and it is found", "give a larger --step-size, or --step-size auto",
        ))  # fmt: skip
    if max_steps and unrefined > n / 2:
        real = isinstance(stop, MedianOfReal | ReferenceSample)
        why = "D scores generated images as high as real ones" if real else "the threshold lies below most of them"
        first = [f"{words}, or " for words in SHAPE] if real else ["", ""]
        found.append(Finding(
            "unrefined",
            f"{unrefined} of {n} proposals were at the stop threshold before their first step, so they were not refined: {why}",
            f"{first[0]}pass a higher logit as stop", f"{first[1]}give a higher logit as --stop",
        ))  # fmt: skip
    if max_steps and stop.has_threshold and not reached:
        found.append(Finding(
            "exhausted", f"none of {n} samples reached the stop threshold within {max_steps} steps",
            "pass more max_steps or a larger step_size, or " + SHAPE[0] + "; for a fixed number of steps pass stop=None",
            "give more --max-steps or a larger --step-size, or " + SHAPE[1] + "; for a fixed number of steps --stop none",
        ))  # fmt: skip
    if ascends and sums["updates"] and reached <= n / 2 and not any(one.code in ("stalled", "unmoved") for one in found):
        found += _hardly_moved(sums, n)
    if max_steps and before > n / 2:  # unrefined images are what the generator makes, whatever D says
        found.append(Finding(
            "above_real", f"{before} of {n} proposals passed the highest real logit before their first step: D prefers "
            "generated images to real ones", *SHAPE,
        ))  # fmt: skip
    elif max_steps and above > n / 2:
        found.append(Finding(
            "over_refined", f"{above} of {n} logits passed the highest real logit: D takes these images for more real than "
            "every real one, so they were probably refined too far",
            "pass stop=fastrefine.stopping.MedianOfReal() with real images, or fewer max_steps",
            "give --stop median with --real, or fewer --max-steps",
        ))  # fmt: skip
    return found


def _hardly_moved(sums: Sums, n: int) -> list[Finding]:
    """Whether the logits gained next to nothing: of the way to the median real logit, or else of their spread."""
    known = sums["known"]
    if known < 2:
        return []
    gain, way = sums["gain"] / known, sums["way"] / known if sums["compared"] == known else 0.0
    spread = math.sqrt(max(sums["first_square"] / known - (sums["first"] / known) ** 2, 0.0))
    of, what, barely = (way, "of the way from raw to real images", BARELY[0]) if way > 0 else (
        spread, "of the spread of the raw logits", BARELY[1]
    )  # fmt: skip
    if not 0 <= gain < barely * of or (way <= 0 and sums["updates"] < 2 * n):  # one step alone tells little of the spread
        return []
    return [Finding(
        "hardly_moved", f"the samples hardly moved: the mean logit rose by {gain:.3g} in {sums['updates'] / n:.3g} steps on "
        f"average, which is {gain / of:.1%} {what} ({of:.3g})",
        f"take a larger step_size, or leave it out and it is found, or pass more max_steps; if that does not help, {SHAPE[0]}",
        f"give a larger --step-size, or --step-size auto, or more --max-steps; if that does not help, {SHAPE[1]}",
    )]  # fmt: skip
