"""A StyleGAN2-like pair (Karras et al.: Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020).

Left out: the blur filters of up- and downsampling (bilinear instead), equalised learning rates and noise drawn anew
for each image (the noise is a fixed buffer, so that the generator is a function of the latent alone).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GAIN = math.sqrt(2)


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled per sample by a style and, if asked, demodulated (section 2.2)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, style: int, *, up: bool = False, demodulate: bool = True
    ) -> None:
        super().__init__()
        self.up, self.demodulate, self.kernel, self.out_channels = up, demodulate, kernel, out_channels
        scale = 1 / math.sqrt(in_channels * kernel * kernel)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) * scale)
        self.affine = nn.Linear(style, in_channels)
        nn.init.ones_(self.affine.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.weight[None] * self.affine(style)[:, None, :, None, None]  # (N, out, in, k, k)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        batch, channels, height, width = x.shape
        weight = weight.reshape(batch * self.out_channels, channels, self.kernel, self.kernel)
        # one group per sample: the batch becomes channels of a single image
        x = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=self.kernel // 2, groups=batch)
        return x.view(batch, self.out_channels, height, width)


class StyledLayer(nn.Module):
    """Modulated 3x3 convolution, fixed noise, bias, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, style: int, size: int, *, up: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, style, up=up)
        self.noise_strength = nn.Parameter(torch.full((), 0.1))
        self.bias = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.noise: Tensor
        self.register_buffer("noise", torch.randn(1, 1, size, size))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        h = self.conv(x, style) + self.noise_strength * self.noise + self.bias
        return F.leaky_relu(h, 0.2) * _GAIN


class StyleGAN2Generator(nn.Module):
    """Latents (N, latent) -> images (N, channels, size, size), not bounded.

    ``features`` is the width at full size; it doubles with each halving of the size, up to ``max_features``.
    """

    def __init__(
        self, size: int = 64, latent: int = 512, style: int = 512, features: int = 64, max_features: int = 512,
        mapping_layers: int = 8, channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        mapping: list[nn.Module] = []
        for i in range(mapping_layers):
            mapping += [nn.Linear(latent if i == 0 else style, style), nn.LeakyReLU(0.2)]
        self.mapping = nn.Sequential(*mapping)
        widths = _widths(size, features, max_features)
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.layers, self.to_rgb = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for i, wider in enumerate(widths):
            self.layers.append(StyledLayer(width, wider, style, 4 << i, up=i > 0))
            self.layers.append(StyledLayer(wider, wider, style, 4 << i, up=False))
            self.to_rgb.append(ModulatedConv(wider, channels, 1, style, demodulate=False))
            width = wider

    def forward(self, latent: Tensor) -> Tensor:
        style = self.mapping(latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + 1e-8))
        h = self.constant.expand(latent.shape[0], -1, -1, -1)
        image = None
        for i, to_rgb in enumerate(self.to_rgb):
            h = self.layers[2 * i](h, style)
            h = self.layers[2 * i + 1](h, style)
            rgb = to_rgb(h, style)
            image = rgb if image is None else F.interpolate(image, scale_factor=2, mode="bilinear") + rgb
        assert image is not None
        return image


class MinibatchStdDev(nn.Module):
    """Appends the mean deviation over groups of samples as one more channel: couples the samples of a batch.

    Groups are ``group_size`` samples apart as in the official code; a batch that does not divide is one group.
    """

    def __init__(self, group_size: int = 4) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        group = self.group_size if batch % self.group_size == 0 else batch
        grouped = x.reshape(group, batch // group, channels, height, width)
        deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (batch / group,)
        deviation = deviation.repeat(group)[:, None, None, None].expand(batch, 1, height, width)
        return torch.cat([x, deviation], 1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and 2x average pooling, plus a 1x1 shortcut, over sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 1, 1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(F.avg_pool2d(h, 2)), 0.2)
        return (h + self.shortcut(F.avg_pool2d(x, 2))) / _GAIN


class StyleGAN2Discriminator(nn.Module):
    """Images (N, channels, size, size) -> logits (N,). ``group_size=0`` leaves minibatch deviation out."""

    def __init__(
        self, size: int = 64, features: int = 64, max_features: int = 512, group_size: int = 4, channels: int = 3
    ) -> None:
        super().__init__()
        widths = _widths(size, features, max_features)[::-1]
        self.from_rgb = nn.Conv2d(channels, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.minibatch_std = MinibatchStdDev(group_size) if group_size else nn.Identity()
        self.conv = nn.Conv2d(widths[-1] + (group_size > 0), widths[-1], 3, 1, 1)
        self.linear = nn.Linear(16 * widths[-1], widths[-1])
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.blocks(F.leaky_relu(self.from_rgb(images), 0.2))
        h = F.leaky_relu(self.conv(self.minibatch_std(h)), 0.2)
        return self.output(F.leaky_relu(self.linear(h.flatten(1)), 0.2))[:, 0]


def _widths(size: int, features: int, max_features: int) -> list[int]:
    """Channels at 4x4, 8x8, ..., size x size."""
    return [min(max_features, features * size // (4 << i)) for i in range(size.bit_length() - 2)]
