"""B0, the peers' loop that throughput is compared with: what published implementations do, not slowed down."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCHES = (64, 256, 1024)


def refine_b0(prefix: nn.Module, tail: nn.Module, discriminator: nn.Module, z: Tensor, step_size: float, steps: int) -> Tensor:
    """Collaborative refinement of a batch (N, ...): prefix once, ``.backward()`` with parameter gradients on, K steps for all.

    The loss is the sum over the batch of -log D, so each sample moves by its own gradient.
    """
    with torch.no_grad():
        a = prefix(z)
    for _ in range(steps):
        a = a.detach().requires_grad_()
        F.softplus(-discriminator(tail(a))).sum().backward()
        assert a.grad is not None
        a = a - step_size * a.grad
    with torch.no_grad():
        return tail(a)


def images_per_second_b0(
    prefix: nn.Module, tail: nn.Module, discriminator: nn.Module, latents: Tensor, step_size: float, steps: int
) -> float:
    """Throughput of the loop at its best batch size; latents (N, ...) with N at least the largest batch size tried."""
    best = 0.0
    for size in (b for b in BATCHES if b <= len(latents)):
        refine_b0(prefix, tail, discriminator, latents[:size], step_size, min(steps, 2))  # warm-up
        started = time.perf_counter()
        for batch in latents[: len(latents) // size * size].split(size):
            refine_b0(prefix, tail, discriminator, batch, step_size, steps)
        best = max(best, len(latents) // size * size / (time.perf_counter() - started))
    for module in (tail, discriminator):
        module.zero_grad(set_to_none=True)
    return best
