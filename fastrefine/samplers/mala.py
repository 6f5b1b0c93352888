"""Metropolis-adjusted Langevin algorithm in latent space ([DDLS] Che et al. 2020, footnote 2; Roberts & Tweedie 1996)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrefine.samplers.base import Evaluation, Kernel, NoiseSource, State, per_slot
from fastrefine.samplers.metropolis import MetropolisSampler


@dataclass(frozen=True)
class MALA(MetropolisSampler):
    """z' = z - eps/2 grad U(z) + sqrt(eps) xi, accepted with min(1, exp(U(z) - U(z')) q(z | z') / q(z' | z)).

    Energy: U(z) = -log p0(z) - logit_scale d(G(z)); stationary law p(z) ~ exp(-U(z)) for every step size, where the
    adaptation is over. q(z' | z) is normal with mean z - eps/2 grad U(z) and variance eps; outside a bounded prior's box
    U is infinite.

    step_size: eps, more than 0. logit_scale: more than 0. adapt: for how many steps each chain tunes its own eps towards
    the acceptance ``target`` (.574 is optimal in many dimensions, Roberts & Rosenthal 1998), by Robbins-Monro on log eps.
    Needs at="input" with a prior. Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.MALA(0.01), at="input", max_steps=3).sample(8).acceptance  # (8,)``
    """

    logit_scale: float = 1.0
    target: float = field(default=0.574, kw_only=True)

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        energy = self.energy(evaluation)
        # log q(z | z') - log q(z' | z), as one sum over elements: no large numbers are subtracted
        size, before = per_slot(state["step_size"]).double(), state["grad"].double()
        after, jump = energy.grad.double(), a.double() - state["position"].double()
        reverse = (0.5 * (before + after) * (jump - 0.25 * size * (after - before))).sum(1)
        return self.test(a, evaluation, energy, reverse, state, step, noise)

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        size = per_slot(state["step_size"])
        return state["position"] - 0.5 * size * state["grad"] + torch.sqrt(size) * noise.normal(), state

    def kernel(self) -> Kernel | None:
        table = None if self.latent is None else self.latent.table
        return Kernel("mala", self.numbers(), ("energy", "step_size", "accepted"), ("grad",), noise=True, latent=table)
