"""DCGAN (Radford, Metz, Chintala: Unsupervised Representation Learning with DCGANs, ICLR 2016)."""

from torch import Tensor, nn


class LatentSequential(nn.Sequential):
    """A Sequential of transposed convolutions that takes latents (N, L) as well as (N, L, 1, 1)."""

    def forward(self, latent: Tensor) -> Tensor:
        return super().forward(latent.flatten(1)[:, :, None, None])


def dcgan_generator(size: int = 32, latent: int = 100, features: int = 64, channels: int = 3) -> nn.Sequential:
    """Latents (N, latent) or (N, latent, 1, 1) -> images (N, channels, size, size) in [-1, 1].

    Layers are numbered as in the common implementations: "0" is the first transposed convolution, "2" its ReLU.
    """
    doublings = _doublings(size)
    width = features * 2**doublings
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent, width, 4, 1, 0, bias=False)]
    for _ in range(doublings):
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False)]
        width //= 2
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
    return LatentSequential(*layers).apply(_initialise)  # type: ignore[return-value]


def dcgan_discriminator(size: int = 32, features: int = 64, channels: int = 3) -> nn.Sequential:
    """Images (N, channels, size, size) -> logits (N,)."""
    width = features
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for _ in range(_doublings(size)):
        layers += [nn.Conv2d(width, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2)]
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        width *= 2
    layers += [nn.Conv2d(width, 1, 4, 1, 0, bias=False), nn.Flatten(0)]
    return nn.Sequential(*layers).apply(_initialise)  # type: ignore[return-value]


def _doublings(size: int) -> int:
    """Number of 2x steps between 4x4 and size/2."""
    doublings = size.bit_length() - 4
    if doublings < 0 or size != 8 << doublings:
        raise ValueError(f"size must be a power of two of at least 8, got {size}")
    return doublings


def _initialise(module: nn.Module) -> None:
    """The paper's weights: normal with deviation 0.02 (around 1 for batch normalisation)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
