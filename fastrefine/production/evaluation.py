"""Quality of images against real ones: Frechet distance, score, KID, precision and recall, on the features of any network.

Compare only figures of one network. With the original Inception network they are FID, IS and KID: see docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrefine.datasets import from_pixels
from fastrefine.errors import InputError
from fastrefine.metrics import classifier_score
from fastrefine.models.digits import Classifier
from fastrefine.networks.calls import attempt
from fastrefine.production.configuration import Network
from fastrefine.production.images import FILES, load_images, some
from fastrefine.production.named_code import Trust
from fastrefine.production.run_folder import MANIFEST, Folder
from fastrefine.production.saved_pair import build
from fastrefine.progress import counted, over

FEW = 10_000  # images: of fewer, the Frechet distance is biased
NEIGHBOURS = 3  # of precision and recall (Kynkaanniemi et al. 2019)
BLOCK = 500  # images, or rows of a matrix of distances, at once


@dataclass(frozen=True)
class Features:
    """The network on whose features images are compared. name: is reported with every figure.

    network: images (N, C, H, W) in [-1, 1] -> features (N, F), or (features, logits (N, classes)), which the score needs.
    """

    network: Callable[[Tensor], Any]
    name: str

    @torch.no_grad()
    def __call__(self, images: Tensor, progress: bool | None = False) -> tuple[Tensor, Tensor | None]:
        """(features (N, F), class probabilities (N, classes) or None), float32; progress: as for ``ProgressBar``."""
        blocks = over(images.split(BLOCK), len(images), "features", "images", progress, len)
        parts = [attempt("network of the features", partial(self.network, part), part) for part in blocks]
        if isinstance(parts[0], tuple):
            return torch.cat([f.flatten(1) for f, _ in parts]), torch.cat([logits for _, logits in parts]).softmax(1)
        return torch.cat([f.flatten(1) for f in parts]), None


def given_features(code: str) -> Features:
    """Features by "package.module:callable": called without arguments, it returns a module with its trained weights.

    Raises InputError where it does not, also where two calls give different weights: then they are random ones.
    """
    wanted = "wanted package.module:callable that, called without arguments, returns a torch.nn.Module with its weights loaded"
    made = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(2):
            torch.manual_seed(seed)
            try:
                made.append(build(Network(code), "network of the features", Trust(everything=True)))
            except ValueError as error:  # InputError is one
                raise InputError(f"--features {code!r} cannot be used: {error}; {wanted}") from error
    one, other = (module.state_dict() for module in made)
    if not all(torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor)):
        raise InputError(f"--features {code!r} makes other weights at each call: wanted it to load trained weights")
    return Features(made[0], code)


def trained_features(
    images: Tensor, labels: Tensor, steps: int = 600, seed: int = 0, *, progress: bool | None = False
) -> Features:
    """A small convolutional classifier, trained here on labelled real images (N, C, H, W); bitwise the same for one seed."""
    layers: list[nn.Module] = []
    channels = images.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU()]
            channels = width
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 64), nn.ReLU()]
        network = Classifier(nn.Sequential(*layers), 64, int(labels.max()) + 1)
        train_classifier(network, images, labels, steps=steps, noise=0.1, progress=progress)

    def features_and_logits(x: Tensor) -> tuple[Tensor, Tensor]:
        features = network.features(x)
        return features, network.head(features)

    total = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:8]
    return Features(features_and_logits, f"classifier-{total}-{steps}-{seed}")


def train_classifier(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, steps: int, batch_size: int = 128, learning_rate: float = 2e-3,
    noise: float = 0.15, random: torch.Generator | None = None, progress: bool | None = False,
) -> None:  # fmt: skip
    """Train ``classifier`` (images -> logits of classes) in place with cross entropy and leave it in eval mode.

    images: (N, C, H, W), labels: (N,) int64. Adam, the rate falling to 0 along a cosine. Gaussian noise of standard
    deviation ``noise`` is added to the images, so that features do not depend on single pixels. random: None: torch's own.
    """
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    classifier.train()
    for _ in counted(steps, "training the classifier", progress):
        rows = torch.randint(len(images), (batch_size,), generator=random)
        batch = images[rows]
        batch = batch + noise * torch.randn(batch.shape, generator=random)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(classifier(batch), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


def check(images: Tensor, real: Tensor) -> None:
    """Raise InputError unless the two sets can be compared."""
    if images.shape[1:] != real.shape[1:]:
        raise InputError(f"images are {tuple(images.shape[1:])}, real ones {tuple(real.shape[1:])}; wanted one size")
    if min(len(images), len(real)) < 2:
        raise InputError(f"got {len(images)} images and {len(real)} real ones; wanted at least 2 of each")
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError("evaluation needs torchmetrics: pip install 'fastrefine[metrics]'")


def measure(
    images: Tensor, real: Tensor, features: Features, *, kid_subset: int = 1000, progress: bool | None = False
) -> dict[str, Any]:
    """All figures of images (N, C, H, W) against real ones (M, C, H, W), both in [-1, 1], under torch-fidelity's names:
    inception_score_mean/_std, frechet_inception_distance, kernel_inception_distance_mean/_std, precision, recall, f_score.

    Despite these names the network is the one under "features". num_samples is N. Precision and recall are of at most 10,000
    images drawn from each set. The score is left out where the network gives no logits. Raises InputError on sets of
    different shape, or of fewer than two images.
    """
    check(images, real)
    ours, probabilities = features(images, progress)
    theirs, _ = features(real, progress)
    # images are often sorted by class, and some estimators read parts of a set: mixed by torch-fidelity's permutation
    ours, theirs = _mixed(ours), _mixed(theirs)
    found: dict[str, Any] = {"num_samples": len(images), "num_real": len(real), "features": features.name}
    if probabilities is not None:
        parts = _mixed(probabilities).tensor_split(min(10, len(probabilities)))
        scores = [classifier_score(part) for part in parts]
        found |= {"inception_score_mean": float(np.mean(scores)), "inception_score_std": float(np.std(scores))}
    subset = min(kid_subset, len(images), len(real))
    return found | _distances(ours, theirs, subset) | _precision_recall(ours.numpy(), theirs.numpy())


def warnings_of(found: dict[str, Any], raw: dict[str, Any] | None) -> list[str]:
    """Warnings for a reader: too few images; score and distance both higher than those of ``raw``, unrefined images."""
    warnings = []
    if found["num_samples"] < FEW:
        warnings.append(f"{found['num_samples']} images: the Frechet distance is biased upwards; compare sets of one size only")
    score, distance = "inception_score_mean", "frechet_inception_distance"
    if raw is not None and score in found and found[score] > raw[score] and found[distance] > raw[distance]:
        warnings.append(
            f"score and distance part ways: the score rose from {raw[score]:.3f} to {found[score]:.3f}, but the distance "
            f"too, from {raw[distance]:.3f} to {found[distance]:.3f}: over-refined? Fewer or smaller steps, or a shaped "
            "discriminator"
        )
    return warnings


class _Given(nn.Identity):
    """The network that torchmetrics asks for; it is called with features, which are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def _distances(ours: Tensor, theirs: Tensor, subset: int) -> dict[str, float]:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given = _Given(ours.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fid = FrechetInceptionDistance(feature=given, normalize=False).set_dtype(torch.float64)
        kid = KernelInceptionDistance(feature=given, subsets=100, subset_size=subset, normalize=False)
    for metric in (fid, kid):
        metric.update(theirs.double() if metric is fid else theirs, real=True)
        metric.update(ours.double() if metric is fid else ours, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the subsets of KID
        mean, std = kid.compute()
    return {
        "frechet_inception_distance": max(float(fid.compute()), 0.0),
        "kernel_inception_distance_mean": float(mean), "kernel_inception_distance_std": float(std),
    }  # fmt: skip


def _mixed(x: Tensor) -> Tensor:
    """The rows of ``x`` in a fixed random order."""
    return x[torch.from_numpy(np.random.RandomState(2020).permutation(len(x)))]


def _precision_recall(ours: np.ndarray, theirs: np.ndarray, limit: int = 10_000) -> dict[str, float]:
    """Shares of each set that the other set covers, and their harmonic mean [Kynkaanniemi et al. 2019]."""
    ours, theirs = ours[:limit], theirs[:limit]
    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        return {}
    precision, recall = _covered(ours, theirs), _covered(theirs, ours)
    total = precision + recall
    return {"precision": precision, "recall": recall, "f_score": 2 * precision * recall / total if total else 0.0}


def _covered(x: np.ndarray, manifold: np.ndarray) -> float:
    """Share of x within the distance of a point of ``manifold`` to its NEIGHBOURS-th neighbour there."""
    offset = manifold.mean(0, dtype=np.float64)  # without it a large common offset would cost cdist its precision
    centres, points = (torch.from_numpy((np.asarray(a, np.float64) - offset).astype(np.float32)) for a in (manifold, x))
    radius = torch.cat(
        [torch.cdist(part, centres).kthvalue(NEIGHBOURS + 1).values for part in centres.split(BLOCK)]
    )  # the nearest is the point itself
    inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def images_of(path: Path, limit: int | None = None) -> Tensor:
    """Images float32 (N, C, H, W) in [-1, 1] of a run's folder, a folder of pictures or a file; limit: see ``images.some``."""
    if (path / MANIFEST).is_file():
        pixels = np.concatenate([pixels for pixels, _ in Folder.open(path).parts()])
        return from_pixels(pixels[some(len(pixels), limit)])
    if path.is_file() and path.suffix not in FILES:
        raise InputError(f"{path} holds no images; wanted a run's folder, a folder of pictures, .npz or .safetensors")
    return load_images(path, limit, signed=True)
