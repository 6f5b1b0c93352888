"""What judges images here: Frechet distance and score on a classifier that is trained on the real ones.

Both figures compare only with figures of the same classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.datasets import Images
from fastrefine.demo.gan import build
from fastrefine.metrics import classifier_score, frechet_distance
from fastrefine.models.digits import Classifier, classify
from fastrefine.production.evaluation import train_classifier


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
    random = torch.Generator().manual_seed(seed)
    train_classifier(classifier, data.train, data.train_labels, random=random, **training)
    return classifier


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """Share of images whose largest logit is at their label."""
    predicted = torch.cat([classifier(part).argmax(1) for part in images.split(batch_size)])
    return float((predicted == labels).double().mean())
