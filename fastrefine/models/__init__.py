"""Small, plain implementations of published GAN architectures, for examples, tests and benchmarks."""

from fastrefine.models.cyclegan import CycleGANGenerator, patchgan_discriminator
from fastrefine.models.dcgan import dcgan_discriminator, dcgan_generator
from fastrefine.models.default import default_discriminator
from fastrefine.models.mlp import mlp_discriminator, mlp_generator
from fastrefine.models.projected import ProjectedDiscriminator
from fastrefine.models.sagan import SAGANDiscriminator, SAGANGenerator
from fastrefine.models.sngan import SNGANDiscriminator, SNGANGenerator
from fastrefine.models.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

__all__ = [
    "CycleGANGenerator", "ProjectedDiscriminator", "SAGANDiscriminator", "SAGANGenerator", "SNGANDiscriminator",
    "SNGANGenerator", "StyleGAN2Discriminator", "StyleGAN2Generator", "dcgan_discriminator", "dcgan_generator",
    "default_discriminator", "mlp_discriminator", "mlp_generator", "patchgan_discriminator",
]  # fmt: skip
