"""Training of the demo's GANs and classifiers: short, plain, and the same bits for the same seed.

All randomness comes from a torch.Generator of the call's own; torch's global state is neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrefine.errors import InputError
from fastrefine.experiments import gan
from fastrefine.experiments.gan import Trainer, Training

M = TypeVar("M", bound=nn.Module)


def build(factory: Callable[[], M], seed: int) -> M:
    """``factory()`` with its parameters initialised from `seed`; the global random state comes back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def train_gan(
    generator: nn.Module,
    discriminator: nn.Module,
    images: Tensor,
    *,
    latent_dim: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: tuple[float, float] = (3e-4, 3e-4),
    r1: float = 0.2,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
) -> None:
    """Trains both networks in place with the non-saturating loss [Goodfellow et al. 2014] and leaves them in eval mode.

    images: (N, C, H, W); latents are N(0, I) of shape (batch_size, latent_dim). One step updates the discriminator,
    then the generator, with Adam (betas .5, .9) at learning_rate = (generator, discriminator). `r1` weighs the squared
    gradient norm at real images, mean over the batch [R1, Mescheder et al. 2018]; 0 leaves it out. Rates are constant:
    a run of n steps is the beginning of every longer run of one seed. `callback` gets the number of finished steps.
    """
    _check(images, steps, batch_size)
    training = Training(batch_size, "adam", learning_rate, r1=r1)
    trainer = Trainer(generator, discriminator, gan.images(images), gan.normal(latent_dim), training, seed)
    for step in trainer.advance(steps):
        if callback is not None:
            callback(step)


def train_classifier(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    noise: float = 0.15,
    seed: int = 0,
) -> None:
    """Trains `classifier` (images -> logits over classes) in place with cross entropy and leaves it in eval mode.

    images: (N, C, H, W), labels: (N,) int64. Adam, the rate falling to 0 along a cosine; Gaussian noise of standard
    deviation `noise` is added to the images, so that features do not depend on single pixels.
    """
    _check(images, steps, batch_size)
    if labels.shape != images.shape[:1]:
        raise InputError(f"train_classifier: got labels of shape {tuple(labels.shape)} for {len(images)} images")
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    classifier.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=random)
        batch = images[rows]
        batch = batch + noise * torch.randn(batch.shape, generator=random)
        _update(optimizer, F.cross_entropy(classifier(batch), labels[rows]))
        schedule.step()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """Share of images whose largest logit is at their label."""
    predicted = torch.cat([classifier(part).argmax(1) for part in images.split(batch_size)])
    return float((predicted == labels).double().mean())


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _check(images: Tensor, steps: int, batch_size: int) -> None:
    if images.ndim != 4 or not len(images):
        raise InputError(f"got images of shape {tuple(images.shape)}; wanted (N, C, H, W) with N >= 1")
    if steps < 0 or batch_size < 1:
        raise InputError(f"got steps={steps}, batch_size={batch_size}; wanted steps >= 0 and batch_size >= 1")
