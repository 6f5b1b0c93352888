"""What the image experiments train: published GANs by name, a class-conditional one, InfoGAN's pair, a classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastrefine as fr
from benchmarks.papers.infogan import LATENT_DIM, infogan_discriminator, infogan_generator
from benchmarks.papers.pictures import PictureFolder
from benchmarks.papers.run import Recipe
from fastrefine import models
from fastrefine.demo import gan
from fastrefine.demo.gan import Pair, Trainer, Training, build
from fastrefine.models.digits import Classifier

INFO_TRAINING = Training(64, "adam", (1e-3, 2e-4), betas=(0.5, 0.999), bfloat16=True)  # but for bfloat16 as published


def prior_of(recipe: Recipe) -> fr.Normal | fr.Uniform:
    """Of the latents: uniform on (-1, 1) for "dcgan", else normal."""
    return fr.Uniform(recipe.latent) if recipe.network == "dcgan" else fr.Normal(recipe.latent)


def latents_of(recipe: Recipe) -> gan.Draw:
    """What a training draws: the prior's latents."""
    return gan.uniform(recipe.latent) if recipe.network == "dcgan" else gan.normal(recipe.latent)


def networks_of(recipe: Recipe, seed: int, classes: int = 0) -> Pair:
    """(G, D) of a recipe, untrained, on the GPU if there is one; only "sagan" is class-conditional."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, latent, (g, d) = recipe.size, recipe.latent, recipe.features
    attention = {"num_classes": classes, "attention_size": recipe.own.get("attention_size", 32)}
    makers: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
        "dcgan": (lambda: models.dcgan_generator(size, latent, g), lambda: models.dcgan_discriminator(size, d)),
        "sngan": (lambda: models.SNGANGenerator(size, latent, g), lambda: models.SNGANDiscriminator(d)),
        "sagan": (
            lambda: models.SAGANGenerator(size, latent, g, **attention), lambda: models.SAGANDiscriminator(size, d, **attention)
        ),
    }  # fmt: skip
    generator, discriminator = makers[recipe.network]
    return build(generator, seed).to(device), build(discriminator, seed + 100).to(device)


class PictureClassifier(Classifier):
    """CNN, (N, channels, size, size) with size divisible by 8: convolutions of width, 2 width, 4 width, then ``features``.

    It trains in bfloat16 (about half the time on a CPU that has it, but twelve times on one that has not) unless told not
    to, and judges in float32.
    """

    def __init__(
        self, size: int = 32, width: int = 32, features: int = 128, num_classes: int = 10, channels: int = 3,
        bfloat16: bool = True,
    ) -> None:  # fmt: skip
        layers: list[nn.Module] = []
        for wide in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
            channels = wide
        flat = channels * (size // 8) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), features, num_classes)
        self.in_bfloat16 = bfloat16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.training and self.in_bfloat16):
            return super().forward(images).float()


class HingeTrainer(Trainer):
    """A pair on the hinge loss (Miyato et al. 2018)."""

    def _update(self) -> None:
        n = self.training.batch_size
        real = self.real(n, self.random)
        self._descend([real], [self.latents(n, self.random) for _ in range(2)], [])

    def catch_up(self, steps: int) -> nn.Module:
        """D, trained alone for so many more updates against G as it is."""
        self.discriminator.train()
        for _ in range(steps):
            n = self.training.batch_size
            self._discriminate([self.real(n, self.random)], self.latents(n, self.random), [])
        return self.discriminator.eval()

    def _discriminate(self, real: list[Tensor], latents: Tensor, labels: list[Tensor]) -> None:
        with torch.no_grad():
            fake = self.generator(latents, *labels)
        loss = F.relu(1 - self.discriminator(*real, *labels)).mean() + F.relu(1 + self.discriminator(fake, *labels)).mean()
        gan.descend(self.optimizers[1], loss)

    def _descend(self, real: list[Tensor], latents: list[Tensor], labels: list[Tensor]) -> None:
        """One update of D with the first latents, then one of G with the others."""
        device = next(self.generator.parameters()).device
        real, latents, labels = ([t.to(device) for t in given] for given in (real, latents, labels))
        self._discriminate(real, latents[0], labels)
        self.discriminator.requires_grad_(False)
        gan.descend(self.optimizers[0], -self.discriminator(self.generator(latents[1], *labels), *labels).mean())
        self.discriminator.requires_grad_(True)


class LabelledTrainer(HingeTrainer):
    """A class-conditional pair; fakes have the classes of the real batch.

    pictures: the first ``count`` of them are drawn from.
    """

    def __init__(
        self, pair: Pair, pictures: PictureFolder, count: int, latents: gan.Draw, training: Training, seed: int
    ):  # fmt: skip
        super().__init__(*pair, drawn(pictures, count), latents, training, seed)
        self.pictures, self.count = pictures, count

    def _update(self) -> None:
        n = self.training.batch_size
        rows = torch.randint(self.count, (n,), generator=self.random)
        latents = [self.latents(n, self.random) for _ in range(2)]
        self._descend([self.pictures.images(rows)], latents, [self.pictures.labels[rows]])


def drawn(pictures: PictureFolder, count: int) -> gan.Draw:
    """The first ``count`` pictures, drawn with replacement and decoded when they are."""
    return lambda n, random: pictures.images(torch.randint(count, (n,), generator=random))


def info_trainer(real: Tensor, seed: int, training: Training, width: int = 64, hidden: int = 1024) -> Trainer:
    """InfoGAN's pair ([CS] 4.2) at step 0; latents are uniform on (-1, 1). real: images (N, 1, 28, 28) in [-1, 1]."""
    g = build(lambda: infogan_generator(width, hidden), seed)
    d = build(lambda: infogan_discriminator(width, hidden), seed + 100)
    return Trainer(g, d, gan.images_of(real), gan.uniform(LATENT_DIM), training, seed)
