"""Copy a sample's context (labels, what the prefix gives beside the activation) from the pool into its slot."""

import torch
from torch import Tensor

from fastrefine.ops.registry import op
from fastrefine.ops.slots import Slots


@op
def copy_context(slots: Slots, context: tuple[Tensor, ...], pool_context: tuple[Tensor, ...]) -> None:
    """context[s] <- pool_context[source[s]] for every slot that was refilled in the last step, in place.

    context: tensors (S, ...) of any dtype, contiguous; pool_context: the same for the pool, (P, ...). ``slots.source``
    says which row a slot took; slots with -1 keep theirs. Nothing waits for the device.
    """
    if slots.source.device.type == "cpu":  # few slots are refilled in a step: touch only those
        slot = (slots.source >= 0).nonzero()[:, 0]
        for own, pool in zip(context, pool_context, strict=True):
            own[slot] = pool[slots.source[slot]]
        return
    over_all_slots(slots.source, context, pool_context)


def over_all_slots(source: Tensor, context: tuple[Tensor, ...], pool_context: tuple[Tensor, ...]) -> None:
    """The same without a look at ``source``, which the host would have to wait for."""
    taken, row = source >= 0, source.clamp(min=0)
    for own, pool in zip(context, pool_context, strict=True):
        own.copy_(torch.where(taken.view(-1, *[1] * (own.dim() - 1)), pool[row], own))
