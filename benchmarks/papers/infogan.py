"""InfoGAN's networks for MNIST [Chen et al. 2016], which [CS] 4.2 refines."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

LATENT_DIM = 62


def infogan_generator(width: int = 64, hidden: int = 1024) -> nn.Sequential:
    """(N, 62) -> 1024 -> 128x7x7 -> 64x14x14 -> images (N, 1, 28, 28) in [-1, 1]; 6.6 million parameters."""
    return _started(
        fc1=nn.Linear(LATENT_DIM, hidden), norm1=nn.BatchNorm1d(hidden), act1=nn.ReLU(), fc2=nn.Linear(hidden, 2 * width * 49),
        norm2=nn.BatchNorm1d(2 * width * 49), act2=nn.ReLU(), map7=nn.Unflatten(1, (2 * width, 7, 7)),
        up14=nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), norm14=nn.BatchNorm2d(width), act14=nn.ReLU(),
        up28=nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1), tanh=nn.Tanh(),
    )  # fmt: skip


def infogan_discriminator(width: int = 64, hidden: int = 1024) -> nn.Sequential:
    """Images (N, 1, 28, 28) -> 64x14x14 -> 128x7x7 -> 1024 -> logits (N, 1); 6.6 million parameters.

    Without BatchNorm, as in the public code, which has the paper's two commented out: D is trained on real and generated
    batches apart, each with its own statistics, so that the running ones of neither rank samples as training did.
    """
    return _started(
        conv14=nn.Conv2d(1, width, 4, stride=2, padding=1), act14=nn.LeakyReLU(0.2),
        conv7=nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), act7=nn.LeakyReLU(0.2), flat=nn.Flatten(),
        fc=nn.Linear(2 * width * 49, hidden), act=nn.LeakyReLU(0.2), logit=nn.Linear(hidden, 1),
    )  # fmt: skip


def _started(**modules: nn.Module) -> nn.Sequential:
    """The modules in a row; weights start from N(0, .02^2), biases from 0, as in the public code."""
    network = nn.Sequential(OrderedDict(modules))
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network
