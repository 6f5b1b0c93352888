"""Logits of images that were not refined: real ones, or a caller's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.networks.pair import PROBE, DiscriminatorSide, attempt, check_labels

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner


def side_for(refiner: Refiner, x: Tensor, y: Tensor | None) -> DiscriminatorSide:
    """The prepared discriminator, or one prepared on these images (N, ...) where that one is labelled otherwise."""
    for side in (refiner._discriminator_side, refiner._scorer):
        if side is not None and side.takes_labels == (y is not None):
            return side
    probe = x[:PROBE].to(refiner.device, refiner.dtype)
    probe = torch.cat([probe * (1 - 0.1 * k) for k in range(-(-PROBE // len(probe)))])[:PROBE]
    labels = None if y is None else y[torch.arange(PROBE) % len(y)].to(refiner.device)
    side = refiner._new_discriminator_side(probe, labels)
    if y is not None and not side.takes_labels:
        raise InputError("labels were given, but the discriminator takes none")
    refiner._scorer = side
    return side


def logits(refiner: Refiner, side: DiscriminatorSide, x: Tensor, y: Tensor | None) -> Tensor:
    """Logits (N,) of images (N, ...) with labels (N, ...) or None, in blocks of num_slots, where the networks are."""
    if side.takes_labels and y is not None:
        check_labels(y, side.num_classes)
    parts = []
    for start in range(0, len(x), refiner.num_slots):
        # a copy, for layers may work in place
        images = x[start : start + refiner.num_slots].to(refiner.device, refiner.dtype, copy=True)
        labels = None if y is None else y[start : start + refiner.num_slots].to(refiner.device)
        parts.append(attempt("discriminator", lambda: side.logits(side.module, images, labels).mean(1), images))  # noqa: B023
    return torch.cat(parts)
