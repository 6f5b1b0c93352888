"""Mixtures of Gaussians in the plane, as in [CS] and its preprint [CS0]: their samples, and what is measured of others'.

[CS] Liu, Kothari, Alahi, AAAI 2020, and its public code; [CS0] "Collaborative GAN Sampling", 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1000  # samples whose distances to all real ones are in memory at once


@dataclass(frozen=True)
class Mixture:
    """Equal round Gaussians of standard deviation ``sigma`` per axis at ``centres``, with ``shares`` that sum to 1.

    near: how many sigma a good sample is away from its centre at most.
    """

    centres: tuple[tuple[float, float], ...]
    sigma: float
    shares: tuple[float, ...]
    near: float = 4.0

    def points(self) -> Tensor:
        """Centres (M, 2), float64."""
        return torch.tensor(self.centres, dtype=torch.float64)

    def draw(self, n: int, random: torch.Generator) -> Tensor:
        """Real samples (n, 2), stratified: each component has its share of the n, up to one sample."""
        position = (torch.arange(n) + torch.rand(1, generator=random, dtype=torch.float64)) / n
        shares = torch.tensor(self.shares, dtype=torch.float64)
        which = torch.bucketize(position, shares.cumsum(0)).clamp(max=len(shares) - 1)
        return self.points()[which].float() + self.sigma * torch.randn(n, 2, generator=random)

    def measure(self, x: Tensor) -> dict[str, float]:
        """Of samples (n, 2): share of good ones, KL and JS over the components, std of the good, recovered modes.

        good: within ``near`` sigma of a centre. kl: KL(model || real) in nats over the components, of good samples alone;
        infinite without any. js: Jensen-Shannon divergence in nats with one more bin for the others. std: per axis, of
        good samples about their centres.
        """
        distance, which = torch.cdist(x.double(), self.points(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
        good = distance <= self.near * self.sigma
        counts = torch.bincount(which[good], minlength=len(self.centres)).double()
        number, real = counts.sum(), torch.tensor(self.shares, dtype=torch.float64)
        model = torch.cat([counts, len(x) - number[None]]) / len(x)
        padded = torch.cat([real, real.new_zeros(1)])
        middle = (model + padded) / 2
        return {
            "good": float(number) / len(x),
            "kl": _kl(counts / number, real) if number else math.inf,
            "js": (_kl(model, middle) + _kl(padded, middle)) / 2,
            "std": float((distance[good].square().mean() / 2).sqrt()),
            "modes": float((counts > 0).sum()),
        }


def nearest_real(x: Tensor, real: Tensor, near: float) -> dict[str, float]:
    """Of samples (n, 2): mean distance to the nearest of ``real`` (m, 2), and the share of good ones, within ``near``.

    [CS0]'s measures. Both fall with m: compare at one m ([CS0] does not state its own; 10,000 everywhere here).
    """
    distance = torch.cat([torch.cdist(part, real).min(1).values for part in x.split(BLOCK)]).double()
    return {"distance": float(distance.mean()), "good": float((distance <= near).double().mean())}


def _kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats; 0 log 0 = 0, and q > 0 where p > 0."""
    some = p > 0
    return float((p[some] * (p[some] / q[some]).log()).sum())


def _circle(radius: float) -> tuple[tuple[float, float], ...]:
    """Eight centres, counted from 0 degrees."""
    return tuple((radius * math.cos(i * math.pi / 4), radius * math.sin(i * math.pi / 4)) for i in range(8))


RADIUS = 10 / 1.414  # [CS]'s scaling by 1.414
IMBALANCED8 = Mixture(_circle(RADIUS), 0.02 * 10 / 1.414, (0.45, 0.45) + (0.1 / 6,) * 6)  # components at 0 and 45 degrees
GAUSSIANS8 = Mixture(_circle(RADIUS), 0.05 / 1.414, (1 / 8,) * 8)  # [CS0]
UNEQUAL8 = Mixture(_circle(RADIUS), 0.05 / 1.414, (0.4, 0.4) + (0.2 / 6,) * 6)  # [CS0] Figure 5
GAUSSIANS25 = Mixture(tuple((float(x), float(y)) for x in range(-2, 3) for y in range(-2, 3)), 0.05, (1 / 25,) * 25)  # [CS]
