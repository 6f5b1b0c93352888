"""A discriminator for generators that come without one: a sensible default by the shape of the data."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


def default_discriminator(shape: tuple[int, ...], width: int = 64) -> nn.Module:
    """Logit (N,) of data (N, *shape), every layer under spectral norm (Miyato et al., ICLR 2018).

    Images (C, H, W): stride-2 convolutions down to about 4 x 4, channels doubling from ``width`` to 8 times that.
    Anything else: three hidden layers of 4 ``width`` units.
    """
    if len(shape) != 3 or min(shape[1:]) < 8:
        features, hidden = math.prod(shape), 4 * width
        sizes = [features, hidden, hidden, hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [spectral_norm(nn.Linear(a, b)), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, spectral_norm(nn.Linear(hidden, 1)), nn.Flatten(0))
    channels, height, side = shape[0], shape[1], shape[2]
    layers, out = [], width
    while min(height, side) >= 8:
        layers += [spectral_norm(nn.Conv2d(channels, out, 4, 2, 1)), nn.LeakyReLU(0.2)]
        channels, out, height, side = out, min(2 * out, 8 * width), height // 2, side // 2
    return nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(channels * height * side, 1)), nn.Flatten(0))
