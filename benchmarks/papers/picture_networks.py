"""What the picture experiments train: a small classifier, and class-conditional GANs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrefine.datasets import PictureFolder
from fastrefine.demo import gan
from fastrefine.models.digits import Classifier


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


class LabelledTrainer(gan.Trainer):
    """A class-conditional pair on the hinge loss; fakes have the classes of the real batch.

    pictures: the first ``count`` of them are drawn from.
    """

    def __init__(
        self, pair: gan.Pair, pictures: PictureFolder, count: int, latents: gan.Draw, training: gan.Training, seed: int
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
