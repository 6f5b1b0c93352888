"""Accept-reject selection by finished logits: refine first, then select.

Classes: with ``labels`` (whole numbers (N,), vectors (N, C) whose largest entry counts, or one class for all; of a result:
``labels=out.labels``) each class is selected on its own. Draws depend on (seed, class, place in the class) only, so other
classes do not change what is chosen of one.

Trust: three of the functions read exp(logit) as a density ratio. If a result has real logits (``Refiner(real=...)``), they
look at ``Diagnosis.trusted`` first. Untrusted logits: untrusted="warn" (FastrefineWarning) | "refuse" (InputError) | "allow"
(no check). Tensors are taken as calibrated logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.diagnosis.calibration import check_trust, classes_of, logits_of
from fastrefine.errors import InputError, warn
from fastrefine.noise import Stream, philox
from fastrefine.result import Result
from fastrefine.stopping import RealLogits

MOVED = 0.01  # warn where a smaller share of the chains moved


@dataclass(frozen=True)
class MHResult:
    """What Metropolis-Hastings chose.

    indices: (M,) int64 positions among the proposals, one for each chain. acceptance_rate: accepted share of all tests.
    moved: (M,) bool; False where a chain accepted no proposal: its index is then its first proposal.

    Example: ``out.select(fr.metropolis_hastings(out, chain_length=8, untrusted="allow"))  # 8 samples of 64``
    """

    indices: Tensor
    acceptance_rate: float
    moved: Tensor

    def __repr__(self) -> str:
        moved = int(self.moved.sum())
        return f"MHResult({len(self.indices)} chains, {moved} moved, acceptance rate {self.acceptance_rate:.3g})"


def metropolis_hastings(
    logits: Tensor | Result, chain_length: int = 20, initial_logits: Tensor | None = None, seed: int = 0, *,
    labels: Any = None, initial_labels: Any = None, untrusted: str = "warn",
) -> MHResult:  # fmt: skip
    """Metropolis-Hastings independence sampler ([MHGAN] Turner et al. 2019; [CS] 3.4): one chain for each output.

    logits: (N,) of the proposals, or a Result (see Trust above). With L = chain_length, chain i tests proposals
    i L ... i L + L - 1 in order; there are N // L chains, and left-over proposals are unused. A proposal is accepted with
    min(1, exp(d_new - d_old)), never if its logit is not finite. A chain starts from its first proposal or, where
    ``initial_logits`` (R,) of real images are given, from one of them drawn by (seed, i).

    labels: chain k of a class tests proposals k L ... k L + L - 1 of that class. It starts from a real logit of the class,
    given ``initial_labels`` (R,). Outputs are in order of class, then of chain.

    Warns where less than 1 % of the chains moved, and of classes too small for a chain. Raises InputError when there is no
    complete chain, no real logit of a class, for the scores of a critic, and for untrusted logits under "refuse".

    Example: ``fr.metropolis_hastings(out, chain_length=8, untrusted="allow").indices  # (8,)``
    """
    what = "metropolis_hastings"
    checks.count("chain_length", chain_length, 1)
    proposals = logits_of(logits, what)
    check_trust(logits, what, untrusted)
    groups = _grouped(labels, len(proposals), proposals.device)
    positions, label, chain = groups.tables(chain_length, what, "chain")
    table = finite(proposals)[positions]  # a chain that starts at -inf accepts its next finite proposal
    current, first = table[:, 0], 1
    if initial_logits is not None:
        current, first = _starts(initial_logits, initial_labels, label, chain, seed), 0
    elif initial_labels is not None:
        raise InputError("initial_labels were given without initial_logits")
    position, accepted = walk(table, current, seed, first, label, chain)
    tests, moved = len(table) * (chain_length - first), accepted > 0
    rate = int(accepted.sum()) / tests if tests else 0.0
    if tests and int(moved.sum()) < MOVED * len(moved):
        warn(
            f"{what}: {int(moved.sum())} of {len(moved)} chains moved in {chain_length} proposals (acceptance {rate:.2g}): "
            "the others hold their first proposal"
        )
    return MHResult(positions.gather(1, position[:, None])[:, 0], rate, moved)


def walk(table: Tensor, current: Tensor, seed: int, first: int, label: Tensor | None, chain: Tensor) -> tuple[Tensor, Tensor]:
    """(column of the last accepted proposal (M,), 0 where none was; number of accepted ones (M,)), both int64.

    table: (M, L) logits of the proposals, each finite or -inf. Chain i starts from current[i] and tests table[i, first:] in
    order. Test k accepts where log u < table[i, k] - current; u is drawn by (seed, class, chain of the class, k).
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
    classes = None if labels is None else classes_of(labels, "initial_labels", len(start)).to(chain.device)
    missing = [] if label is None or classes is None else label[~torch.isin(label, classes)].unique().tolist()
    if missing:
        raise InputError(f"initial_logits hold no real image of {len(missing)} classes, first {missing[:5]}")
    return RealLogits(start.to(chain.device), classes).drawn(draw(seed, label, 0, chain, Stream.REFERENCE), label)


def rejection_sample(
    logits: Tensor | Result, percentile: float = 95, log_m: float | Mapping[int, float] | None = None, seed: int = 0, *,
    labels: Any = None, untrusted: str = "warn",
) -> Tensor:  # fmt: skip
    """Discriminator rejection sampling ([DRS] Azadi et al. 2019, Eq. 8): positions (K,) int64 of the accepted, in order.

    logits: (N,) of the proposals, or a Result (see Trust above). With M the largest logit and delta = d - M, proposal i is
    accepted with probability s(F_i - gamma), where F = delta - log(1 - exp(delta - 1e-6)) and gamma is the
    ``percentile``-th percentile of F, 0 ... 100: higher accepts fewer. log_m: M of a pilot pass; it rises to any larger
    logit that follows. Proposal i draws by (seed, i). Non-finite logits are never accepted. Each proposal is tested once;
    K / N is the acceptance rate.

    labels: every class has its own M and gamma; log_m is then one number for all, or {class: number}.

    Warns where nothing was accepted, overall or of a class. Raises InputError on a percentile or log_m out of range, for
    the scores of a critic, and for untrusted logits under "refuse".

    Example: ``out.select(fr.rejection_sample(out, percentile=80, untrusted="allow"))``
    """
    what = "rejection_sample"
    checks.number("percentile", percentile, 0, 100)
    d = finite(logits_of(logits, what))
    check_trust(logits, what, untrusted)
    groups = _grouped(labels, len(d), d.device)
    if isinstance(log_m, Mapping) and labels is None:
        raise InputError("log_m by class needs labels")
    floors = [_floor(log_m, label) for label in groups.classes.tolist()]

    def accept(d: Tensor, floor: float | None) -> Tensor:
        highest = d.max() if floor is None else torch.cummax(d, 0).values.clamp(min=floor)
        score = rejection_score(d - highest)
        return torch.sigmoid(score - quantile(score[torch.isfinite(d)], percentile / 100))

    return groups.accepted([accept(*args) for args in zip(groups.split(d), floors, strict=True)], seed, what)


def rejection_score(delta: Tensor) -> Tensor:
    """F of [DRS] Eq. 8 before gamma is subtracted, for delta = d - M <= 0."""
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
    """torch.quantile (which takes 16 million values at most) for any number of values; NaN for none."""
    if len(x) == 0:
        return x.new_full((), torch.nan)
    x, at = torch.sort(x).values, q * (len(x) - 1)
    return torch.lerp(x[math.floor(at)], x[math.ceil(at)], at - math.floor(at))


def budgeted_rejection(
    logits: Tensor | Result, budget: float, seed: int = 0, *, labels: Any = None, untrusted: str = "warn"
) -> Tensor:
    """Optimal budgeted rejection sampling ([OBRS] Verine et al. 2024): positions (K,) int64 of the accepted, in order.

    Proposal i is accepted with probability a_i = min(1, c exp(d_i)), where c makes mean(a) = budget, in (0, 1]. Among all
    acceptance functions with that mean, this one brings the samples nearest to the data in every f-divergence. logits: as
    in ``rejection_sample``. Where fewer than budget N logits are finite, all of those are accepted.

    labels: the budget holds in each class, so every class keeps its share of the samples. Without labels one c serves all,
    and classes that D prefers gain share.

    Warns and raises as ``rejection_sample``; InputError also on a budget out of range.

    Example: ``out.select(fr.budgeted_rejection(out, budget=0.5, untrusted="allow"))``
    """
    what = "budgeted_rejection"
    checks.number("budget", budget, 0, 1, open_low=True)
    d = finite(logits_of(logits, what))
    check_trust(logits, what, untrusted)
    groups = _grouped(labels, len(d), d.device)
    accept = [torch.exp((x + log_scale(x[torch.isfinite(x)], budget * len(x))).clamp(max=0)) for x in groups.split(d)]
    return groups.accepted(accept, seed, what)


def log_scale(d: Tensor, wanted: float) -> Tensor:
    """t with sum(min(1, exp(d + t))) = wanted, exactly: the k largest terms are 1, and t fits the others to the rest."""
    if len(d) <= wanted:
        return d.new_full((), torch.inf)
    d = torch.sort(d, descending=True).values
    rest = torch.logcumsumexp(d.flip(0), 0).flip(0)  # log sum of exp(d[k:])
    k = torch.arange(len(d), device=d.device, dtype=torch.float64)
    t = torch.log((wanted - k).clamp(min=0)) - rest
    return t[(d + t <= 0).int().argmax()]


def best_of_n(logits: Tensor | Result, n: int, *, labels: Any = None) -> Tensor:
    """The proposal with the highest logit of each n consecutive ones: positions (N // n,) int64; the rest is unused.

    logits: on any monotone scale, a critic's too. The samples move towards what the discriminator prefers, and follow no
    known law. A non-finite logit is chosen only if its group has no finite one. labels: groups of n consecutive proposals
    of one class, in order of class; warns of classes with fewer. Raises InputError when there is no complete group.

    Example: ``out.select(fr.best_of_n(out, 4))  # 16 samples of 64``
    """
    checks.count("n", n, 1)
    d = finite(logits_of(logits, "best_of_n", critic=True))
    positions = _grouped(labels, len(d), d.device).tables(n, "best_of_n", "group")[0]
    return positions.gather(1, d[positions].argmax(1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class _Groups:
    """Proposals sorted by class; without labels one group of all."""

    order: Tensor  # (N,) positions in order of class, those of a class in ascending order
    label: Tensor | None  # (N,) class of each of them
    rank: Tensor  # (N,) place of each of them in its class
    classes: Tensor  # (C,) ascending
    sizes: list[int]  # of the classes

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values (N,) class by class."""
        return values[self.order].split(self.sizes)

    def tables(self, length: int, what: str, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """(positions (M, length), class of each row (M,), number of the row in its class (M,)); warns of small classes.

        name: of a row, for messages.
        """
        small = [label for label, size in zip(self.classes.tolist(), self.sizes, strict=True) if size < length]
        if len(small) == len(self.sizes):
            one = "" if self.label is None else " of one class"
            raise InputError(f"{what}: {len(self.order)} logits do not make one {name} of {length}{one}")
        if small:
            count = f"{len(small)} of {len(self.sizes)} classes"
            warn(f"{what}: {count} make no {name} of {length} and are left out, first {small[:5]}")
        whole = torch.tensor([size // length * length for size in self.sizes], device=self.order.device)
        sizes = torch.tensor(self.sizes, device=self.order.device)
        kept = self.rank < whole.repeat_interleave(sizes)
        label = None if self.label is None else self.label[kept][::length].contiguous()
        return self.order[kept].view(-1, length), label, self.rank[kept][::length] // length

    def accepted(self, probability: list[Tensor], seed: int, what: str) -> Tensor:
        """(K,) ascending positions of the accepted; probability: class by class, NaN: never. Warns of classes with none."""
        if not probability:
            return self.order
        u = draw(seed, self.label, 0, self.rank, Stream.REJECTION)
        chosen = u < torch.cat(probability)
        hit = torch.stack([of.any() for of in chosen.split(self.sizes)]).tolist()
        none = [label for label, any_of_it in zip(self.classes.tolist(), hit, strict=True) if not any_of_it]
        if none and len(none) == len(self.sizes):
            warn(f"{what}: accepted none of {len(chosen)} proposals")
        elif none:
            warn(f"{what}: accepted no proposal of {len(none)} of {len(self.sizes)} classes, first {none[:5]}")
        return torch.sort(self.order[chosen]).values


def _grouped(labels: Any, n: int, device: torch.device) -> _Groups:
    everyone = torch.arange(n, device=device)
    if labels is None:
        return _Groups(everyone, None, everyone, torch.zeros(int(n > 0), dtype=torch.int64, device=device), [n] * (n > 0))
    label, order = torch.sort(classes_of(labels, "labels", n).to(device), stable=True)
    classes, sizes = label.unique_consecutive(return_counts=True)
    rank = everyone - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return _Groups(order, label, rank, classes, sizes.tolist())


def finite(logits: Tensor) -> Tensor:
    """Logits with -inf in place of those that are not finite."""
    return torch.where(torch.isfinite(logits), logits, -torch.inf)


def draw(seed: int, label: Tensor | None, step: int, place: Tensor, stream: int) -> Tensor:
    """Uniforms (S,) float64 by (seed, class, step, place in the class, stream); without classes as ``noise.uniform``."""
    zero = torch.zeros_like(place)
    words = philox(seed, zero if label is None else label & 0xFFFFFFFF, zero + step, place, zero + stream)
    return (words[0].double() + 0.5) * 2.0**-32
