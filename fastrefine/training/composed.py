"""The extended latent space: a generator whose output has noise of its own, so that its samples fill data space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.networks.calls import takes_labels


class NoisyOutput(nn.Module):
    """G*(z, z') = G(z) + scale z' ([DDLS] 3.4, Cor. 1), for latents (N, numel of z + numel of an image).

    Use it with ``Product(prior, Normal(*image_shape))``: both latents come flattened and concatenated. A sampler then
    targets p0(z) N(z'; 0, I) exp(d(G*(z, z'))), whose image is a density over all of data space.

    scale: standard deviation of the noise, in the images' units, more than 0. latent_shape: of one z, without the batch;
    None reads it off the first Linear (features,) or (transposed) convolution (channels, 1, ...) of G.
    Raises InputError when it cannot be read off, and when widths do not fit.
    """

    def __new__(cls, generator: nn.Module | None = None, *args: Any, **kwargs: Any) -> NoisyOutput:
        """The class whose ``forward`` says what the generator takes."""
        taken, required = takes_labels(generator, {}) if isinstance(generator, nn.Module) else (False, False)
        kind = _Labelled if required else _MaybeLabelled if taken else NoisyOutput
        return super().__new__(kind if cls is NoisyOutput else cls)

    def __init__(self, generator: nn.Module, scale: float, latent_shape: tuple[int, ...] | None = None):
        super().__init__()
        if not isinstance(generator, nn.Module):
            raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module")
        checks.number("scale", scale, 0.0, open_low=True)
        self.generator, self.scale = generator, float(scale)
        self.latent_shape = _first_input(generator) if latent_shape is None else _checked(latent_shape)

    def forward(self, latent: Tensor) -> Tensor:
        """latent: (N, numel of z + numel of an image) -> images (N, ...)."""
        return self._noisy(latent)

    def _noisy(self, latent: Tensor, *labels: Tensor) -> Tensor:
        own = math.prod(self.latent_shape)
        z, noise = latent[:, :own], latent[:, own:]
        images = self.generator(z.reshape(len(z), *self.latent_shape), *labels)
        if noise.shape[1] != images[0].numel():
            raise InputError(
                f"latents have {latent.shape[1]} elements; wanted {own} + {images[0].numel()}, one for each element of z and "
                f"of an image: prior=Product(prior, Normal{tuple(images.shape[1:])})"
            )
        return images + self.scale * noise.view_as(images)


class _Labelled(NoisyOutput):
    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self._noisy(latent, labels)


class _MaybeLabelled(NoisyOutput):
    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._noisy(latent) if labels is None else self._noisy(latent, labels)


def _checked(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, Sequence) and shape and all(isinstance(n, int) and n > 0 for n in shape):
        return tuple(shape)
    raise InputError(f"latent_shape is {shape!r}; wanted positive integers, e.g. (100, 1, 1)")


def _first_input(generator: nn.Module) -> tuple[int, ...]:
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, nn.modules.conv._ConvNd):
            return (module.in_channels, *[1] * len(module.kernel_size))
    raise InputError("the latent's shape cannot be read off the generator; pass latent_shape=, e.g. (100, 1, 1)")
