"""Sums over the samples of a run: what its judgements and its summary are made of. Those of its parts add up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrefine.result import Result, Status

# of what there is one for each sample. known: both logits are finite, of which gain and first are sums. compared: of these,
# where the real logits are known; way: from the first logit to the real median.
Sums = Mapping[str, float]

MEANT = {  # each status in words
    "REACHED": "stopped by the rule", "EXHAUSTED": "took all steps", "STALLED": "had no gradient",
    "NONFINITE": "met a value that is not finite",
}  # fmt: skip


class Tally:
    """Adds results up, on their device: only ``sums`` waits for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._real: Tensor | None = None
        self._median = math.nan  # of these

    def add(self, part: Result, highest: float = math.inf) -> None:
        """highest: the highest logit of a real image, where it is known."""
        logits, first = part.logits.double(), part.initial_logits.double()
        gain = logits - first
        known = torch.isfinite(gain)
        gain, start = torch.where(known, gain, 0.0), torch.where(known, first, 0.0)
        accepted = torch.full_like(gain, torch.nan) if part.acceptance is None else part.acceptance.double()
        tested = ~torch.isnan(accepted)
        if part.real_logits is not self._real:  # all parts of a run have the same
            self._real, self._median = part.real_logits, _median(part.real_logits)
        compared = known & math.isfinite(self._median)
        hidden = ~part.images.isfinite()
        columns = {
            "samples": torch.ones_like(gain), "updates": part.steps, "falls": part.logit_falls, "known": known,
            "compared": compared, "way": torch.where(compared, self._median - start, 0.0),
            "gain": gain, "gain_square": gain * gain, "first": start, "first_square": start * start,
            "tested": tested, "accepted": torch.where(tested, accepted, 0.0),
            **{status.name: part.status == status for status in Status},
            "hidden": hidden.flatten(1).any(1) if hidden.dim() > 1 else hidden,
            "unrefined": (part.status == Status.REACHED) & (part.steps == 0), "unchanged": logits == first,
            "above": logits > highest, "above_before": first > highest,
        }  # fmt: skip
        sums = torch.stack([column.double() for column in columns.values()]).sum(1)
        self._sums, self._names = sums if self._sums is None else self._sums + sums, tuple(columns)

    @property
    def sums(self) -> Counter[str]:
        """By name: ``samples``, ``updates``, the statuses, and so on; 0 of what was not added."""
        return Counter({} if self._sums is None else dict(zip(self._names, self._sums.tolist(), strict=True)))


def summary(sums: Sums) -> dict[str, Any]:
    """What a run did, from its sums: images, mean logits before and after, mean steps, and the share of each status.

    The logits are means over the samples whose logits are finite, None without any.
    """
    n, known = int(sums["samples"]), sums["known"]
    before = sums["first"] / known if known else None
    return {
        "images": n, "logit_before": before, "logit_after": None if before is None else before + sums["gain"] / known,
        "mean_steps": sums["updates"] / n if n else 0.0,
        "status": {status.name: sums[status.name] / n if n else 0.0 for status in Status},
    }  # fmt: skip


def ended(run: Mapping[str, Any]) -> str:
    """How the samples of a ``summary`` ended, in words: the share of each status, or that no steps were wanted."""
    status = run["status"]
    if status[Status.EXHAUSTED.name] == 1 and not run["mean_steps"]:
        return "no steps were allowed, so images are as the generator makes them"
    return ", ".join(f"{share:.1%} {MEANT[name]} ({name})".replace(".0%", "%") for name, share in status.items() if share)


def _median(logits: Tensor | None) -> float:
    """Of the finite ones; NaN where there are none."""
    finite = torch.zeros(0) if logits is None else logits[torch.isfinite(logits)]
    return float(finite.double().median()) if len(finite) else math.nan
