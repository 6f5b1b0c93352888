"""How networks of well-known repositories are called; a saved pair may name these functions, for they run the networks only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def stylegan_generate(generator: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """NVlabs' conditional generators: labels (n,) as one-hot vectors, the same noise for every image, no half precision."""
    return generator(z, _one_hot(generator, labels, z), noise_mode="const", force_fp32=True)


def stylegan_discriminate(discriminator: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """NVlabs' conditional discriminators."""
    return discriminator(x, _one_hot(discriminator, labels, x), force_fp32=True)


def biggan_generate(generator: Any, z: Tensor, labels: Tensor) -> Tensor:
    """BigGAN-PyTorch: the generator is given the embedding of a label."""
    return generator(z, generator.shared(labels))


def _one_hot(network: Any, labels: Tensor, like: Tensor) -> Tensor:
    """Labels (n,) as rows of a unit matrix; F.one_hot reads their values, and a trace has none."""
    return torch.eye(network.c_dim, dtype=like.dtype, device=like.device)[labels] if labels.dim() == 1 else labels.to(like)
