"""What a sampler is: a frozen description and pure functions over per-slot tensors (S slots, F features)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Self = TypeVar("Self", bound="Sampler")

# Losses over logits d, elementwise; the descent direction of each is w(d) grad d with w = -dL/dd.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "nonsaturating": lambda d: F.softplus(-d),  # -log s(d), [CS] Eq. 3-5
    "minimax": lambda d: -F.softplus(d),  # log(1 - s(d)), [CS0] Eq. 1 (errata: the papers print 1 - log D)
    "wasserstein": lambda d: -d,
    "least_squares": lambda d: 0.5 * (d - 1) ** 2,  # LSGAN, target 1
}


class Sample(NamedTuple):
    """What is known of a sample when it enters a slot."""

    id: Tensor  # (S,) int64
    label: Tensor | None  # (S,) int64 or (S, C); None without labels
    reference_logit: Tensor  # (S,) logit of a real image drawn for this sample; NaN without ``real``


class Evaluation(NamedTuple):
    """One evaluation of every slot at its activation."""

    logit: Tensor  # (S,) mean over a map's patches
    loss: Tensor  # (S,) the sampler's own objective
    grad: Tensor  # (S, F) d loss / d activation
    log_prior: Tensor | None = None  # (S,)
    prior_score: Tensor | None = None  # (S, F) d log_prior / d activation


class NoiseSource(Protocol):
    def normal(self, stream: int = ..., ago: int = ...) -> Tensor: ...
    def uniform(self, stream: int = ...) -> Tensor: ...
    def jitter(self, ago: int | Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Latent:
    """A prior over flattened latents: independent elements, normal or uniform, on a box.

    table: (3, F) in the dtype and on the device of the activations: precision (1: standard normal, 0: uniform), lowest
    and highest value (both finite, or -inf and inf). log p0(z) = -sum precision z^2 / 2 inside, -inf outside.
    """

    table: Tensor

    def log_prob(self, a: Tensor) -> Tensor:
        """log p0 (S,) up to a constant, of (S, F); summed in float64."""
        precision, low, high = self.table
        inside = ((a >= low) & (a <= high)).all(1)
        quadratic = (precision.double() * a.double() ** 2).sum(1)
        return torch.where(inside, -0.5 * quadratic, -torch.inf).to(a.dtype)

    def score(self, a: Tensor) -> Tensor:
        """grad log p0 (S, F) inside the box."""
        return -self.table[0] * a

    def fold(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """(``a`` reflected at the bounds until it lies inside, whether an odd number of times), each (S, F)."""
        _, low, high = self.table
        width = high - low
        distance = torch.remainder(a - low, 2 * width)
        odd = distance > width
        folded = torch.where(odd, high - (distance - width), low + distance)
        bounded = torch.isfinite(width)
        return torch.where(bounded, folded.clamp(low, high), a), odd & bounded

    def draw(self, xi: Tensor) -> Tensor:
        """Independent latents (S, F) of the prior, made of standard normals xi (S, F) element by element; in float64."""
        if self.is_normal:
            return xi
        precision, low, high = self.table.double()
        normal = precision == 1
        u = torch.special.ndtr(xi.double())
        least, most = torch.special.ndtr(low), torch.special.ndtr(high)
        bounded = torch.where(normal, torch.special.ndtri(least + (most - least) * u), low + (high - low) * u)
        return torch.where(normal & torch.isinf(high - low), xi, bounded.clamp(low, high).to(xi.dtype))

    @property
    def is_normal(self) -> bool:
        """Whether every element is standard normal and unbounded."""
        precision, low, high = self.table
        return bool(((precision == 1) & (low == -torch.inf) & (high == torch.inf)).all())


@dataclass(frozen=True)
class Kernel:
    """A sampler's fused form: the name of its rule in the C++ and Triton skeletons, and what the rule works on."""

    rule: str
    hyper: tuple[float, ...]  # read from device memory: changing them never recompiles or re-captures
    scalars: tuple[str, ...] = ()  # state entries of shape (S,) besides the logit, in the order of ``init``
    vectors: tuple[str, ...] = ()  # state entries of shape (S, F) besides the position, in the order of ``init``
    noise: bool = False  # whether the rule reads normals
    clamp: tuple[float, float] | None = None
    latent: Tensor | None = field(default=None, compare=False)  # (3, F), see Latent
    schedule: Tensor | None = field(default=None, compare=False)  # (2, K), see DDLS


@dataclass(frozen=True)
class Traits:
    """What the step, the engine and the checks must know of a sampler besides its formulas.

    reports: names of state entries (S,) that are returned with the samples; the Result knows "step_size", the size that each
    sample has reached, and "accepted", how many of its trials a Metropolis test has accepted.
    """

    reports: tuple[str, ...] = ()
    rejects: bool = False  # may reject a trial; one that is not finite is then rejected, and does not end the sample
    stochastic: bool = False  # adds noise
    ascends: bool = True  # raises the logit: updates that lower it tell of a step size that is too large
    needs_last_gradient: bool = False  # decides on the last trial by its gradient too
    transition_steps: int = 1  # steps of the engine that make one transition; max_steps is a multiple of it
    targets_density: bool = False  # samples p0(z) exp(logit_scale d(G(z))), a law of the latent
    reads_prior: bool = False  # reads the prior at the input
    needs_real: bool = False  # reads logits of real images


class Networks(Protocol):
    """What a sampler may ask of the networks that it is bound to; the pair of a Refiner answers."""

    @property
    def scale(self) -> str:
        """ "critic", or "logit"."""

    def latent(self, required: bool = True) -> Latent | None:
        """The prior of the latents; InputError where it is required and has no table, None where it is not there."""

    def real_logits(self, why: str) -> Tensor:
        """Logits (N,) of real images; InputError that names ``why`` without any."""

    def probe(self, n: int, why: str) -> tuple[Tensor, Tensor]:
        """Activations (n, F) and logits (n,) of proposals; InputError that names ``why`` without a prior."""


class Sampler:
    """Base of all samplers. A state always holds ``position`` (S, F), the sample as it stands, and its ``logit`` (S,).

    State entries that ``init`` returns persist from step to step; what only ``observe`` returns lives until ``propose``.
    """

    loss: str = "nonsaturating"
    logit_scale: float = 1.0
    latent: Latent | None = None

    def __repr__(self) -> str:
        """The arguments that are not the usual ones."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._unusual().items())})"

    def _unusual(self) -> dict[str, Any]:
        own: tuple[Any, ...] = fields(self) if is_dataclass(self) else ()
        return {f.name: value for f in own if f.repr and (value := getattr(self, f.name)) != f.default}

    @property
    def traits(self) -> Traits:
        return Traits()

    def bind(self: Self, networks: Networks) -> Self:
        """The sampler with what depends on the networks filled in; called once for each discriminator."""
        return self

    def with_loss_error(self: Self, loss_error: float) -> Self:
        """The sampler for losses with this root mean square rounding error (0 in float32 and float64)."""
        return self

    def started(self: Self, first: Callable[[], Evaluation]) -> Self:
        """The sampler with its scale found, where it wants that; ``first`` evaluates a few proposals, (n,) and (n, F)."""
        return self

    def init(self, a: Tensor, sample: Sample) -> State:
        """State of a sample that enters its slot with activation ``a``."""
        return {"position": a, "logit": a.new_full((len(a),), math.nan)}

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        """Take in the evaluation at ``a``; ``step`` (S,) updates were made so far. Last evaluation included."""
        return {**state, "position": a, "logit": evaluation.logit, "grad": evaluation.grad}

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        """The next activation (S, F) to evaluate."""
        raise NotImplementedError

    def position(self, state: State) -> Tensor:
        """The sample as it stands: what retires."""
        return state["position"]

    def kernel(self) -> Kernel | None:
        """The fused form, or None where only the PyTorch formulas exist."""
        return None


def per_slot(value: Tensor) -> Tensor:
    """(S,) -> (S, 1), to broadcast over features."""
    return value[:, None]
