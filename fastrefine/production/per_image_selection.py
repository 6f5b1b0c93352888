"""Accept-reject where image i owns proposals i L ... i L + L - 1: what is chosen of them depends on nothing but them.

The functions of ``selection`` read figures of all proposals at once; here those come from a pilot pass, kept in the
manifest, and every draw is by (seed, image or proposal id), so that shards and workers change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.noise import Stream
from fastrefine.production.configuration import Configuration
from fastrefine.selection import draw, log_scale, quantile, rejection_score, walk
from fastrefine.stopping import RealLogits

PILOT, PER_CLASS = 5000, 200  # proposals at least


class Chooser:
    """One of "mh", "drs", "obrs", with its figures of the pilot pass: those of each class where images are labelled.

    figures: of each class, None where there are none: log_m and gamma of "drs", log_scale of "obrs". real: logits that
    chains of "mh" start from, those of the image's class where they are labelled; None: from the first proposal.
    """

    def __init__(
        self, configuration: Configuration, figures: Mapping[int | None, Mapping[str, float]], real: RealLogits | None = None
    ):
        self.configuration, self.figures, self.real = configuration, dict(figures), real

    @classmethod
    def piloted(cls, configuration: Configuration, pilot: Tensor, labels: Tensor | None = None) -> Chooser:
        """With the figures of pilot logits (P,), which may hold non-finite ones, and their labels (P,)."""
        if labels is None:
            return cls(configuration, {None: _figures(configuration, pilot)})
        classes = labels.unique().tolist()
        return cls(configuration, {y: _figures(configuration, pilot[labels == y]) for y in classes})

    def choose(self, logits: Tensor, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(position (n,) int64 among an image's proposals, whether it was selected (n,) bool).

        logits: (n, L) of the proposals of the images with the ids and labels (n,). An image none of whose proposals was
        accepted, or whose chain never moved, holds its first proposal, unselected.
        """
        table = torch.where(torch.isfinite(logits), logits.double(), -torch.inf)
        if self.configuration.select == "mh":
            return self._chains(table, images, labels)
        return self._first_accepted(table, images, labels)

    def _chains(self, table: Tensor, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        seed = self.configuration.seed
        current, first = table[:, 0], 1
        if self.real is not None:
            u = draw(seed, None, 0, images, Stream.REFERENCE)

            def pick(real: Tensor, at: Tensor) -> Tensor:
                return real[(u[at] * len(real)).long().clamp(max=len(real) - 1)]

            current, first = self.real.per_sample(labels, pick, len(images)), 0
        position, accepted = walk(table, current, seed, first, None, images)
        return position, accepted > 0

    def _first_accepted(self, table: Tensor, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        length = table.shape[1]
        proposals = images[:, None] * length + torch.arange(length)
        u = draw(self.configuration.seed, None, 0, proposals.flatten(), Stream.REJECTION).view_as(table)
        if labels is None:
            accept = u < self._probability(table, self.figures[None])
        else:
            accept = torch.zeros_like(table, dtype=torch.bool)
            for y in labels.unique().tolist():
                of = labels == y
                accept[of] = u[of] < self._probability(table[of], self.figures[y])
        return accept.int().argmax(1), accept.any(1)

    def _probability(self, d: Tensor, figures: Mapping[str, float]) -> Tensor:
        if self.configuration.select == "obrs":
            return torch.exp(torch.clamp(d + figures["log_scale"], max=0))
        delta = (d - figures["log_m"]).clamp(max=0)  # a logit above the pilot's largest counts as that one
        return torch.sigmoid(rejection_score(delta) - figures["gamma"])


def pilot_size(configuration: Configuration) -> int:
    """Proposals of the pilot pass."""
    return max(PILOT, PER_CLASS * configuration.num_classes if configuration.classes == "random" else 0)


def _figures(configuration: Configuration, pilot: Tensor) -> dict[str, float]:
    d = pilot.double()
    d = d[torch.isfinite(d)]
    if not len(d):
        raise InputError("no logit of the pilot pass is finite; select=none would show what is wrong")
    if configuration.select == "obrs":
        return {"log_scale": float(log_scale(d, configuration.budget * len(d)))}
    highest = d.max()
    gamma = quantile(rejection_score(d - highest), configuration.percentile / 100)
    return {"log_m": float(highest), "gamma": float(gamma)}


def described(chooser: Chooser | None) -> dict[str, Any]:
    """What goes into the manifest."""
    if chooser is None or not chooser.figures:
        return {}
    of = chooser.figures
    return {"pilot": pilot_size(chooser.configuration), **of.get(None, {"classes": {str(y): dict(f) for y, f in of.items()}})}
