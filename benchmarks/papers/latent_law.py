"""The law that a latent sampler draws from, by quadrature: what its chains must reproduce, mixed or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 65_536  # grid points evaluated at once


class LatentGrid:
    """Midpoints of a square grid over a two-dimensional standard normal latent, pushed through G.

    points: per axis, over [-half_width, half_width]; the prior's mass outside is 4 Phi(-half_width) at most, about 2e-6
    at 5. images: G(z) (points^2, 2) float32. log_prior: log p0(z) + log cell area (points^2,) float64.
    """

    def __init__(self, generator: nn.Module, points: int = 2000, half_width: float = 5.0):
        self.points, self.half_width = points, half_width
        width = 2 * half_width / points
        axis = -half_width + width * (torch.arange(points, dtype=torch.float64) + 0.5)
        self.latents = torch.cartesian_prod(axis, axis)
        log_area = 2 * torch.log(torch.tensor(width, dtype=torch.float64) / (2 * torch.pi) ** 0.5)
        self.log_prior = -0.5 * self.latents.square().sum(1) + log_area
        self.images = evaluate(generator, self.latents)

    def law(self, logits: Tensor, scale: float = 1.0) -> LatentLaw:
        """p(z) proportional to p0(z) exp(scale d(G(z))) ([DDLS] Eq. 5), logits: d at ``images`` (points^2,)."""
        log_weights = self.log_prior + scale * logits.double()
        log_normaliser = torch.logsumexp(log_weights, 0)
        potential = 0.5 * self.latents.square().sum(1) - scale * logits.double()
        return LatentLaw(torch.exp(log_weights - log_normaliser), float(log_normaliser), potential)


@dataclass(frozen=True, eq=False)
class LatentLaw:
    """Probabilities (points^2,) float64 of a grid's cells, log of the integral of p0(z) exp(scale d(G(z))), and the potential
    -log p0(z) - scale d(G(z)) of the cells, p0 without its constant.
    """

    probabilities: Tensor
    log_normaliser: float
    potential: Tensor

    def mean(self, values: Tensor) -> float:
        """Expectation of a function given by its values (points^2,) at the grid."""
        return float((self.probabilities * values).sum())

    def shares(self, modes: Tensor, count: int) -> Tensor:
        """Mass (count,) of the cells labelled 0 ... count - 1; cells labelled -1 are in none."""
        good = modes >= 0
        return torch.zeros(count, dtype=torch.float64).index_add(0, modes[good], self.probabilities[good])

    def sample(self, n: int, random: torch.Generator) -> Tensor:
        """Cells (n,) int64 drawn independently."""
        edges = self.probabilities.cumsum(0)
        u = torch.rand(n, generator=random, dtype=torch.float64) * edges[-1]
        return torch.searchsorted(edges, u, right=True).clamp(max=len(edges) - 1)


@torch.no_grad()
def evaluate(network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """A network's float32 outputs (n, ...), one column flattened to (n,), at inputs (n, ...), block by block."""
    out = torch.cat([network(part.float()) for part in inputs.split(BLOCK)])
    return out[:, 0] if out.shape[1:] == (1,) else out


@dataclass(frozen=True)
class Energy:
    """logits of images (n, 2) -> (n,), and the weight with which a sampler takes them."""

    logits: Callable[[Tensor], Tensor]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Law:
    """A latent law, and the shares (25,) of the modes that a perfect sampler of it would show."""

    law: LatentLaw
    shares: Tensor

    @property
    def high_quality(self) -> float:
        return float(self.shares.sum())

    @property
    def energy(self) -> float:
        return self.law.mean(self.law.potential)

    def distance(self, shares: list[float]) -> float:
        """The largest of all modes' between these shares and the law's."""
        return float((torch.tensor(shares, dtype=torch.float64) - self.shares).abs().max())

    def facts(self) -> dict[str, Any]:
        return {
            "high_quality": self.high_quality, "shares": self.shares.tolist(), "mean_energy": self.energy,
            "log_normaliser": self.law.log_normaliser,
        }  # fmt: skip


def law_of(grid: LatentGrid, modes: Tensor, energy: Energy) -> Law:
    """The law of an energy; modes (points^2,): of the grid's images, as ``Mixture.modes_of`` tells them."""
    law = grid.law(energy.logits(grid.images), energy.scale)
    return Law(law, law.shares(modes, 25))
