"""Accept-reject over finished logits; composition is the caller's: refine, then select.

Classes: with ``labels`` (whole numbers (N,), vectors (N, C) read by their largest entry, or one class for all; of a result:
``labels=out.labels``) every class is selected by itself, as if the others were not there. Its draws are functions of (seed,
class, place in the class), so neither other classes nor how they are mixed changes what is chosen of it.

Trust: three of the functions read exp(logit) as a density ratio. Of a result that brings the real logits of its run
(``Refiner(real=...)``) they ask ``Diagnosis.trusted`` first: untrusted="warn" (FastrefineWarning) | "refuse" (InputError) |
"allow" (unasked). Tensors are taken as calibrated logits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.diagnosis.calibration import classes_of, judge, logits_of
from fastrefine.errors import FastrefineWarning, InputError
from fastrefine.noise import Stream, philox
from fastrefine.result import Result

MOVED = 0.01  # share of the chains below which they are said to be stuck


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

    def __repr__(self) -> str:
        moved = int(self.moved.sum())
        return f"MHResult({len(self.indices)} chains, {moved} moved, acceptance rate {self.acceptance_rate:.3g})"


def metropolis_hastings(
    logits: Tensor | Result,
    chain_length: int = 20,
    initial_logits: Tensor | None = None,
    seed: int = 0,
    *,
    labels: Any = None,
    initial_labels: Any = None,
    untrusted: str = "warn",
) -> MHResult:
    """Metropolis-Hastings independence sampler ([MHGAN] Turner et al. 2019; [CS] 3.4): one chain for each output.

    logits: (N,) of the proposals, or a Result (see the module on trust). Chain i tests proposals i L ... i L + L - 1 in
    order, L = chain_length; N // L chains, left-over proposals are unused. It accepts with min(1, exp(d_new - d_old)), in
    log space. It starts from its first proposal or, where ``initial_logits`` (R,) of real images are given, from one of
    them drawn by (seed, i). A non-finite proposal is never accepted.

    labels: chain k of a class tests proposals k L ... k L + L - 1 of that class, from a real logit of it
    (``initial_labels``, (R,)); the outputs come class by class in ascending order, in each in the order of the chains.

    Warns where less than 1 % of the chains moved, and of classes too small for a chain. Raises InputError when there is no
    complete chain, no real logit of a class, for the scores of a critic, and for untrusted logits under "refuse".
    """
    what = "metropolis_hastings"
    checks.count("chain_length", chain_length, 1)
    proposals = logits_of(logits, what)
    judge(logits, what, untrusted)
    groups = _grouped(labels, len(proposals), proposals.device)
    positions, label, chain = groups.tables(chain_length, what, "chain")
    table = proposals[positions]
    table = torch.where(torch.isfinite(table), table, -torch.inf)  # a chain that starts there leaves at once
    current, first = table[:, 0], 1
    if initial_logits is not None:
        current, first = _starts(initial_logits, initial_labels, label, chain, seed), 0
    elif initial_labels is not None:
        raise InputError("initial_labels were given without initial_logits")
    position, accepted = walk(table, current, seed, first, label, chain)
    tests, moved = len(table) * (chain_length - first), accepted > 0
    rate = int(accepted.sum()) / tests if tests else 0.0
    if tests and int(moved.sum()) < MOVED * len(moved):
        _warn(
            f"{what}: {int(moved.sum())} of {len(moved)} chains moved in {chain_length} proposals (acceptance {rate:.2g}): "
            "the others hold their first proposal"
        )
    return MHResult(positions.gather(1, position[:, None])[:, 0], rate, moved)


def walk(table: Tensor, current: Tensor, seed: int, first: int, label: Tensor | None, chain: Tensor) -> tuple[Tensor, Tensor]:
    """(the test at which each chain moved last (M,), 0 where it never moved, how often it moved (M,)), both int64.

    table: (M, L) logits of the proposals, each finite or -inf; chain i tests table[i, first:] in order, from ``current`` (M,).
    Test k accepts where log u < table[i, k] - current; u is drawn by (seed, class, chain of the class, k).
    """
    position, accepted = torch.zeros_like(chain), torch.zeros_like(chain)
    for k in range(first, table.shape[1]):
        accept = torch.log(draw(seed, label, k, chain, Stream.SELECTION)) < table[:, k] - current
        current = torch.where(accept, table[:, k], current)
        position.masked_fill_(accept, k)
        accepted += accept
    return position, accepted


def _starts(logits: Tensor, labels: Any, label: Tensor | None, chain: Tensor, seed: int) -> Tensor:
    """(M,) real logits for the chains, each of its chain's class."""
    start = logits_of(logits, "metropolis_hastings")
    if len(start) == 0 or not bool(torch.isfinite(start).all()):
        raise InputError("initial_logits must hold one or more finite logits of real images")
    if (labels is None) != (label is None):
        raise InputError("chains by class that start from real images need both labels and initial_labels")
    start = start.to(chain.device)
    u = draw(seed, label, 0, chain, Stream.REFERENCE)
    if label is None:
        return start[(u * len(start)).long().clamp(max=len(start) - 1)]
    groups = _grouped(labels, len(start), start.device, "initial_labels")
    sizes = torch.tensor(groups.sizes, device=start.device)
    classes = groups.classes
    at = torch.searchsorted(classes, label).clamp(max=len(classes) - 1)
    missing = label[classes[at] != label].unique().tolist()
    if missing:
        raise InputError(f"initial_logits hold no real image of {len(missing)} classes, first {missing[:5]}")
    place = torch.minimum((u * sizes[at]).long(), sizes[at] - 1)
    return start[groups.order][(sizes.cumsum(0) - sizes)[at] + place]


def rejection_sample(
    logits: Tensor | Result,
    percentile: float = 95,
    log_m: float | Mapping[int, float] | None = None,
    seed: int = 0,
    *,
    labels: Any = None,
    untrusted: str = "warn",
) -> Tensor:
    """Discriminator rejection sampling ([DRS] Azadi et al. 2019, Eq. 8): positions (K,) int64 of the accepted, in order.

    logits: (N,) of the proposals, or a Result (see the module on trust). With M the largest logit and delta = d - M,
    proposal i is accepted with probability s(F_i - gamma), where F = delta - log(1 - exp(delta - 1e-6)) and gamma is the
    ``percentile``-th percentile of F, 0 ... 100: higher accepts fewer. log_m: M of a pilot pass; it rises where a later
    logit is larger, never falls. Proposal i draws by (seed, i). Non-finite logits are never accepted. One pass is all:
    K may be anything, K / N is the acceptance rate.

    labels: M and gamma of each class by itself; log_m is then one number for all, or {class: number}.

    Warns where nothing was accepted, in all or of a class. Raises InputError on a percentile or log_m out of range, for the
    scores of a critic, and for untrusted logits under "refuse".
    """
    what = "rejection_sample"
    checks.number("percentile", percentile, 0, 100)
    d, known = _proposals(logits, what)
    judge(logits, what, untrusted)
    groups = _grouped(labels, len(d), d.device)
    if isinstance(log_m, Mapping) and labels is None:
        raise InputError("log_m by class needs labels")
    floors = [_floor(log_m, label) for label in groups.classes.tolist()]

    def accept(d: Tensor, known: Tensor, floor: float | None) -> Tensor:
        highest = d.max() if floor is None else torch.cummax(d, 0).values.clamp(min=floor)
        score = rejection_score(d - highest)
        return torch.sigmoid(score - quantile(score[known], percentile / 100))

    return groups.accepted([accept(*args) for args in zip(*groups.split(d, known), floors, strict=True)], seed, what)


def rejection_score(delta: Tensor) -> Tensor:
    """F before gamma is taken off ([DRS] Eq. 8), of delta = d - M <= 0."""
    return delta - torch.log(-torch.expm1(delta - 1e-6))


def _floor(log_m: float | Mapping[int, float] | None, label: int) -> float | None:
    if isinstance(log_m, Mapping):
        if label not in log_m:
            raise InputError(f"log_m holds no number for class {label}")
        log_m = log_m[label]
    if log_m is not None:
        checks.number("log_m", log_m)
    return log_m


def quantile(x: Tensor, q: float) -> Tensor:
    """As torch.quantile, for any number of values; NaN of none."""
    if len(x) == 0:
        return x.new_full((), torch.nan)
    x, at = torch.sort(x).values, q * (len(x) - 1)
    return torch.lerp(x[math.floor(at)], x[math.ceil(at)], at - math.floor(at))


def budgeted_rejection(
    logits: Tensor | Result, budget: float, seed: int = 0, *, labels: Any = None, untrusted: str = "warn"
) -> Tensor:
    """Optimal budgeted rejection sampling ([OBRS] Verine et al. 2024): positions (K,) int64 of the accepted, in order.

    Accepts proposal i with probability a_i = min(1, c exp(d_i)), where c makes mean(a) = budget, in (0, 1]: of all
    acceptance functions with that mean the one whose samples are nearest to the data in every f-divergence. logits as
    in ``rejection_sample``. Where fewer than budget N logits are finite, all of those are accepted. K / N is the acceptance
    rate.

    labels: the budget holds in each class, so that every class keeps its share of the samples, and its samples are the
    nearest to its data. Without labels one c serves all, and classes that D prefers gain share.

    Warns as ``rejection_sample``. Raises InputError on a budget out of range, for the scores of a critic, and for untrusted
    logits under "refuse".
    """
    what = "budgeted_rejection"
    checks.number("budget", budget, 0, 1, open_low=True)
    d, known = _proposals(logits, what)
    judge(logits, what, untrusted)
    groups = _grouped(labels, len(d), d.device)

    def accept(d: Tensor, known: Tensor) -> Tensor:
        return torch.exp(torch.clamp(d + log_scale(d[known], budget * len(d)), max=0))

    return groups.accepted([accept(*args) for args in zip(*groups.split(d, known), strict=True)], seed, what)


def log_scale(d: Tensor, wanted: float) -> Tensor:
    """t with sum(min(1, exp(d + t))) = wanted, exactly: the k largest are at 1, the others share what is left."""
    if len(d) <= wanted:
        return d.new_full((), torch.inf)
    d = torch.sort(d, descending=True).values
    rest = torch.logcumsumexp(d.flip(0), 0).flip(0)  # log sum of exp(d[k:])
    k = torch.arange(len(d), device=d.device, dtype=torch.float64)
    t = torch.log((wanted - k).clamp(min=0)) - rest
    return t[(d + t <= 0).int().argmax()]


def best_of_n(logits: Tensor | Result, n: int, *, labels: Any = None) -> Tensor:
    """The proposal with the highest logit of each n consecutive ones: positions (N // n,) int64; the rest is unused.

    Any monotone scale serves, a critic's too; it moves the samples towards the discriminator's taste, to no stated law.
    Non-finite logits are never chosen unless a group has no other. labels: groups of n consecutive proposals of one class,
    class by class in ascending order; warns of classes with fewer. Raises InputError when there is no complete group.
    """
    checks.count("n", n, 1)
    d = torch.as_tensor(logits.logits if isinstance(logits, Result) else logits).detach().double()
    if d.dim() != 1:
        raise InputError(f"best_of_n wants logits of shape (N,), got {tuple(d.shape)}")
    positions = _grouped(labels, len(d), d.device).tables(n, "best_of_n", "group")[0]
    table = d[positions]
    table = torch.where(torch.isfinite(table), table, -torch.inf)
    return positions.gather(1, table.argmax(1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class _Groups:
    """Proposals class by class; without labels one group of all."""

    order: Tensor  # (N,) positions, ascending in class, within a class in order
    label: Tensor | None  # (N,) class of each of them
    rank: Tensor  # (N,) place of each of them in its class
    classes: Tensor  # (C,) ascending
    sizes: list[int]  # of the classes

    def split(self, *values: Tensor) -> list[tuple[Tensor, ...]]:
        """Values (N,) class by class."""
        return [value[self.order].split(self.sizes) for value in values]

    def tables(self, length: int, what: str, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """(positions (M, length), class of each row (M,), number of the row in its class (M,)); warns of small classes."""
        small = [label for label, size in zip(self.classes.tolist(), self.sizes, strict=True) if size < length]
        if len(small) == len(self.sizes):
            one = "" if self.label is None else " of one class"
            raise InputError(f"{what}: {len(self.order)} logits do not make one {name} of {length}{one}")
        if small:
            count = f"{len(small)} of {len(self.sizes)} classes"
            _warn(f"{what}: {count} make no {name} of {length} and are left out, first {small[:5]}", 4)
        whole = torch.tensor([size // length * length for size in self.sizes], device=self.order.device)
        sizes = torch.tensor(self.sizes, device=self.order.device)
        kept = self.rank < whole.repeat_interleave(sizes)
        label = None if self.label is None else self.label[kept][::length].contiguous()
        return self.order[kept].view(-1, length), label, self.rank[kept][::length] // length

    def accepted(self, probability: list[Tensor], seed: int, what: str) -> Tensor:
        """(K,) ascending positions accepted with the probabilities (NaN: never), given class by class; warns of none."""
        if not probability:
            return self.order
        u = draw(seed, self.label, 0, self.rank, Stream.REJECTION)
        chosen = u < torch.cat(probability)
        hit = torch.stack([of.any() for of in chosen.split(self.sizes)]).tolist()
        none = [label for label, any_of_it in zip(self.classes.tolist(), hit, strict=True) if not any_of_it]
        if none and len(none) == len(self.sizes):
            _warn(f"{what}: accepted none of {len(chosen)} proposals", 4)
        elif none:
            _warn(f"{what}: accepted no proposal of {len(none)} of {len(self.sizes)} classes, first {none[:5]}", 4)
        return torch.sort(self.order[chosen]).values


def _grouped(labels: Any, n: int, device: torch.device, name: str = "labels") -> _Groups:
    everyone = torch.arange(n, device=device)
    if labels is None:
        return _Groups(everyone, None, everyone, torch.zeros(int(n > 0), dtype=torch.int64, device=device), [n] * (n > 0))
    label, order = torch.sort(classes_of(labels, name, n).to(device), stable=True)
    classes, sizes = label.unique_consecutive(return_counts=True)
    rank = everyone - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return _Groups(order, label, rank, classes, sizes.tolist())


def _proposals(logits: Tensor | Result, what: str) -> tuple[Tensor, Tensor]:
    """(logits with -inf for those that are not finite, which are finite), each (N,)."""
    d = logits_of(logits, what)
    known = torch.isfinite(d)
    return torch.where(known, d, -torch.inf), known


def draw(seed: int, label: Tensor | None, step: int, place: Tensor, stream: int) -> Tensor:
    """Uniforms (S,) by (seed, class, step, place in the class, stream); of class 0 as of no classes, ``noise.uniform``."""
    zero = torch.zeros_like(place)
    words = philox(seed, zero if label is None else label & 0xFFFFFFFF, zero + step, place, zero + stream)
    return (words[0].double() + 0.5) * 2.0**-32


def _warn(text: str, level: int = 3) -> None:
    warnings.warn(text, FastrefineWarning, stacklevel=level)
