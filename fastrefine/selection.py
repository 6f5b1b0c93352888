"""Accept-reject over finished logits; composition is the caller's: refine, then select."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrefine import checks, ops
from fastrefine.errors import InputError
from fastrefine.ops.noise import Stream
from fastrefine.result import Result


@dataclass(frozen=True)
class MHResult:
    """What Metropolis-Hastings chose.

    indices: (M,) int64 positions among the proposals, one for each chain. acceptance_rate: accepted share of all tests.
    moved: (M,) bool; False where a chain never accepted a proposal (started from a real image it then holds its first
    proposal, unselected).
    """

    indices: Tensor
    acceptance_rate: float
    moved: Tensor


def logits_of(logits: Tensor | Result, what: str) -> Tensor:
    """(N,) float64 logits of a tensor, taken as logits, or of a result; InputError for a critic's scale."""
    if isinstance(logits, Result):
        if logits.scale == "critic":
            raise InputError(
                f"{what} needs logits of a probability, but the result comes from a Wasserstein critic; calibrate its "
                "scores and pass them as a tensor"
            )
        logits = logits.logits
    found = torch.as_tensor(logits).detach().double()
    if found.dim() != 1:
        raise InputError(f"{what} wants logits of shape (N,), got {tuple(found.shape)}")
    return found


def metropolis_hastings(
    logits: Tensor | Result, chain_length: int = 20, initial_logits: Tensor | None = None, seed: int = 0
) -> MHResult:
    """Metropolis-Hastings independence sampler ([MHGAN] Turner et al. 2019; [CS] 3.4): one chain for each output.

    logits: (N,) of the proposals, or a Result with its scale (bare tensors are taken as calibrated logits). Chain i
    tests proposals i L ... i L + L - 1 in order, L = chain_length; N // L chains, left-over proposals are unused. It
    accepts with min(1, exp(d_new - d_old)), in log space. It starts from its first proposal or, where ``initial_logits``
    (R,) of real images are given, from one of them drawn by (seed, i). A non-finite proposal is never accepted.

    Raises InputError when there is no complete chain, and for the scores of a critic.
    """
    checks.count("chain_length", chain_length, 1)
    proposals = logits_of(logits, "metropolis_hastings")
    chains = len(proposals) // chain_length
    if chains == 0:
        raise InputError(f"{len(proposals)} logits do not make one chain of {chain_length}")
    table = proposals[: chains * chain_length].view(chains, chain_length)
    table = torch.where(torch.isfinite(table), table, -torch.inf)  # a chain that starts there leaves at once
    ids = torch.arange(chains, device=table.device)
    current, first = table[:, 0], 1
    if initial_logits is not None:
        start = logits_of(initial_logits, "metropolis_hastings")
        if len(start) == 0 or not bool(torch.isfinite(start).all()):
            raise InputError("initial_logits must hold one or more finite logits of real images")
        u = ops.uniform(seed, ids, torch.zeros_like(ids), 1, Stream.REFERENCE)[:, 0]
        current, first = start.to(table.device)[(u * len(start)).long().clamp(max=len(start) - 1)], 0
    backend = ops.serving(table.device, "metropolis")
    position, accepted = ops.metropolis(table, current, seed, first, Stream.SELECTION, backend=backend)
    tests = chains * (chain_length - first)
    rate = int(accepted.sum()) / tests if tests else 0.0
    return MHResult(ids * chain_length + position, rate, accepted > 0)
