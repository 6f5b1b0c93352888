"""Metropolis-Hastings over finished logits: independent chains, each through its own row of proposals."""

import torch
from torch import Tensor

from fastrefine.ops.noise import uniform
from fastrefine.ops.registry import op


@op
def metropolis(table: Tensor, current: Tensor, seed: int, first: int, stream: int) -> tuple[Tensor, Tensor]:
    """The position (N,) at which each chain ends, 0 where it never moved, and how often it moved (N,), both int64.

    table: (N, L) float64 logits of the proposals; chain i tests table[i, first:] in order. current: (N,) float64, where
    the chains start. Test k accepts when log u < table[i, k] - current, u = uniform(seed, i, k, 1, stream); a
    non-finite proposal is never accepted.
    """
    chains, length = table.shape
    ids = torch.arange(chains, device=table.device)
    position, accepted = torch.zeros_like(ids), torch.zeros_like(ids)
    for k in range(first, length):
        u = uniform(seed, ids, torch.full_like(ids, k), 1, stream)[:, 0]
        accept = (torch.log(u) < table[:, k] - current) & torch.isfinite(table[:, k])
        current = torch.where(accept, table[:, k], current)
        position.masked_fill_(accept, k)
        accepted += accept
    return position, accepted
