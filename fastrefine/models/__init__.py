"""Small, plain implementations of published GAN architectures, for examples, tests and benchmarks."""

from .cyclegan import CycleGANGenerator, patchgan_discriminator
from .dcgan import dcgan_discriminator, dcgan_generator
from .default import default_discriminator
from .mlp import mlp_discriminator, mlp_generator
from .sagan import SAGANDiscriminator, SAGANGenerator
from .sngan import SNGANDiscriminator, SNGANGenerator
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

__all__ = [
    "CycleGANGenerator",
    "SAGANDiscriminator",
    "SAGANGenerator",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "dcgan_discriminator",
    "dcgan_generator",
    "default_discriminator",
    "mlp_discriminator",
    "mlp_generator",
    "patchgan_discriminator",
]
