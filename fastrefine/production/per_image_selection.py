"""Selection in sharded runs: image i owns proposals i L ... i L + L - 1, and the choice among them depends on nothing else.

``fastrefine.selection`` takes M, gamma and c from all proposals at once. Here a pilot pass gives them, the manifest keeps
them, and every draw is by (seed, image or proposal id). So neither shard size nor the number of workers changes a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrefine.diagnosis.calibration import Calibration, calibrate
from fastrefine.errors import InputError
from fastrefine.noise import Stream
from fastrefine.production.configuration import CLASSES, Configuration
from fastrefine.selection import draw, finite, log_scale, quantile, rejection_score, walk
from fastrefine.stopping import RealLogits

PILOT, PER_CLASS = 5000, 200  # proposals of a pilot pass at least, and of each class of it


@dataclass(frozen=True)
class Chooser:
    """Chooses one of the proposals of each image, by "mh", "drs" or "obrs".

    figures: of the pilot pass, by class (None without classes): log_m and gamma for "drs", log_scale for "obrs". real: logits
    that the chains of "mh" start from, of the image's class where they are labelled; None: from the first proposal.
    calibration: of the logits before they are read; ``figures`` and ``real`` are of calibrated ones.
    """

    configuration: Configuration
    figures: Mapping[int | None, Mapping[str, float]]
    real: RealLogits | None = None
    calibration: Calibration | None = None

    @classmethod
    def piloted(
        cls, configuration: Configuration, pilot: Tensor, labels: Tensor | None = None, real: RealLogits | None = None,
        held_out: Tensor | None = None,
    ) -> Chooser:  # fmt: skip
        """With what is learned from pilot logits (P,), which may hold non-finite ones, and their labels (P,).

        held_out: logits (R,) of real images that calibrate the others; None: nothing is calibrated.
        """
        calibration = None
        if held_out is not None:
            calibration = calibrate(held_out, pilot[torch.isfinite(pilot)], configuration.calibrate)
            pilot = calibration(pilot)
            real = None if real is None else replace(real, logits=calibration(real.logits))
        figures: dict[int | None, dict[str, float]] = {}
        if configuration.select != "mh":
            classes: list[int | None] = [None] if labels is None else labels.unique().tolist()
            figures = {y: _figures(configuration, pilot if y is None else pilot[labels == y]) for y in classes}
        return cls(configuration, figures, real, calibration)

    def choose(self, logits: Tensor, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(column (n,) int64 of the chosen proposal, whether it was selected (n,) bool).

        logits: (n, L) of the proposals of the images with these ids and labels (n,). Where no proposal of an image was
        accepted, or its chain never moved, its first proposal is returned, not selected.
        """
        if self.calibration is not None:
            logits = self.calibration(logits.flatten()).view_as(logits)
        table, seed, length = finite(logits.double()), self.configuration.seed, logits.shape[1]
        if self.configuration.select == "mh":
            current, first = table[:, 0], 1
            if self.real is not None:
                current, first = self.real.reference(images, seed, labels), 0
            position, accepted = walk(table, current, seed, first, None, images)
            return position, accepted > 0
        proposals = images[:, None] * length + torch.arange(length)
        u = draw(seed, None, 0, proposals.flatten(), Stream.REJECTION).view_as(table)
        accept = u < self._probability(table, [None] * len(table) if labels is None else labels.tolist())
        return accept.int().argmax(1), accept.any(1)

    def _probability(self, d: Tensor, classes: list[int | None]) -> Tensor:
        """(n, L) probabilities of accepting proposals with logits d of images of these classes."""

        def figure(name: str) -> Tensor:
            return torch.tensor([self.figures[y][name] for y in classes], dtype=torch.float64)[:, None]

        if self.configuration.select == "obrs":
            return torch.exp((d + figure("log_scale")).clamp(max=0))
        delta = (d - figure("log_m")).clamp(max=0)  # a logit above the pilot's largest counts as that one
        return torch.sigmoid(rejection_score(delta) - figure("gamma"))


def pilot_size(configuration: Configuration) -> int:
    """Proposals of the pilot pass."""
    return max(PILOT, PER_CLASS * configuration.num_classes if configuration.classes in CLASSES else 0)


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
    """The pilot pass as the manifest keeps it."""
    if chooser is None or not chooser.figures:
        return {}
    of = chooser.figures
    return {"pilot": pilot_size(chooser.configuration), **of.get(None, {"classes": {str(y): dict(f) for y, f in of.items()}})}
