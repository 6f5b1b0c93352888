"""A discriminator on the features of a frozen, pretrained network (Projected GAN, Sauer et al., NeurIPS 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import spectral_norm

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.models.pretrained import EFFICIENTNET, EfficientNetStages

BACKBONES: Mapping[str, Callable[[int], nn.Module]] = {EFFICIENTNET: EfficientNetStages}
SMALLEST, STRIDE = 64, 32  # pixels a side that a named backbone gets at least, and what they are a multiple of
_HEAD = 4  # pixels a side down to which a head goes by strides


class ProjectedDiscriminator(nn.Module):
    """D(x) -> logit (N,): small heads on the maps of a frozen pretrained network, summed. Only the heads are trained.

    shape: (C, H, W) of the images, C 1 or 3. backbone: "efficientnet-lite0" (from the packages of ``fastrefine[metrics]``), or
    a module of your own, images (N, 3, h, w) in [-1, 1] -> one map (N, c, h, w) or several; a copy of it is frozen.
    side: pixels to which images are scaled for the backbone. None: as they are for a module of your own, else the next multiple
    of 32, at least 64. width: channels of a head. mixing: whether a fixed random 1x1 convolution mixes the channels of each map
    before its head (the paper's cross-channel mixing), which also brings them down to ``width``. image_range: of the images.
    sha256: of the backbone's weights, where they must be those of a D that was saved.

    The gradient flows to the images. ``calibrate`` puts an affine map on the logit. A pair that is saved keeps the heads and
    the mixing; a backbone that was given by name is named, its weights are not stored:
    ``save_pair(folder, g, d, code=("mygan:Generator", d.code), arguments=({}, d.arguments), prior=prior)``. With a module of
    your own, save a class of yours that makes it; the backbone's weights are then stored too.

    Raises InputError for what does not fit, where the packages are absent, and where the weights are others than ``sha256``.

    Example: ``fr.ProjectedDiscriminator((3, 32, 32))(torch.rand(4, 3, 32, 32) * 2 - 1).shape  # (4,)``
    """

    code = "fastrefine.models.projected:ProjectedDiscriminator"

    def __init__(
        self, shape: Sequence[int], backbone: str | nn.Module = EFFICIENTNET, side: int | None = None, width: int = 64,
        mixing: bool = True, image_range: Sequence[float] = (-1.0, 1.0), sha256: str = "",
    ):  # fmt: skip
        super().__init__()
        if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
            raise InputError(f"shape is {tuple(shape)}; a backbone takes images (C, H, W) of 1 or 3 channels")
        low, high = map(float, image_range)
        if not low < high:
            raise InputError(f"image_range is {tuple(image_range)}; wanted (low, high) with low < high")
        checks.count("width", width, 1)
        if isinstance(backbone, str):
            checks.choice("backbone", backbone, tuple(BACKBONES))
            side = max(SMALLEST, -(-max(shape[1:]) // STRIDE) * STRIDE) if side is None else side
            if checks.count("side", side, STRIDE) % STRIDE:
                raise InputError(f"side is {side}; {backbone} wants a multiple of {STRIDE}")
            network = BACKBONES[backbone](side)
        elif isinstance(backbone, nn.Module):
            network = copy.deepcopy(backbone).eval()
        else:
            known = ", ".join(BACKBONES)
            raise InputError(f"backbone is a {type(backbone).__name__}; wanted one of {known} or a torch.nn.Module")
        found = getattr(network, "sha256", "")
        if sha256 and sha256 != found:
            raise InputError(
                f"the weights of {backbone} have sha256 {found[:12]}..., and this D was trained on others ({sha256[:12]}...): "
                "install the version of the package that it was trained with"
            )
        self.arguments: dict[str, Any] = {
            "shape": list(shape), "side": side, "width": width, "mixing": mixing, "image_range": [low, high],
            **({"backbone": backbone, "sha256": found} if isinstance(backbone, str) else {}),
        }  # fmt: skip
        self.side, self.low, self.high = side, low, high
        self.backbone = _frozen(network, stored=not isinstance(backbone, str))
        with torch.no_grad():
            maps = _maps(self.backbone(self._scaled(torch.zeros(2, *shape))))
        self.mixing = nn.ModuleList()
        self.heads = nn.ModuleList()
        for a in maps:
            mixed = nn.Conv2d(a.shape[1], width, 1, bias=False) if mixing else nn.Identity()
            self.mixing.append(_frozen(mixed, stored=True))
            self.heads.append(_head(width if mixing else a.shape[1], min(a.shape[2:]), width))
        self.slope: Tensor
        self.shift: Tensor
        self.register_buffer("slope", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, C, H, W) -> (N,)."""
        maps = _maps(self.backbone(self._scaled(images)))
        parts = [head(mix(a)).mean((1, 2, 3)) for head, mix, a in zip(self.heads, self.mixing, maps, strict=True)]
        return self.slope * torch.stack(parts).sum(0) + self.shift

    def calibrate(self, slope: float, shift: float) -> None:
        """From now on D(x) = slope d + shift, with the d of before."""
        self.shift.mul_(slope).add_(shift)
        self.slope.mul_(slope)

    def train(self, mode: bool = True) -> ProjectedDiscriminator:
        """The heads alone: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def _scaled(self, images: Tensor) -> Tensor:
        x = (2 * images - (self.low + self.high)) / (self.high - self.low)
        x = x.expand(-1, 3, -1, -1)
        if self.side is None or x.shape[2:] == (self.side, self.side):
            return x
        return interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=max(x.shape[2:]) > self.side)


def _frozen(module: nn.Module, stored: bool) -> nn.Module:
    """The module with buffers in place of its parameters, so that no optimizer has them; stored: whether a state dict has."""
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                del child._parameters[name]
                child.register_buffer(name, parameter.detach())
        if isinstance(child, _BatchNorm):  # it would ask a state dict for a count that is not there
            child.track_running_stats = False
        if not stored:
            child._non_persistent_buffers_set.update(child._buffers)
    return module


def _maps(found: Any) -> list[Tensor]:
    """What a backbone gave, as maps; InputError where it is something else."""
    maps = [found] if isinstance(found, Tensor) else list(found) if isinstance(found, tuple | list) else []
    if not maps or not all(isinstance(a, Tensor) and a.dim() == 4 for a in maps):
        given = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in maps] or type(found).__name__
        raise InputError(f"the backbone gave {given}; wanted one or several maps (N, c, h, w)")
    return maps


def _head(channels: int, side: int, width: int) -> nn.Sequential:
    """A map (N, channels, side, side) -> (N, 1, h, w), of at most 4 x 4."""
    layers: list[nn.Module] = []
    while side > _HEAD:
        layers += [spectral_norm(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
        channels, side = width, side // 2
    layers += [spectral_norm(nn.Conv2d(channels, width, 3, 1, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))
