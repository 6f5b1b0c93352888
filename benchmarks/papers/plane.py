"""The GANs of [CS], [CS0] and [DDLS] on two-dimensional data: networks, initialisation, training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastrefine import models
from fastrefine.demo.gan import Draw, Pair, Trainer, Training, build, descend, normal

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
    (three times faster on a CPU that has it); weights, sums and the generator are float32.
    """

    def __init__(self, real: Draw, steps: int, seed: int):
        pair: Pair = build(lambda: _steep(LATENT_DIM, 256, 2), seed), build(lambda: _steep(2, 512, 1), seed + 1)
        super().__init__(*pair, real, normal(LATENT_DIM), Training(100, "adam", (2e-4, 1e-3)), seed)
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
        with torch.autocast("cpu", torch.bfloat16):
            h = d[2:6](h)
        return d[6](h.float())
