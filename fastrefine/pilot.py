"""What is measured on a few proposals of no sample id: it depends on the networks and the prior, never on a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.ops.noise import Stream
from fastrefine.pair import PROBE
from fastrefine.priors import Normal, Prior

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner
    from fastrefine.target import Target


def activations_and_logits(refiner: Refiner, n: int, why: str) -> tuple[Tensor, Tensor]:
    """(n, F) and (n,) of proposals, two and two of one label; InputError naming ``why`` without a prior."""
    if refiner.prior is None:
        raise InputError(f"{why} needs proposals to look at: pass a number, or prior= to the Refiner")
    found = [(a.flatten(1), logits) for a, _, logits in _batches(refiner, n, refiner.prior)]
    return torch.cat([a for a, _ in found]), torch.cat([logits for _, logits in found])


def loss_error(refiner: Refiner, target: Target) -> float:
    """Rounding error of a loss, see Target.loss_error; on normal latents where the prior is not theirs."""
    if target.is_exact:
        return target.loss_error()
    shape, prior = tuple(refiner._probed[0].shape[1:]), refiner.prior
    if prior is None or tuple(prior.shape) != shape:
        prior = Normal(*shape)
    ((a, context, _),) = _batches(refiner, PROBE, prior)
    return target.loss_error(a, context)


def _batches(refiner: Refiner, n: int, prior: Prior) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
    """Activations, contexts as a step has them, and logits, in blocks of at most num_slots but no fewer than PROBE."""
    side, judge = refiner._generator_side, refiner._discriminator_side
    assert side is not None and judge is not None
    for ids in torch.arange(PROBE, PROBE + n).split(max(refiner.num_slots, PROBE)):
        z, y = prior.sample(ids, 0, refiner.dtype, Stream.PROBE).to(refiner.device), _labels(refiner, ids // 2)
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
