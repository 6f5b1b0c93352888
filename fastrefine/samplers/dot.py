"""Discriminator optimal transport ([DOT] Tanaka, NeurIPS 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers.adam import BETA1, BETA2, EPSILON, MOMENTS, adam
from fastrefine.samplers.base import Evaluation, Kernel, Latent, Networks, NoiseSource, Sample, Sampler, State, Traits, per_slot

SHIFT = 1e-3  # delta: keeps the distance from the origin differentiable at it
PAIRS = 100  # random pairs whose largest slope is K_eff


@dataclass(frozen=True, repr=False)
class DOT(Sampler):
    """Descent of E(a) = |a - a0 + delta| - d(a) / K_eff from the proposal a0 ([DOT] Alg. 1, 2), delta = 1e-3 per element.

    The energy is the transport cost of a sample against the gain of a K_eff-Lipschitz potential. At the input the result
    is clipped to a bounded prior's box, and with a normal prior the radial part of the step's direction g is removed.

    step_size: more than 0. optimizer: "adam" (bias correction by the sample's own step) | "sgd". lipschitz: K_eff, more
    than 0; None: the largest |d(a) - d(a')| / |a - a'| over 100 random pairs of proposals, which needs a prior.
    projection, at the input under a normal prior: "radial" g - z (g.z) / (z.z) | "published" g - z (g.z) / sqrt(dim), what
    the authors' code does (it takes away about sqrt(dim) times too much) | "none".
    Raises InputError on values out of range.

    Example: ``fr.Refiner.from_pair(pair, sampler=fr.DOT(0.01), at="input", max_steps=3).sample(8)``
    """

    step_size: float
    optimizer: str = "adam"
    lipschitz: float | None = None
    projection: str = "radial"
    latent: Latent | None = field(default=None, repr=False)

    loss = "wasserstein"

    def __post_init__(self) -> None:
        checks.number("step_size", self.step_size, 0.0, open_low=True)
        checks.choice("optimizer", self.optimizer, ("adam", "sgd"))
        checks.choice("projection", self.projection, ("radial", "published", "none"))
        if self.lipschitz is not None:
            checks.number("lipschitz", self.lipschitz, 0.0, open_low=True)

    @property
    def traits(self) -> Traits:
        return Traits(ascends=False, reads_prior=True)  # it weighs the logit against the distance

    def bind(self, networks: Networks) -> DOT:
        latent = networks.latent(required=False)
        projection = self.projection if latent is not None and latent.is_normal else "none"
        lipschitz = self.lipschitz
        if lipschitz is None:
            lipschitz = largest_slope(*networks.probe(2 * PAIRS, "lipschitz=None"))
        return replace(self, latent=latent, projection=projection, lipschitz=lipschitz)

    def init(self, a: Tensor, sample: Sample) -> State:
        zero = a.new_zeros(len(a))
        state = {**super().init(a, sample), "pull": zero, "radial": zero, "origin": torch.zeros_like(a)}
        return state | {name: torch.zeros_like(a) for name in self._moments}

    def observe(self, a: Tensor, evaluation: Evaluation, state: State, step: Tensor, noise: NoiseSource) -> State:
        assert self.lipschitz is not None
        origin = torch.where(per_slot(step == 0), a, state["origin"])
        offset, z, grad = (a - origin + SHIFT).double(), a.double(), evaluation.grad.double()
        pull = 1 / offset.square().sum(1).sqrt()
        radial = torch.zeros_like(pull)
        if self.projection != "none":
            along = (grad * z).sum(1) / self.lipschitz + (offset * z).sum(1) * pull
            length = (z * z).sum(1) if self.projection == "radial" else torch.full_like(along, math.sqrt(a.shape[1]))
            radial = torch.where(length > 0, along / length, 0.0)
        found = super().observe(a, evaluation, state, step, noise)
        return {**found, "origin": origin, "pull": pull.to(a.dtype), "radial": radial.to(a.dtype)}

    def propose(self, state: State, step: Tensor, noise: NoiseSource) -> tuple[Tensor, State]:
        assert self.lipschitz is not None
        a = state["position"]
        offset = a - state["origin"] + SHIFT
        g = state["grad"] * (1 / self.lipschitz) + offset * per_slot(state["pull"]) - a * per_slot(state["radial"])
        if self.optimizer == "adam":
            update, moments = adam(g, state, step, self.step_size)
            a, state = a - update, {**state, **moments}
        else:
            a = a - self.step_size * g
        return a if self.latent is None else a.clamp(*self.latent.table[1:]), state

    @property
    def _moments(self) -> tuple[str, ...]:
        return MOMENTS if self.optimizer == "adam" else ()

    def kernel(self) -> Kernel | None:
        if self.lipschitz is None:
            return None
        modes = {"none": 0.0, "radial": 1.0, "published": 2.0}
        hyper = (self.step_size, BETA1, BETA2, EPSILON, 1 / self.lipschitz, SHIFT, modes[self.projection])
        table = None if self.latent is None else self.latent.table
        return Kernel(f"dot_{self.optimizer}", hyper, ("pull", "radial"), ("origin", *self._moments), latent=table)


def largest_slope(a: Tensor, logits: Tensor) -> float:
    """K_eff ([DOT] 3.3): max |d_i - d_j| / |a_i - a_j| over pairs (0, 1), (2, 3), ... of activations (2n, ...)."""
    a, logits = a.double().flatten(1), logits.double()
    distance = (a[0::2] - a[1::2]).norm(dim=1)
    slope = (logits[0::2] - logits[1::2]).abs() / distance
    slope = slope[(distance > 0) & torch.isfinite(slope)]
    if not len(slope) or float(slope.max()) <= 0:
        raise InputError("lipschitz=None: the discriminator gives all probed proposals the same logit; pass lipschitz=")
    return float(slope.max())
