"""Small networks of the demo: generator, discriminator and classifier for 8x8 digits and for MNIST.

Plain modules without any knowledge of refinement. The names of their layers are part of the weights' files and usable
as ``fr.Refiner(at=...)``: they stay. Generators map (N, LATENT_DIM) to images (N, 1, H, W) in [-1, 1], discriminators
map images to logits (N, 1), classifiers to logits (N, 10).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

DIGITS_LATENT_DIM = 32
MNIST_LATENT_DIM = 64


def digits_generator() -> nn.Sequential:
    """MLP, 32 -> 256 -> 256 -> 8x8; about 91,000 parameters."""
    return _named(
        hidden1=nn.Linear(DIGITS_LATENT_DIM, 256),
        act1=nn.LeakyReLU(0.2),
        hidden2=nn.Linear(256, 256),
        act2=nn.LeakyReLU(0.2),
        pixels=nn.Linear(256, 64),
        tanh=nn.Tanh(),
        image=nn.Unflatten(1, (1, 8, 8)),
    )


def digits_discriminator() -> nn.Sequential:
    """MLP, 8x8 -> 256 -> 256 -> logit; about 83,000 parameters."""
    return _named(
        flat=nn.Flatten(),
        hidden1=nn.Linear(64, 256),
        act1=nn.LeakyReLU(0.2),
        hidden2=nn.Linear(256, 256),
        act2=nn.LeakyReLU(0.2),
        logit=nn.Linear(256, 1),
    )


def mnist_generator() -> nn.Sequential:
    """Transposed convolutions, 64 -> 64x7x7 -> 32x14x14 -> 28x28; about 243,000 parameters."""
    return _named(
        project=nn.Linear(MNIST_LATENT_DIM, 64 * 7 * 7, bias=False),
        map7=nn.Unflatten(1, (64, 7, 7)),
        norm7=nn.BatchNorm2d(64),
        act7=nn.LeakyReLU(0.2),
        up14=nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
        norm14=nn.BatchNorm2d(32),
        act14=nn.LeakyReLU(0.2),
        up28=nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        tanh=nn.Tanh(),
    )


def mnist_discriminator() -> nn.Sequential:
    """Strided convolutions, 28x28 -> 32x14x14 -> 64x7x7 -> 64 -> logit; about 234,000 parameters, no normalisation."""
    return _named(
        conv14=nn.Conv2d(1, 32, 4, stride=2, padding=1),
        act14=nn.LeakyReLU(0.2),
        conv7=nn.Conv2d(32, 64, 4, stride=2, padding=1),
        act7=nn.LeakyReLU(0.2),
        flat=nn.Flatten(),
        hidden=nn.Linear(64 * 7 * 7, 64),
        act=nn.LeakyReLU(0.2),
        logit=nn.Linear(64, 1),
    )


class Classifier(nn.Module):
    """A classifier whose penultimate features are read by the Frechet distance: ``features`` (N, F), then ``head``."""

    def __init__(self, features: nn.Sequential, num_features: int, num_classes: int = 10) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W) -> logits (N, num_classes)
        return self.head(self.features(images))


def digits_classifier() -> Classifier:
    """MLP, 8x8 -> 128 -> 32 features -> 10."""
    features = _named(flat=nn.Flatten(), hidden1=nn.Linear(64, 128), act1=nn.ReLU(), hidden2=nn.Linear(128, 32), act2=nn.ReLU())
    return Classifier(features, 32)


def mnist_classifier() -> Classifier:
    """CNN, 28x28 -> 16x14x14 -> 32x7x7 -> 64 features -> 10; about 105,000 parameters."""
    features = _named(
        conv14=nn.Conv2d(1, 16, 5, stride=2, padding=2),
        act14=nn.ReLU(),
        conv7=nn.Conv2d(16, 32, 5, stride=2, padding=2),
        act7=nn.ReLU(),
        flat=nn.Flatten(),
        hidden=nn.Linear(32 * 7 * 7, 64),
        act=nn.ReLU(),
    )
    return Classifier(features, 64)


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Penultimate features (N, F) and class probabilities (N, 10) of images, in eval mode; the mode is put back."""
    was_training = classifier.training
    classifier.eval()
    try:
        features = torch.cat([classifier.features(part) for part in images.split(batch_size)])
        return features, classifier.head(features).softmax(1)
    finally:
        classifier.train(was_training)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
