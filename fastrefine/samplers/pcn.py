"""Preconditioned Crank-Nicolson Langevin in latent space (Cotter, Roberts, Stuart & White 2013, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers import step_control
from fastrefine.samplers.base import Evaluation, Kernel, Networks, NoiseSource, State, per_slot
from fastrefine.samplers.metropolis import Energy, MetropolisSampler

INDEPENDENT = 4.0  # the step size whose proposals keep nothing of z


@dataclass(frozen=True, repr=False)
class PCN(MetropolisSampler):
    """z' = ((4 - eps) z - 2 eps grad V(z) + 4 sqrt(eps) xi) / (4 + eps), accepted with min(1, exp(r(z, z') - r(z', z))).

    V(z) = -logit_scale d(G(z)); r(z, z') = V(z) + grad V(z).(z' - z) / 2 + eps/8 grad V(z).(z + z' + grad V(z)).
    Energy: U(z) = |z|^2 / 2 + V(z); stationary law p(z) ~ exp(-U(z)) for every step size, where the adaptation is over.
    Without the gradient the proposal would leave the normal prior as it is, so the test is about V alone, and the step
    size need not shrink as the latent gets more elements. Small steps are those of MALA with the same eps.

    step_size: eps, more than 0 and at most 4 (twice the paper's delta). logit_scale: more than 0. adapt: for how many steps
    each chain tunes its own eps, up to 4, towards the acceptance ``target``, by Robbins-Monro on log eps.
    Needs at="input" with a standard normal prior. Raises InputError on values out of range and on other priors.

    Example: ``fr.PCN(step_size=0.1)``
    """

    logit_scale: float = 1.0
    target: float = field(default=0.574, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("step_size", self.step_size, 0.0, INDEPENDENT, open_low=True)

    @property
    def largest(self) -> float:
        return min(step_control.LARGEST, INDEPENDENT / self.step_size)

    def bind(self, networks: Networks) -> PCN:
        latent = networks.latent()
        if latent is None or not latent.is_normal:
            raise InputError(
                "PCN is for standard normal priors, Normal(...) or a Product of these; for bounded ones use fr.MALA or fr.HMC"
            )
        return replace(self, latent=latent)

    def energy(self, evaluation: Evaluation) -> Energy:
        """V and its gradient: the prior is in the proposal."""
        return Energy(evaluation.loss, evaluation.grad)

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        size, before, after = per_slot(state["step_size"]).double(), state["grad"].double(), evaluation.grad.double()
        z, trial = state["position"].double(), a.double()
        bent = 0.125 * size * (after - before) * (z + trial + before + after)
        ratio = (0.5 * (before + after) * (trial - z) - bent).sum(1)
        return self.test(a, evaluation, self.energy(evaluation), ratio, state, step, noise)

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        size = per_slot(state["step_size"])
        pull, push = (4 - size) * state["position"] - 2 * size * state["grad"], 4 * torch.sqrt(size) * noise.normal()
        return (pull + push) / (4 + size), state

    def kernel(self) -> Kernel | None:
        table = None if self.latent is None else self.latent.table
        return Kernel("pcn", self.numbers(), ("energy", "step_size", "accepted"), ("grad",), noise=True, latent=table)
