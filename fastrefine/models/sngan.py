"""SNGAN with residual networks (Miyato et al.: Spectral Normalization for GANs, ICLR 2018, table 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine.models.residual import DiscriminatorBlock, GeneratorBlock, Projection


class SNGANGenerator(nn.Module):
    """Latents (N, latent) [and labels (N,)] -> images (N, channels, size, size) in [-1, 1].

    With ``num_classes > 0`` every block uses class-conditional batch normalisation.
    """

    def __init__(self, size: int = 32, latent: int = 128, features: int = 256, num_classes: int = 0, channels: int = 3) -> None:
        super().__init__()
        self.features = features
        self.linear = nn.Linear(latent, 16 * features)
        doublings = size.bit_length() - 3
        self.blocks = nn.ModuleList(GeneratorBlock(features, features, num_classes=num_classes) for _ in range(doublings))
        self.norm = nn.BatchNorm2d(features)
        self.to_image = nn.Conv2d(features, channels, 3, 1, 1)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.linear(latent).view(-1, self.features, 4, 4)
        for block in self.blocks:
            h = block(h, labels)
        return torch.tanh(self.to_image(F.relu(self.norm(h))))


class SNGANDiscriminator(nn.Module):
    """Images (N, channels, H, W) [and labels (N,)] -> logits (N,); spectral norm everywhere, projection if labelled."""

    def __init__(self, features: int = 128, num_classes: int = 0, channels: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            DiscriminatorBlock(channels, features, first=True),
            DiscriminatorBlock(features, features),
            DiscriminatorBlock(features, features, downsample=False),
            DiscriminatorBlock(features, features, downsample=False),
        )
        self.head = Projection(features, num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(F.relu(self.blocks(images)).sum((2, 3)), labels)
