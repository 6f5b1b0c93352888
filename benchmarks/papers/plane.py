"""Two-dimensional data, what is measured of samples of them, and the GANs of [CS], [CS0] and [DDLS] that learn them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrefine import models
from fastrefine.demo.gan import Draw, Pair, Trainer, Training, build, descend, normal

BLOCK, GOOD_BLOCK = 1000, 500_000  # samples whose distances to all real ones, to all centres, are in memory at once


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
        return self.around(torch.bucketize(position, shares.cumsum(0)).clamp(max=len(shares) - 1), random)

    def around(self, which: Tensor, random: torch.Generator) -> Tensor:
        """A sample (n, 2) of each of the components ``which`` (n,)."""
        return self.points()[which].float() + self.sigma * torch.randn(len(which), 2, generator=random)

    def modes_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of samples (n, 2): their components (n,) int64, -1 where a sample is not good, and distances (n,) to the nearest."""
        parts = [self._nearest(part) for part in x.split(GOOD_BLOCK)]
        distance, which = (torch.cat(column) for column in zip(*parts, strict=True))
        return torch.where(distance <= self.near * self.sigma, which, -1), distance

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        distance, which = torch.cdist(x.double(), self.points(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
        return distance, which

    def counted(self, x: Tensor) -> tuple[Tensor, float]:
        """Of samples (n, 2): good ones of each component (M,), float64, and their std per axis about their centres."""
        which, distance = self.modes_of(x)
        good = which >= 0
        counts = torch.bincount(which[good], minlength=len(self.centres)).double()
        return counts, float((distance[good].square().mean() / 2).sqrt())

    def measure(self, x: Tensor) -> dict[str, float]:
        """Of samples (n, 2): share of good ones, KL and JS over the components, std of the good, recovered modes.

        good: within ``near`` sigma of a centre. kl: KL(model || real) in nats over the components, of good samples alone;
        infinite without any. js: Jensen-Shannon divergence in nats with one more bin for the others.
        """
        counts, std = self.counted(x)
        number, real = counts.sum(), torch.tensor(self.shares, dtype=torch.float64)
        model = torch.cat([counts, len(x) - number[None]]) / len(x)
        padded = torch.cat([real, real.new_zeros(1)])
        middle = (model + padded) / 2
        return {
            "good": float(number) / len(x), "kl": _kl(counts / number, real) if number else math.inf,
            "js": (_kl(model, middle) + _kl(padded, middle)) / 2, "std": std, "modes": float((counts > 0).sum()),
        }  # fmt: skip


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
# [DOT] divides a grid of spacing 2 and a standard deviation of .05 by 2.828.
DOT25 = Mixture(tuple((x / 2.828, y / 2.828) for x in range(-4, 5, 2) for y in range(-4, 5, 2)), 0.05 / 2.828, (1 / 25,) * 25)


def quality25(x: Tensor) -> dict[str, Any]:
    """Of samples (n, 2) of DOT25: high_quality (share), modes (recovered), shares (25 of all samples), std of the good ones."""
    counts, std = DOT25.counted(x)
    shares = counts / max(len(x), 1)
    return {"high_quality": float(shares.sum()), "modes": int((shares > 0).sum()), "shares": shares.tolist(), "std": std}


def at_random25(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2) of DOT25, each centre as likely as the others."""
    return DOT25.around(torch.randint(25, (n,), generator=random), random)


def evenly25(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2) of DOT25, as many of each centre, in turn (the stratified batches of [CS] 4.1)."""
    return DOT25.around(torch.arange(n) % 25, random)


def earth_mover(x: Tensor, y: Tensor) -> float:
    """Earth mover's distance of equally many samples (n, 2) and (n, 2), Euclidean cost: POT, or SciPy without it."""
    a, b = x.double().numpy(), y.double().numpy()
    cost = np.linalg.norm(a[:, None] - b[None], axis=2)
    try:
        import ot  # type: ignore[import-untyped]
    except ImportError:
        from scipy.optimize import linear_sum_assignment

        return float(cost[linear_sum_assignment(cost)].mean())
    return float(ot.emd2([], [], cost, numItermax=10_000_000))


def draw_roll(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2): scikit-learn's Swiss roll with noise .25, its first and third column, times 10 / 15."""
    from sklearn.datasets import make_swiss_roll

    seed = int(torch.randint(2**31, (1,), generator=random))
    points, _ = make_swiss_roll(n, noise=0.25, random_state=seed)
    return torch.from_numpy(points[:, (0, 2)]).float() * (10 / 15)


def measure_roll(x: Tensor, real: Tensor) -> dict[str, float]:
    """Of samples (n, 2): mean distance to the nearest real one, and the share within [CS0]'s 3 sigma of it, as published:
    of the noise before the scaling.
    """
    return nearest_real(x, real, 3 * 0.25)


LATENT_DIM = 2


@dataclass(frozen=True)
class Plane:
    """`hidden` layers in G (ReLU, with BatchNorm where `batch_norm`) and D (ReLU), and how the pair is trained.

    Weights start from Glorot's uniform law and zero biases: from torch's own start the ring's generator finds 3 modes, not 7.
    """

    hidden: tuple[int, ...]
    batch_norm: bool
    training: Training

    def networks(self, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
        """(generator (N, 2) -> (N, 2), discriminator (N, 2) -> logits (N,)), initialised from `seed`."""
        g = build(lambda: _glorot(models.mlp_generator(LATENT_DIM, self.hidden, 2, self.batch_norm)), seed)
        d = build(lambda: _glorot(_relu_discriminator(self.hidden)), seed + 100)
        return g, d

    def trainer(self, draw: Draw, seed: int) -> Trainer:
        """The pair at step 0; latents are N(0, I_2)."""
        return Trainer(*self.networks(seed), draw, normal(LATENT_DIM), self.training, seed)

    def smaller(self, batch_size: int) -> Plane:
        """The same with smaller batches."""
        return replace(self, training=replace(self.training, batch_size=batch_size))


RING = Plane((64,) * 5, True, Training(1000, "sgd", (5e-3, 1e-2)))  # as published
GRID = Plane((256,) * 5, True, Training(1000, "sgd", (5e-4, 1e-3), bfloat16=True))  # but for bfloat16 as published
# [CS0] gives depth, batch and steps; Adam is ours: SGD at the ring's rates ends at a mean distance of 1.04 on the roll,
# published .26.
EARLY = Plane((64,) * 4, False, Training(400, "adam", (1e-3, 1e-3)))


def _relu_discriminator(hidden: Sequence[int]) -> nn.Sequential:
    pairs = zip((2, *hidden), hidden, strict=False)
    layers = [layer for inputs, outputs in pairs for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1), nn.Flatten(0))


def _glorot(network: nn.Sequential) -> nn.Sequential:
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


# --- WGAN-GP (Gulrajani et al. 2017) with the networks of [DDLS]


def _mlp(inputs: int, width: int, outputs: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for size in (inputs, width, width):
        layers += [nn.Linear(size, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _steep(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """He's initialisation with a first layer 1.5 times as steep: torch's own starts so flat that the modes take far longer."""
    network = _mlp(inputs, width, outputs, lambda: nn.LeakyReLU(0.2))
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        nn.init.kaiming_normal_(layer.weight, 0.2)
    with torch.no_grad():
        linear[0].weight.mul_(1.5)
        linear[0].bias.uniform_(-1.5, 1.5)
    return network


class Scaled(nn.Module):
    """x -> factor x: a logit with features .018 wide is learned far faster when they are not so small."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def ratio() -> nn.Sequential:
    """Backbone of the fitted logit: 2 -> 256 x 3 -> 1, SiLU, for Langevin steps want a smooth gradient."""
    return nn.Sequential(Scaled(15.0), *_mlp(2, 256, 1, nn.SiLU))


class WganTrainer(Trainer):
    """WGAN-GP: three updates of the critic for each of the generator, of 2 -> 256 x 3 -> 2 and 2 -> 512 x 3 -> 1 ([DDLS] 5.1).

    Adam (betas .5, .9) at rates (2e-4, 1e-3), held for .3 of ``steps``, then falling linearly to a fiftieth. .1 weighs the
    penalty (|grad D| - 1)^2 between real and fake. The critic's two wide layers multiply in bfloat16 while it is trained
    (three times faster on a CPU that has it, far slower on others); weights, sums and the generator are float32.
    """

    def __init__(self, real: Draw, steps: int, seed: int, bfloat16: bool = True):
        pair: Pair = build(lambda: _steep(LATENT_DIM, 256, 2), seed), build(lambda: _steep(2, 512, 1), seed + 1)
        super().__init__(*pair, real, normal(LATENT_DIM), Training(100, "adam", (2e-4, 1e-3), bfloat16=bfloat16), seed)
        self.steps = steps
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["fused"] = True

    def _update(self) -> None:
        n, (g, d) = self.training.batch_size, (self.generator, self.discriminator)
        left = (self.steps - self.step - 1) / max(self.steps * 0.7, 1)
        for optimizer, rate in zip(self.optimizers, self.training.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 0.02 + 0.98 * left)
        for _ in range(3):
            x = self.real(n, self.random)
            with torch.no_grad():
                fake = g(self.latents(n, self.random))
            u = torch.rand(n, 1, generator=self.random)
            between = (u * x + (1 - u) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(self._score(between).sum(), between, create_graph=True)
            scores = self._score(torch.cat([x, fake]))
            loss = scores[n:].mean() - scores[:n].mean()
            descend(self.optimizers[1], loss + 0.1 * (slope.norm(dim=1) - 1).square().mean())
        d.requires_grad_(False)
        descend(self.optimizers[0], -self._score(g(self.latents(n, self.random))).mean())
        d.requires_grad_(True)

    def _score(self, x: Tensor) -> Tensor:
        d = self.discriminator
        assert isinstance(d, nn.Sequential)
        h = d[:2](x)
        with torch.autocast("cpu", torch.bfloat16, self.training.bfloat16):
            h = d[2:6](h)
        return d[6](h.float())
