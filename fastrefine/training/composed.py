"""Networks made of others: a generator with noise on its output, a discriminator that adds logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.networks.calls import LogitReader, takes_labels
from fastrefine.networks.copies import unwrap


class NoisyOutput(nn.Module):
    """G*(z, z') = G(z) + scale z' ([DDLS] 3.4, Cor. 1), for latents (N, numel of z + numel of an image).

    Use it with ``Product(prior, Normal(*image_shape))``: both latents come flattened and concatenated. A sampler then
    targets p0(z) N(z'; 0, I) exp(d(G*(z, z'))), whose image is a density over all of data space.

    scale: standard deviation of the noise, in the images' units, more than 0. latent_shape: of one z, without the batch;
    None reads it off the first Linear (features,) or (transposed) convolution (channels, 1, ...) of G.
    Raises InputError when it cannot be read off, and when widths do not fit.

    Example: ``fr.NoisyOutput(g, 0.05)(torch.randn(4, 32 + 64)).shape  # (4, 1, 8, 8)``
    """

    def __init__(self, generator: nn.Module, scale: float, latent_shape: tuple[int, ...] | None = None):
        super().__init__()
        if not isinstance(generator, nn.Module):
            raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module")
        checks.number("scale", scale, 0.0, open_low=True)
        self.generator, self.scale = generator, float(scale)
        self.latent_shape = _first_input(generator) if latent_shape is None else _checked(latent_shape)

        self.takes_labels = takes_labels(generator)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """latent: (N, numel of z + numel of an image) -> images (N, ...)."""
        own = math.prod(self.latent_shape)
        z, noise = latent[:, :own], latent[:, own:]
        images = self.generator(z.reshape(len(z), *self.latent_shape), *(() if labels is None else (labels,)))
        if noise.shape[1] != images[0].numel():
            raise InputError(
                f"latents have {latent.shape[1]} elements; wanted {own} + {images[0].numel()}, one for each element of z and "
                f"of an image: prior=Product(prior, Normal{tuple(images.shape[1:])})"
            )
        return images + self.scale * noise.view_as(images)


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


class SumDiscriminator(nn.Module):
    """D(x[, labels]) = the sum of the members' logits: the telescope log p/q + log q/r = log p/r ([DGflow]).

    discriminators: modules D(x) or D(x, labels) that return logits, (N,), (N, 1) or a map (N, 1, h, w) whose mean counts;
    probabilities do not add. Labels go to the members that take them, and are required where one of them requires them.
    The members are held, not copied.

    Returns (N, 1), in float32 or the wider dtype of the images. Raises InputError without members, on a member that is no
    module or that ends in a sigmoid, and on outputs that are not one logit or one map per sample.

    Example: ``fr.SumDiscriminator(d, d)(out.images).shape  # (64, 1)``
    """

    def __init__(self, *discriminators: nn.Module):
        super().__init__()
        if not discriminators:
            raise InputError("SumDiscriminator got no discriminators; wanted one or more modules that return logits")
        for i, member in enumerate(discriminators):
            if not isinstance(member, nn.Module):
                raise InputError(f"SumDiscriminator: member {i} is a {type(member).__name__}; wanted a torch.nn.Module")
            if isinstance(_last(member), nn.Sigmoid):
                raise InputError(f"SumDiscriminator: member {i} ends in a sigmoid; wanted logits, so leave the sigmoid out")
        self.members = nn.ModuleList(unwrap(member) for member in discriminators)
        asked = [takes_labels(member) for member in self.members]
        self._takes_labels = [takes for takes, _ in asked]
        self.takes_labels = any(self._takes_labels), any(required for _, required in asked)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """images: (N, ...) -> (N, 1)."""
        dtype = torch.promote_types(images.dtype, torch.float32)
        logits = []
        for i, (member, takes) in enumerate(zip(self.members, self._takes_labels, strict=True)):
            own = images.clone()  # layers may work in place
            raw = member(own, labels) if takes and labels is not None else member(own)
            try:
                logits.append(LogitReader()(raw, len(images), dtype).mean(1, keepdim=True))
            except InputError as error:
                raise InputError(f"SumDiscriminator: member {i} must return its logit alone: {error}") from error
        return torch.stack(logits).sum(0)


def _last(module: nn.Module) -> nn.Module:
    """What surely runs last: the end of nested Sequentials."""
    module = unwrap(module)
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module
