"""Metropolis-Hastings over finished logits in Triton; specification: ``fastrefine.ops.metropolis``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import seed_bits, uniform_at

CHAINS = 128  # per program


@triton.jit(do_not_specialize=["seed", "chains", "length", "first", "stream"])
def metropolis_scan(
    table_ptr, current_ptr, position_ptr, accepted_ptr, seed: tl.int64, chains, length, first, stream, BLOCK: tl.constexpr,
):  # fmt: skip
    """A lane per chain, which walks along its row; the rows' sectors stay in the cache from one test to the next."""
    chain = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = chain < chains
    element = tl.zeros([BLOCK], tl.int32)
    current = tl.load(current_ptr + chain, mask=inside, other=0.0)
    position = tl.zeros([BLOCK], tl.int64)
    accepted = tl.zeros([BLOCK], tl.int64)
    k = first
    while k < length:  # as in refine_reduce
        d = tl.load(table_ptr + chain * length + k, mask=inside, other=0.0)
        u = uniform_at(seed, element, element + k, chain, stream)
        accept = (tl.log(u) < d - current) & (tl.abs(d) < float("inf"))
        current = tl.where(accept, d, current)
        position = tl.where(accept, k, position)
        accepted += accept.to(tl.int64)
        k += 1
    tl.store(position_ptr + chain, position, mask=inside)
    tl.store(accepted_ptr + chain, accepted, mask=inside)


def metropolis(table: Tensor, current: Tensor, seed: int, first: int, stream: int) -> tuple[Tensor, Tensor]:
    """As ``ops.metropolis``, on GPU tensors (CPU tensors under TRITON_INTERPRET=1)."""
    chains, length = table.shape
    assert table.dtype == current.dtype == torch.float64 and table.device == current.device
    position, accepted = (torch.zeros(chains, dtype=torch.int64, device=table.device) for _ in range(2))
    with torch.cuda.device_of(table):
        metropolis_scan[(triton.cdiv(chains, CHAINS),)](
            table.contiguous(), current.contiguous(), position, accepted, seed_bits(seed), chains, length, first, int(stream),
            BLOCK=CHAINS, enable_fp_fusion=False,
        )  # fmt: skip
    return position, accepted
