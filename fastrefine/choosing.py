"""Accept-reject where image i owns proposals i L ... i L + L - 1: what is chosen of them depends on nothing but them.

The functions of ``selection`` read figures of all proposals at once; here those come from a pilot pass, kept in the
manifest, and every draw is by (seed, image or proposal id), so that shards and workers change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrefine.configuration import Configuration
from fastrefine.errors import InputError
from fastrefine.ops.noise import Stream
from fastrefine.selection import draw, log_scale, quantile, rejection_score, walk

PILOT = 5000
PILOT_FIRST = 2**32 - PILOT  # ids that no image owns


class Chooser:
    """One of "mh", "drs", "obrs", with its figures of the pilot pass.

    figures: JSON values: log_m and gamma of "drs", log_scale of "obrs". real: (R,) float64 logits that chains of "mh" start
    from; None: from the first proposal.
    """

    def __init__(self, configuration: Configuration, figures: Mapping[str, float], real: Tensor | None = None):
        self.configuration, self.figures, self.real = configuration, dict(figures), real

    @classmethod
    def piloted(cls, configuration: Configuration, pilot: Tensor, real: Tensor | None = None) -> Chooser:
        """With the figures of pilot logits (P,), which may hold non-finite ones."""
        d = pilot.double()
        d = d[torch.isfinite(d)]
        if not len(d):
            raise InputError("no logit of the pilot pass is finite; select=none would show what is wrong")
        figures: dict[str, float] = {}
        if configuration.select == "drs":
            highest = d.max()
            gamma = quantile(rejection_score(d - highest), configuration.percentile / 100)
            figures = {"log_m": float(highest), "gamma": float(gamma)}
        elif configuration.select == "obrs":
            figures = {"log_scale": float(log_scale(d, configuration.budget * len(d)))}
        return cls(configuration, figures, real)

    def choose(self, logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """(position (n,) int64 among an image's proposals, whether it was selected (n,) bool).

        logits: (n, L) of the proposals of the images with the ids (n,). An image none of whose proposals was accepted, or
        whose chain never moved, holds its first proposal, unselected.
        """
        table = torch.where(torch.isfinite(logits), logits.double(), -torch.inf)
        if self.configuration.select == "mh":
            return self._chains(table, images)
        return self._first_accepted(table, images)

    def _chains(self, table: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        seed = self.configuration.seed
        current, first = table[:, 0], 1
        if self.real is not None:
            u = draw(seed, None, 0, images, Stream.REFERENCE)
            current, first = self.real[(u * len(self.real)).long().clamp(max=len(self.real) - 1)], 0
        position, accepted = walk(table, current, seed, first, None, images)
        return position, accepted > 0

    def _first_accepted(self, table: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        length = table.shape[1]
        proposals = images[:, None] * length + torch.arange(length)
        u = draw(self.configuration.seed, None, 0, proposals.flatten(), Stream.REJECTION).view_as(table)
        accept = u < self._probability(table)
        return accept.int().argmax(1), accept.any(1)

    def _probability(self, d: Tensor) -> Tensor:
        if self.configuration.select == "obrs":
            return torch.exp(torch.clamp(d + self.figures["log_scale"], max=0))
        delta = (d - self.figures["log_m"]).clamp(max=0)  # a logit above the pilot's largest counts as that one
        return torch.sigmoid(rejection_score(delta) - self.figures["gamma"])


def described(chooser: Chooser | None) -> dict[str, Any]:
    """What goes into the manifest."""
    return {"pilot": PILOT, **chooser.figures} if chooser is not None and chooser.figures else {}
