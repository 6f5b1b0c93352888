"""What the image experiments train: published GANs by name, a class-conditional one, InfoGAN's networks, a classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastrefine as fr
from benchmarks.papers.run import Recipe
from fastrefine import models
from fastrefine.datasets import PictureFolder
from fastrefine.demo import gan
from fastrefine.demo.gan import Pair, Trainer, Training, build
from fastrefine.models.digits import Classifier

INFO_LATENT = 62
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

    It trains in bfloat16 (about half the time on a CPU that has it) and judges in float32.
    """

    def __init__(self, size: int = 32, width: int = 32, features: int = 128, num_classes: int = 10, channels: int = 3) -> None:
        layers: list[nn.Module] = []
        for wide in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
            channels = wide
        flat = channels * (size // 8) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.training):
            return super().forward(images).float()


class LabelledTrainer(Trainer):
    """A class-conditional pair on the hinge loss; fakes have the classes of the real batch.

    pictures: the first ``count`` of them are drawn from.
    """

    def __init__(
        self, pair: Pair, pictures: PictureFolder, count: int, latents: gan.Draw, training: Training, seed: int
    ):  # fmt: skip
        super().__init__(*pair, drawn(pictures, count), latents, training, seed)
        self.pictures, self.count = pictures, count

    def _update(self) -> None:
        n, device = self.training.batch_size, next(self.generator.parameters()).device
        rows = torch.randint(self.count, (n,), generator=self.random)
        real, labels = self.pictures.images(rows).to(device), self.pictures.labels[rows].to(device)
        z = [self.latents(n, self.random).to(device) for _ in range(2)]
        with torch.no_grad():
            fake = self.generator(z[0], labels)
        loss = F.relu(1 - self.discriminator(real, labels)).mean() + F.relu(1 + self.discriminator(fake, labels)).mean()
        gan.descend(self.optimizers[1], loss)
        self.discriminator.requires_grad_(False)
        gan.descend(self.optimizers[0], -self.discriminator(self.generator(z[1], labels), labels).mean())
        self.discriminator.requires_grad_(True)


def drawn(pictures: PictureFolder, count: int) -> gan.Draw:
    """The first ``count`` pictures, drawn with replacement and decoded when they are."""
    return lambda n, random: pictures.images(torch.randint(count, (n,), generator=random))


# --- the MNIST networks of [CS] 4.2, which are InfoGAN's [Chen et al. 2016]


def info_generator(width: int = 64, hidden: int = 1024) -> nn.Sequential:
    """(N, 62) -> 1024 -> 128x7x7 -> 64x14x14 -> images (N, 1, 28, 28) in [-1, 1]; 6.6 million parameters."""
    return _started(
        fc1=nn.Linear(INFO_LATENT, hidden),
        norm1=nn.BatchNorm1d(hidden),
        act1=nn.ReLU(),
        fc2=nn.Linear(hidden, 2 * width * 49),
        norm2=nn.BatchNorm1d(2 * width * 49),
        act2=nn.ReLU(),
        map7=nn.Unflatten(1, (2 * width, 7, 7)),
        up14=nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        norm14=nn.BatchNorm2d(width),
        act14=nn.ReLU(),
        up28=nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        tanh=nn.Tanh(),
    )


def info_discriminator(width: int = 64, hidden: int = 1024) -> nn.Sequential:
    """Images (N, 1, 28, 28) -> 64x14x14 -> 128x7x7 -> 1024 -> logits (N, 1); 6.6 million parameters.

    Without BatchNorm, as in the public code, which has the paper's two commented out: D is trained on real and generated
    batches apart, each with its own statistics, so that the running ones of neither rank samples as training did.
    """
    return _started(
        conv14=nn.Conv2d(1, width, 4, stride=2, padding=1),
        act14=nn.LeakyReLU(0.2),
        conv7=nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        act7=nn.LeakyReLU(0.2),
        flat=nn.Flatten(),
        fc=nn.Linear(2 * width * 49, hidden),
        act=nn.LeakyReLU(0.2),
        logit=nn.Linear(hidden, 1),
    )


def info_trainer(real: Tensor, seed: int, training: Training, width: int = 64, hidden: int = 1024) -> Trainer:
    """The pair at step 0; latents are uniform on (-1, 1). real: images (N, 1, 28, 28) in [-1, 1]."""
    g = build(lambda: info_generator(width, hidden), seed)
    d = build(lambda: info_discriminator(width, hidden), seed + 100)
    return Trainer(g, d, gan.images_of(real), gan.uniform(INFO_LATENT), training, seed)


def _started(**modules: nn.Module) -> nn.Sequential:
    """The modules in a row; weights start from N(0, .02^2), biases from 0, as in the public code."""
    network = nn.Sequential(OrderedDict(modules))
    for layer in network:
        if isinstance(layer, gan.WEIGHTED):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network
