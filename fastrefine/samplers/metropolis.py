"""What the samplers with a Metropolis test share: the test, and the step size that each chain may adapt."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.samplers.base import Evaluation, Latent, NoiseSource, Sample, Sampler, State, per_slot

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner

DECAY, SMALLEST, LARGEST = 0.6, 1e-6, 1e6  # gain k^-DECAY of the k-th test; bounds relative to the first step size


class Energy(NamedTuple):
    """U = -log p0 - logit_scale d, and its gradient."""

    value: Tensor  # (S,)
    grad: Tensor  # (S, F)


@dataclass(frozen=True)
class MetropolisSampler(Sampler):
    """Base of MALA and HMC: chains that leave p(z) ~ p0(z) exp(logit_scale d(G(z))) invariant, whatever the step size.

    State: position, logit, energy and its gradient of the standing point, step size, and how often a trial was accepted.
    """

    step_size: float
    _: KW_ONLY
    adapt: int = 0
    target: float = 0.0
    latent: Latent | None = field(default=None, repr=False)

    loss = "wasserstein"
    rejects = noisy = reads_last_gradient = targets_prior = reads_prior = True

    def __post_init__(self) -> None:
        checks.number("step_size", self.step_size, 0.0, open_low=True)
        checks.number("logit_scale", self.logit_scale, 0.0, open_low=True)
        checks.number("adapt", self.adapt, 0.0)
        checks.number("target", self.target, 0.0, 1.0, open_low=True)

    def bind(self, refiner: Refiner) -> MetropolisSampler:
        return replace(self, latent=refiner.latent())

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
        noise: NoiseSource,
    ) -> State:  # fmt: skip
        """Accept ``a`` with probability min(1, exp(U - U' + correction)), correction (S,) float64; adapt the step size."""
        first, tests = step == 0, step // self.transition
        log_ratio = (state["energy"] - energy.value).double() + correction
        log_ratio = torch.where(torch.isnan(log_ratio), -torch.inf, log_ratio)
        ends = step % self.transition == 0
        accept = first | (ends & (torch.log(noise.uniform().double()) < log_ratio))
        size = state["step_size"]
        if self.adapt:
            gain = tests.clamp(min=1).double() ** -DECAY * (torch.exp(log_ratio.clamp(max=0)) - self.target)
            size = torch.clamp(size * torch.exp(gain).to(size.dtype), SMALLEST * self.step_size, LARGEST * self.step_size)
            size = torch.where(ends & ~first & (step <= self.adapt), size, state["step_size"])
        return {
            "position": torch.where(per_slot(accept), a, state["position"]),
            "logit": torch.where(accept, evaluation.logit, state["logit"]),
            "energy": torch.where(accept, energy.value, state["energy"]),
            "step_size": size,
            "accepted": state["accepted"] + (accept & ~first),
            "grad": torch.where(per_slot(accept), energy.grad, state["grad"]),
        }
