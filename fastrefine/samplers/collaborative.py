"""Collaborative refinement: descend the generator's loss on an activation ([CS] Alg. 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers.base import (
    BETA1,
    BETA2,
    EPSILON,
    LOSSES,
    Evaluation,
    Kernel,
    NoiseSource,
    Sample,
    Sampler,
    State,
    adam,
    per_slot,
)

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner

GROW, SHRINK, LARGEST = 1.2, 0.5, 1e6  # backtracking: factors of the step size, and its bound relative to the first
ERRORS = 3.0  # rounding errors of the loss that a trial may be worse by


@dataclass(frozen=True)
class Collaborative(Sampler):
    """a <- Proj(a - step_size * grad L(d(a))), per sample, from [CS] Alg. 1; energy: L itself.

    step_size: more than 0; gradients are per sample, never a batch mean.
    loss: "nonsaturating" -log s(d) | "minimax" log(1 - s(d)) | "wasserstein" -d | "least_squares" (d - 1)^2 / 2.
    optimizer: "sgd" | "momentum" (m <- momentum m + step_size g, a <- a - m) | "adam" (bias correction by the sample's
        own step) | "ladam" (the published 2-D code's Adam with the discriminator gap as a factor; needs ``real``).
    adaptive: sgd with step_size * max(0, s(d*) - s(d)), d* the logit of a real image drawn per sample ([CS0] 3.1).
    clamp: (low, high) bounds of the activation after every update.
    control: "backtracking" keeps the best point and its gradient: a trial whose loss is not above the best is accepted
        and the sample's step grows by 1.2, any other is rejected and the step halves. "fixed": every trial is accepted.
        None: backtracking for sgd without ``adaptive``, else fixed.
    slack: by how much a trial's loss may be above the best and still be accepted, at least 0. None: 0 in float32 and
        float64; else three times the rounding error of the loss, measured on a probe batch, for rejections that only
        tell noise halve the steps of samples that were doing well.
    real_score: mean s(d) of real images, for ladam; filled from the Refiner's ``real``.

    Raises InputError on values out of range.
    """

    step_size: float
    loss: str = "nonsaturating"
    optimizer: str = "sgd"
    momentum: float = 0.9
    adaptive: bool = False
    clamp: tuple[float, float] | None = None
    control: str | None = None
    real_score: float | None = None
    slack: float | None = None

    def __post_init__(self) -> None:
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
            plain = self.optimizer == "sgd" and not self.adaptive
            object.__setattr__(self, "control", "backtracking" if plain else "fixed")
        checks.choice("control", self.control, ("backtracking", "fixed"))
        if self.control == "backtracking" and (self.optimizer != "sgd" or self.adaptive):
            raise InputError("control='backtracking' is for optimizer='sgd' without adaptive; use control='fixed'")

    @property
    def rejects(self) -> bool:  # type: ignore[override]
        return self.control == "backtracking"

    @property
    def needs_real(self) -> bool:
        return self.adaptive or self.optimizer == "ladam"

    def bind(self, refiner: Refiner) -> Collaborative:
        if self.needs_real and refiner.scale == "critic":
            raise InputError("adaptive steps and ladam compare probabilities; a 'critic' has none")
        if self.optimizer != "ladam":
            return self
        return replace(self, real_score=float(torch.sigmoid(refiner.real_logits("optimizer='ladam'")).mean()))

    def told(self, loss_error: float) -> Collaborative:
        return replace(self, slack=ERRORS * loss_error) if self.rejects and self.slack is None else self

    def init(self, a: Tensor, sample: Sample) -> State:
        state = super().init(a, sample)
        zero = a.new_zeros(len(a))
        if self.control == "backtracking":
            state |= {"grad": torch.zeros_like(a), "loss": zero, "step_size": zero + self.step_size}
        elif self.adaptive:
            state |= {"reference": torch.sigmoid(sample.reference_logit)}
        elif self.optimizer == "momentum":
            state |= {"velocity": torch.zeros_like(a)}
        elif self.optimizer in ("adam", "ladam"):
            state |= {"first_moment": torch.zeros_like(a), "second_moment": torch.zeros_like(a)}
            if self.optimizer == "ladam":
                state |= {"gap": zero}
        return state

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        if self.control == "fixed":
            return super().observe(a, evaluation, state, step, noise)
        first = step == 0
        accept = first | (evaluation.loss <= state["loss"] + (self.slack or 0.0))
        largest = LARGEST * self.step_size
        grown = torch.clamp(state["step_size"] * GROW, max=largest)
        size = torch.where(accept, grown, state["step_size"] * SHRINK)
        return {
            "position": torch.where(per_slot(accept), a, state["position"]),
            "logit": torch.where(accept, evaluation.logit, state["logit"]),
            "grad": torch.where(per_slot(accept), evaluation.grad, state["grad"]),
            "loss": torch.where(accept, evaluation.loss, state["loss"]),
            "step_size": torch.where(first, state["step_size"], size),
        }

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        a, g = state["position"], state["grad"]
        if self.control == "backtracking":
            a = a - per_slot(state["step_size"]) * g
        elif self.adaptive:
            lead = torch.clamp(state["reference"] - torch.sigmoid(state["logit"]), min=0)
            a = a - per_slot(self.step_size * lead) * g
        elif self.optimizer == "sgd":
            a = a - self.step_size * g
        elif self.optimizer == "momentum":
            velocity = self.momentum * state["velocity"] + self.step_size * g
            a, state = a - velocity, {**state, "velocity": velocity}
        elif self.optimizer == "adam":
            update, moments = adam(g, state, step, self.step_size)
            a, state = a - update, {**state, **moments}
        else:
            a, state = self._ladam(a, g, state, step == 0)
        return a if self.clamp is None else a.clamp(*self.clamp), state

    def _ladam(self, a: Tensor, g: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """m <- .9m + .1g, v <- .5v + .5g^2, l <- .5l + .5(mean s(d_real) - s(d)), all started at their first value."""
        gap = (self.real_score or 0.0) - torch.sigmoid(state["logit"])
        m = torch.where(per_slot(first), g, 0.9 * state["first_moment"] + 0.1 * g)
        v = torch.where(per_slot(first), g * g, 0.5 * state["second_moment"] + 0.5 * g * g)
        gap = torch.where(first, gap, 0.5 * state["gap"] + 0.5 * gap)
        rate = self.step_size * torch.clamp(gap + 0.5, min=0) ** 2
        a = a - per_slot(rate) * m / (torch.sqrt(v) + EPSILON)
        return a, {**state, "first_moment": m, "second_moment": v, "gap": gap}

    def kernel(self) -> Kernel:
        size = self.step_size
        if self.control == "backtracking":
            hyper, scalars = (size, GROW, SHRINK, LARGEST, self.slack or 0.0), ("loss", "step_size")
            return Kernel("backtracking", hyper, scalars, ("grad",), clamp=self.clamp)
        if self.adaptive:
            return Kernel("adaptive", (size,), ("reference",), clamp=self.clamp)
        if self.optimizer == "sgd":
            return Kernel("sgd", (size, 0.0), clamp=self.clamp)
        if self.optimizer == "momentum":
            return Kernel("momentum", (size, self.momentum), (), ("velocity",), clamp=self.clamp)
        moments = ("first_moment", "second_moment")
        if self.optimizer == "adam":
            return Kernel("adam", (size, BETA1, BETA2, EPSILON), (), moments, clamp=self.clamp)
        return Kernel("ladam", (size, EPSILON, self.real_score or 0.0), ("gap",), moments, clamp=self.clamp)
