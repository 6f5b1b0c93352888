"""The imbalanced ring of [CS] and the Swiss roll of [CS0]: data, networks, training, and what is measured of samples.

[CS] Liu, Kothari, Alahi, AAAI 2020, its public code; [CS0] their preprint "Collaborative GAN Sampling", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrefine import models
from fastrefine.experiments.train import build

RADIUS, SIGMA = 10 / 1.414, 0.02 * 10 / 1.414  # [CS]'s scaling by 1.414
SHARES = (0.45, 0.45) + (0.1 / 6,) * 6  # the components at 0 and 45 degrees, then the other six
ROLL_NOISE, ROLL_SCALE = 0.25, 10 / 15
NEAR = 3 * 0.25  # [CS0]'s 3 sigma: of the noise before the scaling, as published
BLOCK = 1000  # samples whose distances to all real ones are in memory at once


@dataclass(frozen=True)
class Training:
    """Networks and training of one set: `hidden` layers in G (ReLU, with BatchNorm where `batch_norm`) and D (ReLU).

    optimizer: "sgd" | "adam" (betas .5, .9), at rates (G, D); one update of D, then one of G, non-saturating loss.
    Weights start from Glorot's uniform law and zero biases: from torch's own start the ring's generator finds 3 modes, not 7.
    """

    hidden: tuple[int, ...]
    batch_norm: bool
    batch_size: int
    steps: int
    optimizer: str
    rates: tuple[float, float]


RING = Training((64,) * 5, True, 1000, 3000, "sgd", (5e-3, 1e-2))  # as published
# [CS0] gives depth, batch and steps; Adam is ours: SGD at the ring's rates ends at a mean distance of 1.04, published .26.
ROLL = Training((64,) * 4, False, 400, 3000, "adam", (1e-3, 1e-3))


def centres() -> Tensor:
    """Centres (8, 2), float64, counted from 0 degrees."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def draw_ring(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2), stratified: each component has its share of the n, up to one sample."""
    position = (torch.arange(n) + torch.rand(1, generator=random, dtype=torch.float64)) / n
    which = torch.bucketize(position, torch.tensor(SHARES, dtype=torch.float64).cumsum(0)).clamp(max=7)
    return centres()[which].float() + SIGMA * torch.randn(n, 2, generator=random)


def draw_roll(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2): scikit-learn's Swiss roll with noise .25, its first and third column, times 10 / 15."""
    from sklearn.datasets import make_swiss_roll

    seed = int(torch.randint(2**31, (1,), generator=random))
    points, _ = make_swiss_roll(n, noise=ROLL_NOISE, random_state=seed)
    return torch.from_numpy(points[:, (0, 2)]).float() * ROLL_SCALE


def measure_ring(x: Tensor) -> dict[str, float]:
    """Of samples (n, 2): share of good ones, KL and JS over the components, std of the good, recovered modes.

    good: within 4 sigma of a centre. kl: KL(model || real) in nats over the 8 components, of good samples alone; infinite
    without any. js: Jensen-Shannon divergence in nats with a ninth bin for the others. std: per axis; sigma is .1414.
    """
    distance, which = torch.cdist(x.double(), centres(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    good = distance <= 4 * SIGMA
    counts = torch.bincount(which[good], minlength=8).double()
    number, real = counts.sum(), torch.tensor(SHARES, dtype=torch.float64)
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


def measure_roll(x: Tensor, real: Tensor) -> dict[str, float]:
    """Of samples (n, 2): mean distance to the nearest of `real` (m, 2), and the share of good ones, within .75 of it.

    Both fall with m: compare at one m ([CS0] does not state its own; here 10,000).
    """
    nearest = torch.cat([torch.cdist(part, real).min(1).values for part in x.split(BLOCK)]).double()
    return {"distance": float(nearest.mean()), "good": float((nearest <= NEAR).double().mean())}


def networks(training: Training, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator (N, 2) -> (N, 2), discriminator (N, 2) -> logits (N,)), initialised from `seed`."""
    g = build(lambda: _glorot(models.mlp_generator(2, training.hidden, 2, training.batch_norm)), seed)
    d = build(lambda: _glorot(_relu_discriminator(training.hidden)), seed + 100)
    return g, d


def train(training: Training, draw: Callable[[int, torch.Generator], Tensor], seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator, discriminator) after `training`.steps updates of each, in eval mode; latents are N(0, I_2)."""
    g, d = networks(training, seed)
    random, n = torch.Generator().manual_seed(seed), training.batch_size
    opt_g, opt_d = (_optimizer(training, net, rate) for net, rate in zip((g, d), training.rates, strict=True))
    g.train()
    for _ in range(training.steps):
        with torch.no_grad():
            fake = g(torch.randn(n, 2, generator=random))
        loss = F.softplus(-d(draw(n, random))).mean() + F.softplus(d(fake)).mean()
        opt_d.zero_grad(set_to_none=True)
        loss.backward()
        opt_d.step()

        d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        F.softplus(-d(g(torch.randn(n, 2, generator=random)))).mean().backward()
        opt_g.step()
        d.requires_grad_(True)
    return g.eval(), d.eval()


def _optimizer(training: Training, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), rate)
    return torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.9))


def _kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats; 0 log 0 = 0, and q > 0 where p > 0."""
    some = p > 0
    return float((p[some] * (p[some] / q[some]).log()).sum())


def _relu_discriminator(hidden: tuple[int, ...]) -> nn.Sequential:
    pairs = zip((2, *hidden), hidden, strict=False)
    layers = [layer for inputs, outputs in pairs for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1), nn.Flatten(0))


def _glorot(network: nn.Sequential) -> nn.Sequential:
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network
