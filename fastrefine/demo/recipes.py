"""What the demo trains and how it refines, for each data set; fixed before anything was refined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastrefine import datasets
from fastrefine.models import digits as networks
from fastrefine.models.digits import Classifier
from fastrefine.production.saved_pair import embedded_pair


@dataclass(frozen=True)
class Recipe:
    """One data set's demo.

    early_steps: the training length of the early-stopped generator, converged_steps: of the converged one ([CS] 4 uses
    both). at, step_size, max_steps: collaborative refinement by sgd with backtracking, stopped at the median real logit.
    shaping_*: Adam with betas (.5, .9) on refined batches under the refiner's own stop rule. curved_steps: at most so many
    Barzilai-Borwein steps are distilled, by a D shaped with them, and taken after the map. distil: arguments of ``fr.distil``.
    """

    name: str
    latent: int
    generator: Callable[[], nn.Sequential]
    discriminator: Callable[[], nn.Sequential]
    classifier: Callable[[], Classifier]
    classifier_steps: int
    early_steps: int
    converged_steps: int
    learning_rate: tuple[float, float]
    r1: float
    at: str
    step_size: float
    max_steps: int
    shaping_iterations: int
    shaping_batch: int
    shaping_rate: float
    num_slots: int
    samples: int
    curved_steps: int
    distil: Mapping[str, Any]
    reference: int = 1000  # real training images whose logits give the stop threshold
    chain_length: int = 20

    def load(self, path: Path | None) -> datasets.Images:
        """The data: MNIST from its folder, the digits from scikit-learn."""
        return datasets.load_digits() if path is None else datasets.load_mnist(path)


DIGITS = Recipe(
    name="digits", latent=networks.DIGITS_LATENT_DIM, generator=networks.digits_generator,
    discriminator=networks.digits_discriminator, classifier=networks.digits_classifier, classifier_steps=1500,
    early_steps=1000, converged_steps=10_000, learning_rate=(3e-4, 3e-4), r1=0.2, at="act2", step_size=0.3, max_steps=40,
    shaping_iterations=300, shaping_batch=128, shaping_rate=1e-4, num_slots=256, samples=4000, reference=1400,
    curved_steps=4, distil=dict(pairs=20_000, rounds=2, iterations=3000),
)  # fmt: skip

MNIST = Recipe(
    name="mnist", latent=networks.MNIST_LATENT_DIM, generator=networks.mnist_generator,
    discriminator=networks.mnist_discriminator, classifier=networks.mnist_classifier, classifier_steps=2500,
    early_steps=1000, converged_steps=10_000, learning_rate=(1e-3, 5e-4), r1=0.5, at="act7", step_size=1.0, max_steps=20,
    shaping_iterations=200, shaping_batch=64, shaping_rate=1e-4, num_slots=128, samples=10_000, chain_length=5,
    curved_steps=9, distil=dict(pairs=6000, iterations=1500, batch_size=64),
)  # fmt: skip


def embedded(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """(generator, discriminator) of the early-stopped GAN that the package carries, in eval mode."""
    pair = embedded_pair(recipe.name)
    return pair.generator, pair.discriminator
