"""Generators that are no GANs: a small variational autoencoder and a small normalizing flow.

Both map z ~ N(0, I) to images (N, *shape) in about [-1, 1] by ``forward``, so that they are generators to ``fr.Refiner``;
both are trained on their own ``loss``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEVELS = 17  # the digits' pixels are whole numbers 0 ... 16, as -1 ... 1 in steps of 1/8


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, outputs)
    )


class VAE(nn.Module):
    """Variational autoencoder [Kingma, Welling 2014] with MLPs and a Gaussian decoder of fixed standard deviation `noise`.

    ``forward``: latents (N, latent) -> the decoder's mean (N, *shape), without noise, which is what makes it blurry.
    """

    def __init__(self, shape: tuple[int, ...], latent: int = 16, width: int = 256, noise: float = 0.3):
        super().__init__()
        self.noise, pixels = noise, math.prod(shape)
        self.encoder = nn.Sequential(nn.Flatten(), _mlp(pixels, width, 2 * latent))
        self.decoder = nn.Sequential(_mlp(latent, width, pixels), nn.Tanh(), nn.Unflatten(1, shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def loss(self, images: Tensor, random: torch.Generator) -> Tensor:
        """The negative evidence lower bound, mean over the batch, up to a constant; one draw of z for each image."""
        mean, log_variance = self.encoder(images).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=random)
        misfit = (self(z) - images).square().flatten(1).sum(1) / (2 * self.noise**2)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (misfit + kl).mean()


class Coupling(nn.Module):
    """Affine coupling [RealNVP: Dinh et al. 2017]: the half under the mask scales and shifts the other; |log scale| < 1."""

    mask: Tensor

    def __init__(self, mask: Tensor, width: int):
        super().__init__()
        self.register_buffer("mask", mask)  # (F,) of 0 and 1
        self.network = _mlp(len(mask), width, 2 * len(mask))
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.network(kept).chunk(2, 1)
        return (1 - self.mask) * torch.tanh(log_scale), (1 - self.mask) * shift

    def forward(self, z: Tensor) -> Tensor:
        log_scale, shift = self._scale_and_shift(self.mask * z)
        return z * log_scale.exp() + shift

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(z (N, F), log |det dz/dy| (N,))."""
        log_scale, shift = self._scale_and_shift(self.mask * y)
        return (y - shift) * (-log_scale).exp(), -log_scale.sum(1)


class Flow(nn.Module):
    """RealNVP on all pixels, `layers` couplings under random masks that come in complementary pairs.

    ``forward``: latents (N, pixels) -> images (N, *shape): the inverse of what is trained. It models dequantised images:
    every pixel carries uniform noise of one level (1/8), which is what makes it noisy.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, images: Tensor, layers: int = 8, width: int = 128):
        super().__init__()
        self.shape, pixels = tuple(images.shape[1:]), math.prod(images.shape[1:])
        flat = images.flatten(1)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("scale", flat.std(0) + 1 / LEVELS)  # pixels that never change have the noise alone
        masks: list[Tensor] = []
        while len(masks) < layers:
            mask = (torch.randperm(pixels) < pixels // 2).float()
            masks += [mask, 1 - mask]
        self.couplings = nn.ModuleList(Coupling(mask, width) for mask in masks[:layers])

    def forward(self, z: Tensor) -> Tensor:
        for coupling in self.couplings:
            z = coupling(z)
        return (z * self.scale + self.mean).view(-1, *self.shape)

    def inverse(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(z (N, pixels), log |det dz/dx| (N,))."""
        z = (images.flatten(1) - self.mean) / self.scale
        log_det = -self.scale.log().sum().expand(len(z))
        for coupling in reversed(self.couplings):
            z, part = coupling.inverse(z)  # type: ignore[operator]
            log_det = log_det + part
        return z, log_det

    def loss(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Negative log-likelihood of dequantised images, mean over the batch, up to a constant."""
        noise = (torch.rand(images.shape, generator=random) - 0.5) * 2 / (LEVELS - 1)
        z, log_det = self.inverse(images + noise)
        return (0.5 * z.square().sum(1) - log_det).mean()
