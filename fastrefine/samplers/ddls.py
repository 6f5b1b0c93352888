"""Discriminator-driven latent sampling ([DDLS] Che et al., NeurIPS 2020): Langevin dynamics on the latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers.base import Evaluation, Kernel, Latent, Networks, NoiseSource, Sampler, State, Traits, per_slot


@dataclass(frozen=True, eq=False)
class Schedule:
    """Two numbers for each step, the last ones for all later steps. table: (2, K) in the dtype of the activations."""

    table: Tensor

    def at(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Both, (S, 1), for ``step`` (S,)."""
        first, second = self.table[:, step.long().clamp(max=self.table.shape[1] - 1)]
        return per_slot(first), per_slot(second)


@dataclass(frozen=True, repr=False)
class DDLS(Sampler):
    """z <- z - eps/2 grad U(z) + sqrt(eps) noise_scale xi ([DDLS] Alg. 1), folded back into a bounded prior's box.

    Energy: U(z) = -log p0(z) - logit_scale d(G(z)) ([DDLS] Eq. 5; with a critic 3.5). With noise_scale 1 and small eps
    the law tends to p(z) ~ exp(-U(z)), with a bias of order eps that no number of steps removes (MALA has none); with
    noise_scale s it is that of U / s^2. The published image experiments use s = .1.

    step_size: eps, more than 0. noise_scale: at least 0. Each a number, or a sequence with the value of each step (a decay
    schedule), whose last value holds for all later steps. logit_scale: more than 0.
    Needs at="input" with a prior; NoisyOutput with Product(...) is the extended latent space of [DDLS] 3.4.
    Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.DDLS(0.01), at="input", max_steps=3).sample(8)``
    """

    step_size: float | Sequence[float]
    noise_scale: float | Sequence[float] = 1.0
    logit_scale: float = 1.0
    latent: Latent | None = field(default=None, repr=False)
    schedule: Schedule | None = field(default=None, repr=False)

    loss = "wasserstein"

    def __post_init__(self) -> None:
        for name, open_low in (("step_size", True), ("noise_scale", False)):
            values = getattr(self, name)
            if isinstance(values, Sequence | Tensor) and not isinstance(values, str):
                values = tuple(values.flatten().tolist() if isinstance(values, Tensor) else values)
                object.__setattr__(self, name, values)
                if not values:
                    raise InputError(f"{name} is empty; wanted a number, or a number for each step")
            for value in _sequence(values):
                checks.number(name, value, 0.0, open_low=open_low)
        checks.number("logit_scale", self.logit_scale, 0.0, open_low=True)

    @property
    def traits(self) -> Traits:
        # with noise s other than 1 the law is that of U / s^2, whose mean logit may well be lower than the prior's
        ascends = all(scale == 1 for scale in _sequence(self.noise_scale))
        return Traits(stochastic=self._noisy, ascends=ascends, targets_density=True, reads_prior=True)

    @property
    def _noisy(self) -> bool:
        return any(scale > 0 for scale in _sequence(self.noise_scale))

    def bind(self, networks: Networks) -> DDLS:
        latent = networks.latent()
        assert latent is not None
        return self.over(latent)

    def over(self, latent: Latent) -> DDLS:
        """The sampler with the prior and the schedule's numbers, eps / 2 and sqrt(eps) noise_scale, in its dtype."""
        sizes, scales = _sequence(self.step_size), _sequence(self.noise_scale)
        length = max(len(sizes), len(scales))
        sizes, scales = (x + (length - len(x)) * x[-1:] for x in (sizes, scales))
        rows = [0.5 * size for size in sizes], [math.sqrt(size) * scale for size, scale in zip(sizes, scales, strict=True)]
        return replace(self, latent=latent, schedule=Schedule(torch.tensor(rows, dtype=torch.float64).to(latent.table)))

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        assert evaluation.prior_score is not None
        grad = evaluation.grad - evaluation.prior_score
        return {**super().observe(a, evaluation, state, step, noise), "grad": grad}

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        assert self.latent is not None and self.schedule is not None
        size, scale = self.schedule.at(step)
        a = state["position"] - size * state["grad"]
        return self.latent.fold(a + scale * noise.normal() if self._noisy else a)[0], state

    def kernel(self) -> Kernel | None:
        if self.latent is None or self.schedule is None:
            return None
        return Kernel("ddls", (), noise=self._noisy, latent=self.latent.table, schedule=self.schedule.table)


def _sequence(values: Any) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)
