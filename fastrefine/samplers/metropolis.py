"""What the samplers with a Metropolis test share: the test, and the step size that each chain may adapt."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.samplers import step_control
from fastrefine.samplers.base import Evaluation, Latent, Networks, NoiseSource, Sample, Sampler, State, Traits, per_slot


class Energy(NamedTuple):
    """U = -log p0 - logit_scale d, and its gradient."""

    value: Tensor  # (S,)
    grad: Tensor  # (S, F)


@dataclass(frozen=True, repr=False)
class MetropolisSampler(Sampler):
    """Base of MALA, PCN and HMC: chains that leave p(z) ~ p0(z) exp(logit_scale d(G(z))) invariant, whatever the step size.

    State: position, logit, energy and its gradient of the standing point, step size, and how often a trial was accepted.
    """

    step_size: float
    _: KW_ONLY
    adapt: int = 0
    target: float = 0.0
    latent: Latent | None = field(default=None, repr=False)

    loss = "wasserstein"

    def __post_init__(self) -> None:
        checks.number("step_size", self.step_size, 0.0, open_low=True)
        checks.number("logit_scale", self.logit_scale, 0.0, open_low=True)
        checks.number("adapt", self.adapt, 0.0)
        checks.number("target", self.target, 0.0, 1.0, open_low=True)

    @property
    def traits(self) -> Traits:
        return Traits(
            reports=("step_size", "accepted"), rejects=True, stochastic=True, needs_last_gradient=True, targets_density=True,
            reads_prior=True,
        )  # fmt: skip

    @property
    def largest(self) -> float:
        """The largest step size that the adaptation may reach, as a multiple of the first."""
        return step_control.LARGEST

    def bind(self, networks: Networks) -> MetropolisSampler:
        return replace(self, latent=networks.latent())

    def init(self, a: Tensor, sample: Sample) -> State:
        zero = a.new_zeros(len(a))
        numbers = {"energy": zero, "step_size": zero + self.step_size, "accepted": zero}
        return {**super().init(a, sample), **numbers, "grad": torch.zeros_like(a)}

    def energy(self, evaluation: Evaluation) -> Energy:
        """At the activation that was evaluated; infinite outside the prior's support and where D is not finite."""
        assert evaluation.log_prior is not None and evaluation.prior_score is not None
        return Energy(evaluation.loss - evaluation.log_prior, evaluation.grad - evaluation.prior_score)

    def test(
        self, a: Tensor, evaluation: Evaluation, energy: Energy, correction: Tensor, state: State, step: Tensor,
        noise: NoiseSource, learns: Tensor | None = None,
    ) -> State:  # fmt: skip
        """Accept ``a`` with probability min(1, exp(U - U' + correction)), correction (S,) float64; adapt the step size.

        learns: (S,) bool, the trials that the step size is adapted by. None: all.
        """
        length = self.traits.transition_steps
        first, ends = step == 0, step % length == 0
        log_ratio = (state["energy"] - energy.value).double() + correction
        log_ratio = torch.where(torch.isnan(log_ratio), -torch.inf, log_ratio)
        accept = first | (ends & (torch.log(noise.uniform().double()) < log_ratio))
        size = state["step_size"]
        if self.adapt:
            adapted = step_control.robbins_monro(size, step // length, log_ratio, self.target, self.step_size, self.largest)
            adapts = ends & ~first & (step <= self.adapt)
            size = torch.where(adapts if learns is None else adapts & learns, adapted, size)
        return {
            "position": torch.where(per_slot(accept), a, state["position"]),
            "logit": torch.where(accept, evaluation.logit, state["logit"]),
            "energy": torch.where(accept, energy.value, state["energy"]),
            "step_size": size,
            "accepted": state["accepted"] + (accept & ~first),
            "grad": torch.where(per_slot(accept), energy.grad, state["grad"]),
        }

    def numbers(self) -> tuple[float, ...]:
        """What the fused rules know of the adaptation."""
        bounds = step_control.DECAY, step_control.SMALLEST, self.largest
        return self.step_size, float(self.adapt), self.target, *bounds
