"""What is measured on a few proposals of no sample id: of the networks and the prior, or else of the first call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.noise import Stream
from fastrefine.pair import PROBE

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner
    from fastrefine.target import Target


def activations_and_logits(refiner: Refiner, n: int, why: str) -> tuple[Tensor, Tensor]:
    """(n, F) and (n,) of proposals, two and two of one label; InputError naming ``why`` without a prior."""
    if refiner.prior is None:
        raise InputError(f"{why} needs proposals to look at: pass a number, or prior= to the Refiner")
    found = [(a.flatten(1), logits) for a, _, logits in _batches(refiner, n)]
    return torch.cat([a for a, _ in found]), torch.cat([logits for _, logits in found])


def loss_error(refiner: Refiner, target: Target) -> float:
    """Rounding error of a loss, see Target.loss_error; on the first call's own latents where the prior is not theirs."""
    latents, _ = refiner._probed
    if target.is_exact or refiner.prior is None or tuple(latents.shape[1:]) != tuple(refiner.prior.shape):
        return target.loss_error()
    ((a, context, _),) = _batches(refiner, PROBE)
    return target.loss_error(a, context)


def _batches(refiner: Refiner, n: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
    """Activations, contexts as a step has them, and logits, in blocks of at most num_slots but no fewer than PROBE."""
    side, judge = refiner._generator_side, refiner._discriminator_side
    assert side is not None and judge is not None and refiner.prior is not None
    for ids in torch.arange(PROBE, PROBE + n).split(max(refiner.num_slots, PROBE)):
        z, y = refiner.prior.sample(ids, 0, refiner.dtype, Stream.PROBE).to(refiner.device), _labels(refiner, ids // 2)
        a, context = side.prefix(z, y)
        logits = judge.logits(judge.module, side.render(a, context), y).mean(1)
        yield a, (*context, y) if judge.takes_labels and y is not None else context, logits


def _labels(refiner: Refiner, which: Tensor) -> Tensor | None:
    """Classes in turn, as far as they are known; of the kind that the networks were given."""
    _, like = refiner._probed
    if like is None:
        return None
    if like.is_floating_point():
        return F.one_hot(which % like.shape[1], like.shape[1]).to(like)
    sides = (refiner._generator_side, refiner._discriminator_side)
    known = [side.num_classes for side in sides if side is not None and side.num_classes is not None]
    return (which % min(known, default=1)).to(like)
