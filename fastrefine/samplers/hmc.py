"""Hamiltonian Monte Carlo in latent space (Duane et al. 1987; Neal 1996, 2011)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers.base import Evaluation, Kernel, NoiseSource, Sample, State, Traits, per_slot
from fastrefine.samplers.metropolis import MetropolisSampler


@dataclass(frozen=True, repr=False)
class HMC(MetropolisSampler):
    """Leapfrog trajectories of ``leapfrog`` steps from fresh momenta p ~ N(0, I), accepted with min(1, exp(H - H')).

    Energy: U(z) = -log p0(z) - logit_scale d(G(z)), H = U + |p|^2 / 2; stationary law p(z) ~ exp(-U(z)) for every step
    size, where the adaptation is over. At a bounded prior's walls position and momentum are reflected. One transition is
    ``leapfrog`` steps of the engine, so max_steps is a multiple of it; only accepted points are returned.

    All steps of a trajectory have the size eps (1 + jitter v), v uniform in (-1, 1) and drawn once for each trajectory,
    whatever the state (Neal 2011, section 3.2; Mackenzie 1989): each size leaves the law invariant, so their mixture does.
    With a fixed length, trajectories can resonate: where d is flat under a normal prior, a trajectory turns z by the angle
    leapfrog x eps. Near a multiple of pi it comes back to z or -z: all is accepted, and nothing mixes. jitter=0: fixed length.

    step_size: eps of the leapfrog, more than 0. leapfrog: 1 or more. logit_scale: more than 0. jitter: 0 to 1, without 1.
    adapt: for how many steps each chain tunes its own eps (that before the jitter) towards the acceptance ``target`` (.65,
    Beskos et al. 2013), by Robbins-Monro on log eps. Needs at="input" with a prior. Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.HMC(0.05), at="input", max_steps=20).sample(8).acceptance  # (8,)``
    """

    leapfrog: int = 10
    logit_scale: float = 1.0
    jitter: float = field(default=0.2, kw_only=True)
    target: float = field(default=0.65, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.leapfrog, int) or isinstance(self.leapfrog, bool) or self.leapfrog < 1:
            raise InputError(f"leapfrog is {self.leapfrog!r}; wanted a whole number of at least 1")
        checks.number("jitter", self.jitter, 0.0, 1.0, open_high=True)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, transition_steps=self.leapfrog)

    def init(self, a: Tensor, sample: Sample) -> State:
        return {**super().init(a, sample), "momentum": torch.zeros_like(a)}

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        energy = self.energy(evaluation)
        before = noise.normal(ago=self.leapfrog).double()
        size = self.jittered(state, noise, self.leapfrog)
        after = state["momentum"].double() - 0.5 * size.double() * energy.grad.double()
        kinetic = 0.5 * ((before - after) * (before + after)).sum(1)
        found = self.test(a, evaluation, energy, kinetic, state, step, noise)
        return {**found, "momentum": state["momentum"], "point": a, "force": energy.grad}

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        assert self.latent is not None
        done = step % self.leapfrog
        begins, size = per_slot(done == 0), self.jittered(state, noise, done)
        point = torch.where(begins, state["position"], state["point"])
        momentum = torch.where(begins, noise.normal() - 0.5 * size * state["grad"], state["momentum"] - size * state["force"])
        point, turned = self.latent.fold(point + size * momentum)
        return point, {**state, "momentum": torch.where(turned, -momentum, momentum)}

    def jittered(self, state: State, noise: NoiseSource, ago: int | Tensor) -> Tensor:
        """(S, 1) the step size of the trajectories that began ``ago`` steps before."""
        size = state["step_size"]
        return per_slot(size * (1 + self.jitter * noise.jitter(ago)).to(size.dtype))

    def kernel(self) -> Kernel | None:
        hyper = *self.numbers(), float(self.leapfrog), self.jitter
        table = None if self.latent is None else self.latent.table
        scalars, vectors = ("energy", "step_size", "accepted"), ("grad", "momentum")
        return Kernel("hmc", hyper, scalars, vectors, noise=True, latent=table)
