"""Discriminator gradient flow of f-divergences ([DGflow] Ansari, Ang, Soh, ICLR 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastrefine import checks
from fastrefine.samplers.base import Kernel, NoiseSource, Sampler, State, Traits

_LOSS = {"KL": "wasserstein", "JS": "minimax", "logD": "nonsaturating"}


@dataclass(frozen=True, repr=False)
class DGflow(Sampler):
    """a <- a + eta w(d) grad d + sqrt(2 eta gamma) xi ([DGflow] Eq. 11, Alg. 1), at the latent or in data space.

    w = 1 (KL), s(d) (JS), s(-d) (logD): the negative gradients of the Wasserstein, minimax and non-saturating losses,
    so with gamma = 0 each equals Collaborative of that loss with control="fixed". Energy: that loss; noise: gamma.

    step_size: eta, more than 0. gamma: noise regulariser, at least 0. divergence: "KL" | "JS" | "logD".
    Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.DGflow(0.1, "KL"), at="input", max_steps=3).sample(8)``
    """

    step_size: float
    divergence: str = "KL"
    gamma: float = 0.01

    def __post_init__(self) -> None:
        checks.number("step_size", self.step_size, 0.0, open_low=True)
        checks.choice("divergence", self.divergence, tuple(_LOSS))
        checks.number("gamma", self.gamma, 0.0)

    @property
    def loss(self) -> str:  # type: ignore[override]
        return _LOSS[self.divergence]

    @property
    def traits(self) -> Traits:
        return Traits(stochastic=self.gamma > 0)

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        a = state["position"] - self.step_size * state["grad"]
        return (a + self._scale * noise.normal() if self.gamma > 0 else a), state

    @property
    def _scale(self) -> float:
        return math.sqrt(2 * self.step_size * self.gamma)

    def kernel(self) -> Kernel:
        return Kernel("sgd", (self.step_size, self._scale), noise=self.gamma > 0)
