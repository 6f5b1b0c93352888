"""Colour images into files: PNG folders that torch-fidelity and clean-fid read, and grids to look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

PER_FOLDER = 1000


def colour(images: Tensor) -> np.ndarray:
    """(N, 1 or 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, by floor(127.5 x + 128) clipped."""
    levels = np.clip(np.floor(127.5 * images.detach().float().cpu().numpy() + 128), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels, (len(levels), 3, *levels.shape[2:])).transpose(0, 2, 3, 1))


def write_folder(folder: Path, parts: Iterable[Tensor]) -> int:
    """Writes images, parts of (N, 1 or 3, H, W), as folder/000000/000123.png; returns how many.

    For FID with Inception weights: ``fidelity --gpu 0 --fid --isc --samples-find-deep --input1 FOLDER --input2 REAL``.
    """
    count = 0
    for part in parts:
        for image in colour(part):
            path = folder / f"{count - count % PER_FOLDER:06d}" / f"{count:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            count += 1
    return count


def shrink(path: Path, colours: int = 128) -> None:
    """Writes the PNG at ``path`` anew with a palette, a third of the bytes."""
    picture = Image.open(path).convert("RGB")
    picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
