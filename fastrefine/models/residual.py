"""Residual blocks shared by SNGAN and SAGAN (Miyato et al., ICLR 2018; Zhang et al., ICML 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose gain and bias are looked up by class label (Dumoulin et al., ICLR 2017)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.gain(labels)[:, :, None, None] + self.bias(labels)[:, :, None, None]


class GeneratorBlock(nn.Module):
    """norm, ReLU, 2x nearest upsampling, conv, norm, ReLU, conv; plus an upsampled 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, num_classes: int = 0, spectral: bool = False) -> None:
        super().__init__()
        self.conditional = num_classes > 0
        self.norm1 = _norm(in_channels, num_classes)
        self.conv1 = conv(in_channels, out_channels, 3, spectral)
        self.norm2 = _norm(out_channels, num_classes)
        self.conv2 = conv(out_channels, out_channels, 3, spectral)
        self.shortcut = conv(in_channels, out_channels, 1, spectral)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = (labels,) if self.conditional else ()
        h = F.interpolate(F.relu(self.norm1(x, *condition)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), *condition)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class DiscriminatorBlock(nn.Module):
    """[ReLU,] conv, ReLU, conv [, 2x average pooling]; plus a 1x1 shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, downsample: bool = True, first: bool = False) -> None:
        super().__init__()
        self.downsample, self.first = downsample, first
        self.conv1 = conv(in_channels, out_channels, 3, True)
        self.conv2 = conv(out_channels, out_channels, 3, True)
        changes = downsample or in_channels != out_channels
        self.shortcut = conv(in_channels, out_channels, 1, True) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        shortcut = self.shortcut(x)
        if self.downsample:
            h, shortcut = F.avg_pool2d(h, 2), F.avg_pool2d(shortcut, 2)
        return h + shortcut


class Projection(nn.Module):
    """Logit of pooled features, psi(h) + <embedding(label), h> (Miyato, Koyama: cGANs with projection, ICLR 2018)."""

    def __init__(self, features: int, num_classes: int = 0) -> None:
        super().__init__()
        self.linear = spectral_norm(nn.Linear(features, 1))
        self.embedding = spectral_norm(nn.Embedding(num_classes, features)) if num_classes else None

    def forward(self, h: Tensor, labels: Tensor | None = None) -> Tensor:
        logit = self.linear(h)[:, 0]
        return logit if self.embedding is None else logit + (self.embedding(labels) * h).sum(1)


def conv(in_channels: int, out_channels: int, kernel: int, spectral: bool) -> nn.Module:
    """A convolution of stride 1 that keeps height and width, with or without spectral normalisation."""
    module = nn.Conv2d(in_channels, out_channels, kernel, 1, kernel // 2)
    nn.init.xavier_uniform_(module.weight)
    return spectral_norm(module) if spectral else module


def _norm(channels: int, num_classes: int) -> nn.Module:
    return ConditionalBatchNorm(channels, num_classes) if num_classes else nn.BatchNorm2d(channels)
