"""SAGAN (Zhang, Goodfellow, Metaxas, Odena: Self-Attention Generative Adversarial Networks, ICML 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastrefine.models.residual import DiscriminatorBlock, GeneratorBlock, Projection, conv


class SelfAttention(nn.Module):
    """x + gamma * attention(x); keys and values at half resolution. ``gamma`` starts at 0, as in the paper."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key_channels, self.value_channels = max(channels // 8, 1), max(channels // 2, 1)
        self.query = conv_1x1(channels, self.key_channels)
        self.key = conv_1x1(channels, self.key_channels)
        self.value = conv_1x1(channels, self.value_channels)
        self.output = conv_1x1(self.value_channels, channels)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)  # (N, K, HW)
        key = F.max_pool2d(self.key(x), 2).flatten(2)  # (N, K, HW/4)
        value = F.max_pool2d(self.value(x), 2).flatten(2)  # (N, V, HW/4)
        weights = torch.softmax(query.transpose(1, 2) @ key, -1)  # (N, HW, HW/4)
        attended = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.output(attended)


class SAGANGenerator(nn.Module):
    """Latents (N, latent) [and labels (N,)] -> images (N, channels, size, size) in [-1, 1].

    Self-attention follows the block whose output is ``attention_size`` wide.
    """

    def __init__(
        self, size: int = 128, latent: int = 128, features: int = 64, num_classes: int = 1000, channels: int = 3,
        attention_size: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        doublings = size.bit_length() - 3
        widths = [features * min(16, 2 ** (doublings - i)) for i in range(doublings + 1)]
        self.bottom_features = widths[0]
        self.linear = spectral_norm(nn.Linear(latent, 16 * widths[0]))
        self.blocks = nn.ModuleList(
            GeneratorBlock(widths[i], widths[i + 1], num_classes=num_classes, spectral=True) for i in range(doublings)
        )
        if not 8 <= attention_size <= size or attention_size & (attention_size - 1):
            raise ValueError(f"attention_size must be a power of two between 8 and size={size}, got {attention_size}")
        self.attention_after = attention_size.bit_length() - 4  # block 0 gives 8x8
        self.attention = SelfAttention(widths[self.attention_after + 1])
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = conv(widths[-1], channels, 3, True)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.linear(latent).view(-1, self.bottom_features, 4, 4)
        for index, block in enumerate(self.blocks):
            h = block(h, labels)
            if index == self.attention_after:
                h = self.attention(h)
        return torch.tanh(self.to_image(F.relu(self.norm(h))))


class SAGANDiscriminator(nn.Module):
    """Images (N, channels, size, size) [and labels (N,)] -> logits (N,); attention at ``attention_size``."""

    def __init__(
        self, size: int = 128, features: int = 64, num_classes: int = 1000, channels: int = 3, attention_size: int = 32
    ) -> None:
        super().__init__()
        halvings = size.bit_length() - 3
        blocks: list[nn.Module] = []
        width = channels
        for i in range(halvings):
            wider = features * min(16, 2**i)
            blocks.append(DiscriminatorBlock(width, wider, first=i == 0))
            width = wider
            if size >> (i + 1) == attention_size:
                blocks.append(SelfAttention(width))
        blocks.append(DiscriminatorBlock(width, width, downsample=False))
        self.blocks = nn.Sequential(*blocks)
        self.head = Projection(width, num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(F.relu(self.blocks(images)).sum((2, 3)), labels)


def conv_1x1(in_channels: int, out_channels: int) -> nn.Module:
    """Spectrally normalised 1x1 convolution without bias."""
    return spectral_norm(nn.Conv2d(in_channels, out_channels, 1, bias=False))
