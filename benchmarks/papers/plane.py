"""The GANs of [CS] and [CS0] on two-dimensional data: networks, initialisation, recipes, and the Swiss roll."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.papers import mixtures
from fastrefine import models
from fastrefine.demo import gan
from fastrefine.demo.gan import Draw, Trainer, Training, build

LATENT_DIM = 2
ROLL_NOISE, ROLL_SCALE = 0.25, 10 / 15
ROLL_NEAR = 3 * 0.25  # [CS0]'s 3 sigma: of the noise before the scaling, as published


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
        g, d = self.networks(seed)
        return Trainer(g, d, draw, gan.normal(LATENT_DIM), self.training, seed)

    def train(self, draw: Draw, steps: int, seed: int) -> tuple[nn.Module, nn.Module]:
        """(generator, discriminator) after ``steps`` updates of each, in eval mode."""
        trainer = self.trainer(draw, seed)
        for _ in trainer.advance(steps):
            pass
        return trainer.generator, trainer.discriminator


RING = Plane((64,) * 5, True, Training(1000, "sgd", (5e-3, 1e-2)))  # as published
GRID = Plane((256,) * 5, True, Training(1000, "sgd", (5e-4, 1e-3), bfloat16=True))  # but for bfloat16 as published
# [CS0] gives depth, batch and steps; Adam is ours: SGD at the ring's rates ends at a mean distance of 1.04 on the roll,
# published .26.
EARLY = Plane((64,) * 4, False, Training(400, "adam", (1e-3, 1e-3)))


class Fresh:
    """A loader of fresh real batches without end, the same ones each time it is begun."""

    def __init__(self, draw: Draw, batch_size: int, seed: int):
        self.draw, self.batch_size, self.seed = draw, batch_size, seed

    def __iter__(self):  # type: ignore[no-untyped-def]
        random = torch.Generator().manual_seed(self.seed)
        while True:
            yield self.draw(self.batch_size, random)


def draw_roll(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2): scikit-learn's Swiss roll with noise .25, its first and third column, times 10 / 15."""
    from sklearn.datasets import make_swiss_roll

    seed = int(torch.randint(2**31, (1,), generator=random))
    points, _ = make_swiss_roll(n, noise=ROLL_NOISE, random_state=seed)
    return torch.from_numpy(points[:, (0, 2)]).float() * ROLL_SCALE


def measure_roll(x: Tensor, real: Tensor) -> dict[str, float]:
    """Of samples (n, 2): mean distance to the nearest real one, and the share within .75 of it."""
    return mixtures.nearest_real(x, real, ROLL_NEAR)


def smaller(plane: Plane, batch_size: int) -> Plane:
    """The same with smaller batches, for quick runs."""
    return replace(plane, training=replace(plane.training, batch_size=batch_size))


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
