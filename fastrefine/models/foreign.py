"""How networks of well-known repositories are called; a saved pair may name these functions, for they run the networks only."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
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
    return (F.one_hot(labels, network.c_dim) if labels.dim() == 1 else labels).to(like)
