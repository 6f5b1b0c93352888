"""Quality of a set of images against real ones: Frechet distance, score, KID, precision and recall, on any features.

The estimators are torchmetrics' and scikit-learn's; the features are a classifier's, so figures compare only with those
of the same one. With the original Inception network these are FID, IS and KID: see docs/evaluation.md for that.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrefine.errors import InputError
from fastrefine.networks.calls import attempt

FEW = 10_000  # images, below which a Frechet distance says little
NEIGHBOURS = 3  # of precision and recall (Kynkaanniemi et al. 2019)
BLOCK = 500


@dataclass(frozen=True)
class Features:
    """A network that images are judged by. name: goes beside every figure.

    module: images (N, C, H, W) in [-1, 1] -> features (N, F), or (features, logits (N, classes)), which the score needs.
    """

    module: nn.Module
    name: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(features (N, F), class probabilities (N, classes) or None), float32."""
        parts = [
            attempt("network of the features", lambda: self.module(part), part)  # noqa: B023
            for part in images.split(BLOCK)
        ]
        if isinstance(parts[0], tuple):
            return torch.cat([f.flatten(1) for f, _ in parts]), torch.cat([logits for _, logits in parts]).softmax(1)
        return torch.cat([f.flatten(1) for f in parts]), None


def given_features(code: str) -> Features:
    """Features by "package.module:callable": called without arguments, it returns a module with its trained weights.

    Raises InputError where it does not, also where a second call gives other weights, which then are random ones.
    """
    module, _, name = code.partition(":")
    wanted = "wanted package.module:callable that, called without arguments, returns a torch.nn.Module with its weights loaded"
    try:
        make = getattr(importlib.import_module(module), name)
        with torch.random.fork_rng(devices=[]):
            made, again = make(), make()
    except ImportError as error:
        raise InputError(f"--features {code!r} cannot be imported ({error}); is its folder on PYTHONPATH? {wanted}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"--features {code!r} cannot be used ({error}); {wanted}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"--features {code!r} gave a {type(made).__name__}; {wanted}")
    if not _same(made.state_dict(), again.state_dict()):
        raise InputError(f"--features {code!r} makes other weights at each call: wanted it to load trained weights")
    return Features(made.eval(), code)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(value, other.get(name)) for name, value in one.items() if isinstance(value, Tensor)]
    return all(isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all()) for a, b in pairs)


def trained_features(images: Tensor, labels: Tensor, steps: int = 600, seed: int = 0) -> Features:
    """A small convolutional classifier trained here on labelled real images (N, C, H, W); repeats its bits for one seed."""
    classes = int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1], classes)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(images), (128,))
            batch = images[rows] + 0.1 * torch.randn_like(images[rows])
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(batch)[1], labels[rows]).backward()
            optimizer.step()
            schedule.step()
    total = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:8]
    return Features(network.eval(), f"classifier-{total}-{steps}-{seed}")


class Classifier(nn.Module):
    """(N, C, H, W) -> (features (N, 64), logits (N, classes)); three strided convolutions, mean over the map."""

    def __init__(self, channels: int, classes: int, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(channels, width << i, 3, 1 if i == 0 else 2, 1), nn.ReLU()]
            channels = width << i
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.features = nn.Sequential(nn.Linear(4 * channels, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.convolutions(images))
        return features, self.head(features)


def check(images: Tensor, real: Tensor) -> None:
    """Raise InputError unless the two sets can be compared; costs nothing."""
    if images.shape[1:] != real.shape[1:]:
        raise InputError(f"images are {tuple(images.shape[1:])}, real ones {tuple(real.shape[1:])}; wanted one size")
    if min(len(images), len(real)) < 2:
        raise InputError(f"got {len(images)} images and {len(real)} real ones; wanted at least 2 of each")
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError("evaluation needs torchmetrics: pip install 'fastrefine[metrics]'")


def measure(images: Tensor, real: Tensor, features: Features, *, kid_subset: int = 1000) -> dict[str, Any]:
    """torch-fidelity's names: inception_score_mean/_std, frechet_inception_distance, kernel_inception_distance_mean/_std,
    precision, recall, f_score; of images (N, C, H, W) against real ones (M, C, H, W), both in [-1, 1].

    "inception" is part of the names only: what was measured by stands under "features". num_samples is N. Precision and
    recall are of 10,000 images of each set at most, drawn from all of them, like the subsets of KID. The score is left out
    where the features give no logits. Raises InputError on sets of different shape, or too small for a covariance.
    """
    check(images, real)
    ours, probabilities = features(images)
    theirs, _ = features(real)
    # files often lie class by class, and some estimators read parts: mixed by torch-fidelity's permutation
    ours, theirs = _mixed(ours), _mixed(theirs)
    found: dict[str, Any] = {"num_samples": len(images), "num_real": len(real), "features": features.name}
    if probabilities is not None:
        found |= _score(_mixed(probabilities))
    subset = min(kid_subset, len(images), len(real))
    return found | _distances(ours, theirs, subset) | _precision_recall(ours.numpy(), theirs.numpy())


def warnings_of(found: dict[str, Any], raw: dict[str, Any] | None) -> list[str]:
    """What a reader should be told: too few images; a score that rises while the distance does too (over-refinement)."""
    told = []
    if found["num_samples"] < FEW:
        told.append(f"{found['num_samples']} images: the Frechet distance is biased upwards; compare sets of one size only")
    score = "inception_score_mean"
    if raw is not None and score in found:
        better = found[score] > raw[score]
        worse = found["frechet_inception_distance"] > raw["frechet_inception_distance"]
        if better and worse:
            told.append(
                f"score and distance part ways: the score rose from {raw[score]:.3f} to {found[score]:.3f}, but the distance "
                f"too, from {raw['frechet_inception_distance']:.3f} to {found['frechet_inception_distance']:.3f}: "
                "over-refined? Fewer or smaller steps, or a shaped discriminator"
            )
    return told


class _Given(nn.Module):
    """torchmetrics wants a network; the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


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


def _score(probabilities: Tensor, splits: int = 10) -> dict[str, float]:
    from fastrefine.metrics import classifier_score

    splits = min(splits, len(probabilities))
    scores = [classifier_score(part) for part in probabilities.tensor_split(splits)]
    return {"inception_score_mean": float(np.mean(scores)), "inception_score_std": float(np.std(scores))}


def _precision_recall(ours: np.ndarray, theirs: np.ndarray, limit: int = 10_000) -> dict[str, float]:
    """Share of either set within the NEIGHBOURS-th neighbour's distance of one of the other [Kynkaanniemi et al. 2019]."""
    ours, theirs = ours[:limit], theirs[:limit]
    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        return {}
    precision, recall = _covered(ours, theirs), _covered(theirs, ours)
    total = precision + recall
    return {"precision": precision, "recall": recall, "f_score": 2 * precision * recall / total if total else 0.0}


def _covered(x: np.ndarray, manifold: np.ndarray) -> float:
    offset = manifold.mean(0, dtype=np.float64)  # a common one would cost cdist the digits that tell points apart
    centres, points = (torch.from_numpy((np.asarray(a, np.float64) - offset).astype(np.float32)) for a in (manifold, x))
    radius = torch.cat(
        [torch.cdist(part, centres).kthvalue(NEIGHBOURS + 1).values for part in centres.split(BLOCK)]
    )  # the nearest is the point itself
    inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def images_of(path: Path, limit: int | None = None) -> Tensor:
    """Images of a run's folder, of pictures, or of a file, float32 (N, C, H, W) in [-1, 1]; limit: as ``pictures.some``."""
    from fastrefine.production.images import FILES, from_pixels, load_images, some
    from fastrefine.production.run_folder import MANIFEST, Folder

    if (path / MANIFEST).is_file():
        pixels = np.concatenate([pixels for pixels, _ in Folder.open(path).parts()])
        return from_pixels(pixels[some(len(pixels), limit)])
    if path.is_file() and path.suffix not in FILES:
        raise InputError(f"{path} holds no images; wanted a run's folder, a folder of pictures, .npz or .safetensors")
    return load_images(path, limit, signed=True)
