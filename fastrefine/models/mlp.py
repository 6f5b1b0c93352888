"""Fully connected pairs for two-dimensional toy data (rings and grids of Gaussians, as in Liu et al., AAAI 2020)."""

from collections.abc import Sequence

from torch import nn


def mlp_generator(
    latent: int = 2, hidden: Sequence[int] = (128, 128, 128), outputs: int = 2, batch_norm: bool = False
) -> nn.Sequential:
    """Latents (N, latent) -> points (N, outputs), not bounded."""
    layers: list[nn.Module] = []
    width = latent
    for wider in hidden:
        layers += [nn.Linear(width, wider), *([nn.BatchNorm1d(wider)] if batch_norm else []), nn.ReLU(inplace=True)]
        width = wider
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def mlp_discriminator(inputs: int = 2, hidden: Sequence[int] = (128, 128, 128)) -> nn.Sequential:
    """Points (N, inputs) -> logits (N,)."""
    layers: list[nn.Module] = []
    width = inputs
    for wider in hidden:
        layers += [nn.Linear(width, wider), nn.LeakyReLU(0.2, inplace=True)]
        width = wider
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))
