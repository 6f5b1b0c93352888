"""What judges images here: Frechet distance and score on a classifier that is trained on the real ones.

Both figures compare only with figures of the same classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrefine.datasets import Images
from fastrefine.demo.gan import build, check_batches, descend
from fastrefine.errors import InputError
from fastrefine.metrics import classifier_score, frechet_distance
from fastrefine.models.digits import Classifier, classify


class Judge:
    """A trained classifier, and its features of the real images that are held out."""

    def __init__(self, classifier: Classifier, data: Images):
        self.classifier = classifier
        self.accuracy = accuracy(classifier, data.test, data.test_labels)
        self.reference, _ = classify(classifier, data.test)

    def __call__(self, images: Tensor, small: int = 0) -> dict[str, Any]:
        """frechet_distance, classifier_score of images (N, C, H, W); also those of the first ``small`` of them.

        Both depend on N, the distance is biased upwards by O(1/N): compare figures of one N. Fewer than two images, which
        a selection may leave, have the worst of both: an infinite distance and a score of 1.
        """
        found = {"frechet_distance": math.inf, "classifier_score": 1.0}
        if len(images) > 1:
            features, probabilities = classify(self.classifier, images)
            found["frechet_distance"] = frechet_distance(features, self.reference)
            found["classifier_score"] = classifier_score(probabilities)
        if small:
            found |= {f"{key}_{small}": value for key, value in self(images[:small]).items()}
        return found


def trained_classifier(make: Callable[[], Classifier], data: Images, *, seed: int, **training: Any) -> Classifier:
    """``make()`` initialised from ``seed`` and trained on the training images; training: as ``train_classifier`` takes it."""
    classifier = build(make, seed)
    train_classifier(classifier, data.train, data.train_labels, seed=seed, **training)
    return classifier


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
    check_batches(images, steps, batch_size)
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
        descend(optimizer, F.cross_entropy(classifier(batch), labels[rows]))
        schedule.step()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """Share of images whose largest logit is at their label."""
    predicted = torch.cat([classifier(part).argmax(1) for part in images.split(batch_size)])
    return float((predicted == labels).double().mean())
