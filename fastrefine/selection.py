"""Accept-reject over finished logits; composition is the caller's: refine, then select."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrefine import checks, ops
from fastrefine.errors import InputError
from fastrefine.ops.noise import Stream
from fastrefine.result import Result
from fastrefine.samplers.base import check_number


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


def rejection_sample(logits: Tensor | Result, percentile: float = 95, log_m: float | None = None, seed: int = 0) -> Tensor:
    """Discriminator rejection sampling ([DRS] Azadi et al. 2019, Eq. 8): positions (K,) int64 of the accepted, in order.

    logits: (N,) of the proposals, or a Result with its scale (bare tensors are taken as calibrated logits). With M the
    largest logit and delta = d - M, proposal i is accepted with probability s(F_i - gamma), where F = delta - log(1 -
    exp(delta - 1e-6)) and gamma is the ``percentile``-th percentile of F, 0 ... 100: higher accepts fewer. log_m: M of a
    pilot pass; it rises where a later logit is larger, never falls. Proposal i draws by (seed, i). Non-finite logits are
    never accepted. Few proposals may accept none: the result is then empty.

    Raises InputError on a percentile or log_m out of range, and for the scores of a critic.
    """
    check_number("percentile", percentile, 0, 100)
    d, known = _proposals(logits, "rejection_sample")
    if not bool(known.any()):
        return _positions(known)
    highest = d.max()
    if log_m is not None:
        check_number("log_m", log_m)
        highest = torch.cummax(d, 0).values.clamp(min=log_m)
    delta = d - highest
    score = delta - torch.log(-torch.expm1(delta - 1e-6))
    accept = torch.sigmoid(score - torch.quantile(score[known], percentile / 100))
    return _positions(known & (_uniform(d, seed) < accept))


def budgeted_rejection(logits: Tensor | Result, budget: float, seed: int = 0) -> Tensor:
    """Optimal budgeted rejection sampling ([OBRS] Verine et al. 2024): positions (K,) int64 of the accepted, in order.

    Accepts proposal i with probability a_i = min(1, c exp(d_i)), where c makes mean(a) = budget, in (0, 1]: of all
    acceptance functions with that mean the one whose samples are nearest to the data in every f-divergence. logits as
    in ``rejection_sample``. Where fewer than budget N logits are finite, all of those are accepted.

    Raises InputError on a budget out of range, and for the scores of a critic.
    """
    check_number("budget", budget, 0, 1, open_low=True)
    d, known = _proposals(logits, "budgeted_rejection")
    accept = torch.exp(torch.clamp(d + _log_scale(d[known], budget * len(d)), max=0))
    return _positions(known & (_uniform(d, seed) < accept))


def _log_scale(d: Tensor, wanted: float) -> float:
    """t with sum(min(1, exp(d + t))) = wanted, exactly: the k largest are at 1, the others share what is left."""
    if len(d) <= wanted:
        return math.inf
    d = torch.sort(d, descending=True).values
    rest = torch.logcumsumexp(d.flip(0), 0).flip(0)  # log sum of exp(d[k:])
    k = torch.arange(len(d), device=d.device, dtype=torch.float64)
    t = torch.log((wanted - k).clamp(min=0)) - rest
    return float(t[int((d + t <= 0).int().argmax())])


def best_of_n(logits: Tensor | Result, n: int) -> Tensor:
    """The proposal with the highest logit of each n consecutive ones: positions (N // n,) int64; the rest is unused.

    Any monotone scale serves, a critic's too; it moves the samples towards the discriminator's taste, to no stated law.
    Non-finite logits are never chosen unless a group has no other. Raises InputError when there is no complete group.
    """
    checks.count("n", n, 1)
    d = torch.as_tensor(logits.logits if isinstance(logits, Result) else logits).detach().double()
    groups = len(d) // n
    if d.dim() != 1 or groups == 0:
        raise InputError(f"logits of shape {tuple(d.shape)} do not make one group of {n}")
    table = d[: groups * n].view(groups, n)
    table = torch.where(torch.isfinite(table), table, -torch.inf)
    return torch.arange(groups, device=d.device) * n + table.argmax(1)


def _proposals(logits: Tensor | Result, what: str) -> tuple[Tensor, Tensor]:
    """(logits with -inf for those that are not finite, which are finite), each (N,)."""
    d = logits_of(logits, what)
    known = torch.isfinite(d)
    return torch.where(known, d, -torch.inf), known


def _uniform(d: Tensor, seed: int) -> Tensor:
    ids = torch.arange(len(d), device=d.device)
    backend = ops.serving(d.device, "uniform")
    return ops.uniform(seed, ids, torch.zeros_like(ids), 1, Stream.REJECTION, backend=backend)[:, 0]


def _positions(chosen: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0]
