"""The model zoo: shapes, ranges and the published sizes."""

import pytest
import torch

from fastrefine.models import (
    CycleGANGenerator,
    SAGANDiscriminator,
    SAGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    dcgan_discriminator,
    dcgan_generator,
    mlp_discriminator,
    mlp_generator,
    patchgan_discriminator,
)
from fastrefine.models.sagan import SelfAttention

torch.set_num_threads(1)
LABELS = torch.tensor([0, 2, 1])


def parameters(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("size", [32, 64])
def test_dcgan_maps_latents_to_images_and_images_to_logits(size):
    images = dcgan_generator(size, latent=10, features=4)(torch.randn(3, 10))
    assert images.shape == (3, 3, size, size) and images.abs().max() <= 1
    assert dcgan_discriminator(size, features=4)(images).shape == (3,)


def test_dcgan_takes_flat_and_square_latents_alike():
    generator, latents = dcgan_generator(32, latent=10, features=4).eval(), torch.randn(3, 10)
    assert torch.equal(generator(latents), generator(latents[:, :, None, None]))


def test_dcgan_64_has_the_size_of_the_common_implementation():
    assert parameters(dcgan_generator(64)) == 3_576_704 and parameters(dcgan_discriminator(64)) == 2_765_568


def test_dcgan_refuses_a_size_that_is_no_power_of_two():
    with pytest.raises(ValueError, match="48"):
        dcgan_generator(48)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_sngan_is_conditional_only_with_classes(num_classes):
    labels = (LABELS,) if num_classes else ()
    images = SNGANGenerator(32, latent=8, features=4, num_classes=num_classes)(torch.randn(3, 8), *labels)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1
    assert SNGANDiscriminator(features=4, num_classes=num_classes)(images, *labels).shape == (3,)


def test_sngan_32_has_the_published_size():
    assert 4.0e6 < parameters(SNGANGenerator()) < 4.4e6 and 0.95e6 < parameters(SNGANDiscriminator()) < 1.1e6


def test_projection_discriminator_depends_on_the_label():
    discriminator, images = SNGANDiscriminator(features=4, num_classes=3).eval(), torch.randn(3, 3, 32, 32)
    assert not torch.allclose(discriminator(images, LABELS), discriminator(images, LABELS.roll(1)))


@pytest.mark.parametrize("size", [32, 128])
def test_sagan_maps_labelled_latents_to_images_and_logits(size):
    images = SAGANGenerator(size, latent=8, features=2, num_classes=3, attention_size=16)(torch.randn(3, 8), LABELS)
    assert images.shape == (3, 3, size, size)
    assert SAGANDiscriminator(size, features=2, num_classes=3, attention_size=16)(images, LABELS).shape == (3,)


def test_sagan_attention_starts_as_the_identity():
    attention, features = SelfAttention(8), torch.randn(2, 8, 8, 8)
    assert torch.equal(attention(features), features)


def test_stylegan2_is_a_function_of_the_latent_alone():
    generator, latents = StyleGAN2Generator(16, 8, 8, 4, 8, 2), torch.randn(3, 8)
    images = generator(latents)
    assert images.shape == (3, 3, 16, 16) and torch.equal(images, generator(latents))
    torch.testing.assert_close(generator(latents[1:2]), images[1:2])


def test_stylegan2_minibatch_deviation_couples_samples_and_can_be_left_out():
    images = torch.randn(4, 3, 16, 16)
    coupled, independent = (StyleGAN2Discriminator(16, 4, 8, group_size=size) for size in (4, 0))
    moved = images.clone()
    moved[1:] *= 2
    assert coupled(images).shape == (4,) and not torch.allclose(coupled(images)[0], coupled(moved)[0], atol=1e-6)
    torch.testing.assert_close(independent(images)[0], independent(moved)[0])


def test_cyclegan_keeps_the_shape_and_patchgan_gives_a_map():
    images = CycleGANGenerator(features=2, blocks=1)(torch.randn(2, 3, 64, 64))
    assert images.shape == (2, 3, 64, 64)
    assert patchgan_discriminator(features=2)(images).shape == (2, 1, 6, 6)


def test_a_patchgan_logit_sees_70_pixels():
    discriminator = patchgan_discriminator(features=2).double()
    for module in discriminator:
        if isinstance(module, torch.nn.InstanceNorm2d):
            module.forward = lambda x: x
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    discriminator(images)[0, 0, 6, 6].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_pair_works_in_two_dimensions(batch_norm):
    points = mlp_generator(hidden=(8, 8), batch_norm=batch_norm)(torch.randn(5, 2))
    assert points.shape == (5, 2) and mlp_discriminator(hidden=(8,))(points).shape == (5,)
