"""Collaborative refinement: descend the generator's loss on an activation ([CS] Alg. 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers import step_control
from fastrefine.samplers.adam import BETA1, BETA2, EPSILON, MOMENTS, adam
from fastrefine.samplers.base import LOSSES, Evaluation, Kernel, Networks, NoiseSource, Sample, Sampler, State, Traits, per_slot

FIRST_GAIN = 0.1  # of the loss, by a first step whose size was left out


@dataclass(frozen=True, repr=False)
class Collaborative(Sampler):
    """a <- Proj(a - step_size * grad L(d(a))), per sample, from [CS] Alg. 1; energy: L itself.

    step_size: more than 0; gradients are per sample, never a batch mean. None: found once for each pair, the
        step that would lower the loss of a typical proposal by FIRST_GAIN if it were linear; for a control that adapts it.
    loss: "nonsaturating" -log s(d) | "minimax" log(1 - s(d)) | "wasserstein" -d | "least_squares" (d - 1)^2 / 2.
    optimizer: "sgd" | "momentum" (m <- momentum m + step_size g, a <- a - m) | "adam" (bias correction by the sample's
        own step) | "ladam" (the published 2-D code's Adam with the discriminator gap as a factor; needs ``real``).
    adaptive: sgd with step_size * max(0, s(d*) - s(d)), d* the logit of a real image drawn per sample ([CS0] 3.1).
    clamp: (low, high) bounds of the activation after every update.
    control: "backtracking" keeps the best point and its gradient: a trial whose loss is not above the best is accepted
        and the sample's step grows by 1.2, any other is rejected and the step halves. "fixed": every trial is accepted.
        "barzilai_borwein" accepts and rejects in the same way, and takes the step that the curvature along the last move
        wants (Barzilai & Borwein 1988), at most 5 times the step before: it finds its scale within a few evaluations.
        None: backtracking for sgd without ``adaptive``, else fixed.
    slack: by how much a trial's loss may be above the best and still be accepted, at least 0. None: 0 in float32 and
        float64; else three times the rounding error of the loss, measured on a probe batch, for rejections that only
        tell noise halve the steps of samples that were doing well.
    real_score: mean s(d) of real images, for ladam; filled from the Refiner's ``real``.

    Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.Collaborative(0.3, loss="nonsaturating"), max_steps=3).sample(8)``
    """

    step_size: float | None = None
    loss: str = "nonsaturating"
    optimizer: str = "sgd"
    momentum: float = 0.9
    adaptive: bool = False
    clamp: tuple[float, float] | None = None
    control: str | None = None
    real_score: float | None = None
    slack: float | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None:
            checks.number("step_size", self.step_size, 0.0, open_low=True)
        checks.choice("loss", self.loss, tuple(LOSSES))
        checks.choice("optimizer", self.optimizer, ("sgd", "momentum", "adam", "ladam"))
        checks.number("momentum", self.momentum, 0.0, 1.0)
        checks.clamp(self.clamp)
        if self.slack is not None:
            checks.number("slack", self.slack, 0.0)
        if self.adaptive and self.optimizer != "sgd":
            raise InputError(f"adaptive steps are defined for optimizer='sgd', got {self.optimizer!r}")
        if self.control is None:
            object.__setattr__(self, "control", self._usual_control)
        checks.choice("control", self.control, ("backtracking", "barzilai_borwein", "fixed"))
        if self.step_size is None and self.control == "fixed":
            raise InputError("step_size is None; control='fixed' wants a number, for nothing adapts it")
        if self.control != "fixed" and (self.optimizer != "sgd" or self.adaptive):
            raise InputError(f"control={self.control!r} is for optimizer='sgd' without adaptive; use control='fixed'")

    @property
    def _usual_control(self) -> str:
        """What control=None stands for."""
        if self.optimizer != "sgd" or self.adaptive:
            return "fixed"
        return "barzilai_borwein" if self.step_size is None else "backtracking"

    def _unusual(self) -> dict[str, Any]:
        return {k: v for k, v in super()._unusual().items() if (k, v) != ("control", self._usual_control)}

    @property
    def size(self) -> float:
        """step_size, once it is known."""
        assert self.step_size is not None
        return self.step_size

    @property
    def update(self) -> Update:
        """The row of UPDATES that it works by."""
        return UPDATES[self.control if self.control != "fixed" else "adaptive" if self.adaptive else self.optimizer]  # type: ignore[index]

    @property
    def traits(self) -> Traits:
        tries = self.control != "fixed"
        needs_real = self.adaptive or self.optimizer == "ladam"
        return Traits(reports=("step_size",) if tries else (), rejects=tries, needs_real=needs_real)

    def bind(self, networks: Networks) -> Collaborative:
        if self.traits.needs_real and networks.scale == "critic":
            raise InputError("adaptive steps and ladam compare probabilities; a 'critic' has none")
        if self.optimizer != "ladam":
            return self
        return replace(self, real_score=float(torch.sigmoid(networks.real_logits("optimizer='ladam'")).mean()))

    def with_loss_error(self, loss_error: float) -> Collaborative:
        measured = self.control != "fixed" and self.slack is None
        return replace(self, slack=step_control.ERRORS * loss_error) if measured else self

    def started(self, first: Callable[[], Evaluation]) -> Collaborative:
        if self.step_size is not None:
            return self
        slope = first().grad.double().square().sum(1)
        slope = slope[slope.isfinite() & (slope > 0)]
        return replace(self, step_size=float(FIRST_GAIN / slope.median()) if len(slope) else 1.0)

    def init(self, a: Tensor, sample: Sample) -> State:
        zero = a.new_zeros(len(a))
        starts = {"step_size": zero + self.size, "reference": torch.sigmoid(sample.reference_logit)}
        numbers = {name: starts.get(name, zero) for name in self.update.scalars}
        return {**super().init(a, sample), **numbers, **{name: torch.zeros_like(a) for name in self.update.vectors}}

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        if self.control == "fixed":
            return super().observe(a, evaluation, state, step, noise)
        first = step == 0
        accept = first | step_control.accepts(evaluation.loss, state["loss"], self.slack or 0.0)
        numbers = {"loss": torch.where(accept, evaluation.loss, state["loss"])}
        if self.control == "backtracking":
            size = step_control.backtracking(state["step_size"], accept, self.size)
            numbers["step_size"] = torch.where(first, state["step_size"], size)
        else:  # a last gradient may be missing: the numbers change with the next proposal
            move, change = (a - state["position"]).double(), (evaluation.grad - state["grad"]).double()
            moved, bent = (move * move).sum(1), (move * change).sum(1)
            size = step_control.barzilai_borwein(state["step_size"], accept, moved, bent, self.size)
            numbers = {"next_loss": numbers["loss"], "next_step_size": torch.where(first, state["step_size"], size)}
        return {
            **state,
            "position": torch.where(per_slot(accept), a, state["position"]),
            "logit": torch.where(accept, evaluation.logit, state["logit"]),
            "grad": torch.where(per_slot(accept), evaluation.grad, state["grad"]),
            **numbers,
        }

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        descent, kept = self.update.descent(self, state["grad"], state, step)
        a = state["position"] - descent
        return a if self.clamp is None else a.clamp(*self.clamp), {**state, **kept}

    def kernel(self) -> Kernel:
        update = self.update
        return Kernel(update.rule, update.hyper(self), update.scalars, update.vectors, clamp=self.clamp)


class Update(NamedTuple):
    """One way to step along a gradient: its formula, its fused rule, and what it keeps of each sample."""

    rule: str  # name in the C++ and Triton skeletons
    hyper: Callable[[Collaborative], tuple[float, ...]]  # numbers of the fused rule
    # (sampler, gradient (S, F), state, step (S,)) -> (what is taken off the activation (S, F), entries of the state)
    descent: Callable[[Collaborative, Tensor, State, Tensor], tuple[Tensor, State]]
    scalars: tuple[str, ...] = ()  # state entries (S,), in the order of the fused rule
    vectors: tuple[str, ...] = ()  # state entries (S, F)


def _sgd(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    return own.size * g, {}


def _backtracking(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    """Each sample has its own step size, which ``observe`` sets."""
    return per_slot(state["step_size"]) * g, {}


def _barzilai_borwein(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    size = state["next_step_size"]
    return per_slot(size) * g, {"loss": state["next_loss"], "step_size": size}


def _adaptive(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    """step_size * max(0, s(d*) - s(d)) ([CS0] 3.1)."""
    lead = torch.clamp(state["reference"] - torch.sigmoid(state["logit"]), min=0)
    return per_slot(own.size * lead) * g, {}


def _momentum(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    """m <- momentum m + step_size g."""
    velocity = own.momentum * state["velocity"] + own.size * g
    return velocity, {"velocity": velocity}


def _adam(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    return adam(g, state, step, own.size)


def _ladam(own: Collaborative, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
    """m <- .9m + .1g, v <- .5v + .5g^2, l <- .5l + .5(mean s(d_real) - s(d)), all started at their first value."""
    first, gap = step == 0, (own.real_score or 0.0) - torch.sigmoid(state["logit"])
    m = torch.where(per_slot(first), g, 0.9 * state["first_moment"] + 0.1 * g)
    v = torch.where(per_slot(first), g * g, 0.5 * state["second_moment"] + 0.5 * g * g)
    gap = torch.where(first, gap, 0.5 * state["gap"] + 0.5 * gap)
    rate = own.size * torch.clamp(gap + 0.5, min=0) ** 2
    return per_slot(rate) * m / (torch.sqrt(v) + EPSILON), {"first_moment": m, "second_moment": v, "gap": gap}


def _bounds(own: Collaborative) -> tuple[float, ...]:
    return own.size, step_control.GROW, step_control.SHRINK, step_control.LARGEST, own.slack or 0.0


def _curved_bounds(own: Collaborative) -> tuple[float, ...]:
    limits = step_control.WIDEN, step_control.SHRINK, step_control.LEAST, step_control.MOST, step_control.LARGEST
    return own.size, *limits, own.slack or 0.0


UPDATES = {
    "sgd": Update("sgd", lambda own: (own.size, 0.0), _sgd),
    "backtracking": Update("backtracking", _bounds, _backtracking, ("loss", "step_size"), ("grad",)),
    "barzilai_borwein": Update("barzilai_borwein", _curved_bounds, _barzilai_borwein, ("loss", "step_size"), ("grad",)),
    "adaptive": Update("adaptive", lambda own: (own.size,), _adaptive, ("reference",)),
    "momentum": Update("momentum", lambda own: (own.size, own.momentum), _momentum, (), ("velocity",)),
    "adam": Update("adam", lambda own: (own.size, BETA1, BETA2, EPSILON), _adam, (), MOMENTS),
    "ladam": Update("ladam", lambda own: (own.size, EPSILON, own.real_score or 0.0), _ladam, ("gap",), MOMENTS),
}
