"""Metropolis-adjusted Langevin algorithm in latent space ([DDLS] Che et al. 2020, footnote 2; Roberts & Tweedie 1996)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.samplers.base import Evaluation, Kernel, NoiseSource, State, per_slot
from fastrefine.samplers.metropolis import MetropolisSampler


@dataclass(frozen=True, repr=False)
class MALA(MetropolisSampler):
    """z' = z - eps/2 grad U(z) + sqrt(eps) xi, accepted with min(1, exp(U(z) - U(z')) q(z | z') / q(z' | z)).

    Energy: U(z) = -log p0(z) - logit_scale d(G(z)); stationary law p(z) ~ exp(-U(z)) for every step size, where the
    adaptation is over. q(z' | z) is normal with mean z - eps/2 grad U(z) and variance eps; outside a bounded prior's box
    U is infinite.

    step_size: eps, more than 0. logit_scale: more than 0. global_every: k, at least 1; every k-th transition of a chain
    proposes a fresh z' from the prior instead, accepted with min(1, exp(logit_scale (d(G(z')) - d(G(z))))). Both kinds of
    transition leave the law invariant, so it stays exact, and chains travel between modes that no small step connects
    (the local-global kernel of Ex2MCMC, Samsonov et al. 2022, with one candidate). None: never.
    adapt: for how many steps each chain tunes its own eps towards the acceptance ``target`` of its local transitions (.574
    is optimal in many dimensions, Roberts & Rosenthal 1998), by Robbins-Monro on log eps.
    Needs at="input" with a prior. Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.MALA(0.01, global_every=5), at="input", max_steps=3).sample(8).acceptance``
    """

    logit_scale: float = 1.0
    global_every: int | None = None
    target: float = field(default=0.574, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_every is not None:
            checks.count("global_every", self.global_every, 1)

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        energy = self.energy(evaluation)
        # log q(z | z') - log q(z' | z), as one sum over elements: no large numbers are subtracted
        size, before = per_slot(state["step_size"]).double(), state["grad"].double()
        after, jump = energy.grad.double(), a.double() - state["position"].double()
        reverse = (0.5 * (before + after) * (jump - 0.25 * size * (after - before))).sum(1)
        if self.global_every is None:
            return self.test(a, evaluation, energy, reverse, state, step, noise)
        assert self.latent is not None
        anew = step % self.global_every == 0
        of_priors = (0.5 * self.latent.table[0].double() * jump * (a.double() + state["position"].double())).sum(1)
        return self.test(a, evaluation, energy, torch.where(anew, of_priors, reverse), state, step, noise, ~anew)

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        size, xi = per_slot(state["step_size"]), noise.normal()
        local = state["position"] - 0.5 * size * state["grad"] + torch.sqrt(size) * xi
        if self.global_every is None:
            return local, state
        assert self.latent is not None
        return torch.where(per_slot((step + 1) % self.global_every == 0), self.latent.draw(xi), local), state

    def kernel(self) -> Kernel | None:
        if self.global_every is not None and self.latent is not None and not self.latent.is_normal:
            return None  # the fused rules draw from a normal prior alone
        table = None if self.latent is None else self.latent.table
        hyper = *self.numbers(), float(self.global_every or 0)
        return Kernel("mala", hyper, ("energy", "step_size", "accepted"), ("grad",), noise=True, latent=table)
