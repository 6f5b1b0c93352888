"""CycleGAN (Zhu, Park, Isola, Efros: Unpaired Image-to-Image Translation, ICCV 2017); PatchGAN: Isola et al., 2017."""

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + (conv, norm, ReLU, conv, norm)(x), with reflection padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class CycleGANGenerator(nn.Module):
    """Images (N, channels, H, W) -> images of the same shape in [-1, 1]; H and W divisible by 2**downsamplings."""

    def __init__(self, features: int = 64, blocks: int = 9, downsamplings: int = 2, channels: int = 3) -> None:
        super().__init__()
        width = features
        encoder: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7)]
        encoder += [nn.InstanceNorm2d(width), nn.ReLU(inplace=True)]
        for _ in range(downsamplings):
            encoder += [nn.Conv2d(width, width * 2, 3, 2, 1), nn.InstanceNorm2d(width * 2), nn.ReLU(inplace=True)]
            width *= 2
        decoder: list[nn.Module] = []
        self.encoder = nn.Sequential(*encoder)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        for _ in range(downsamplings):
            decoder += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1)]
            decoder += [nn.InstanceNorm2d(width // 2), nn.ReLU(inplace=True)]
            width //= 2
        decoder += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh()]
        self.decoder = nn.Sequential(*decoder)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.blocks(self.encoder(images)))


def patchgan_discriminator(features: int = 64, layers: int = 3, channels: int = 3) -> nn.Sequential:
    """Images (N, channels, H, W) -> a map of logits (N, 1, h, w); with 3 layers each logit sees 70x70 pixels."""
    body: list[nn.Module] = [nn.Conv2d(channels, features, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    width = features
    for i in range(1, layers + 1):
        wider = features * min(8, 2**i)
        body += [nn.Conv2d(width, wider, 4, 2 if i < layers else 1, 1), nn.InstanceNorm2d(wider)]
        body += [nn.LeakyReLU(0.2, inplace=True)]
        width = wider
    return nn.Sequential(*body, nn.Conv2d(width, 1, 4, 1, 1))
