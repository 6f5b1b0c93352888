"""CIFAR-10 and any folder of pictures, as the experiments read them."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastrefine.datasets import Images, from_pixels, shuffled
from fastrefine.errors import InputError
from fastrefine.production.sources import PICTURES

CIFAR10_PARTS = {"train": "cifar10-train", "test": "cifar10-test"}


def load_cifar10(path: str | os.PathLike[str]) -> Images:
    """CIFAR-10 as pictures (N, 3, 32, 32), from cifar10-train and cifar10-test in ``path``: .zip files or folders.

    Each holds one folder for each class. Classes are in alphabetical order, as in the original; images are in one fixed
    random order, so the first ones are of all classes. Raises InputError that names what is absent or cannot be read.
    """
    parts = {part: _read_classes(Path(path), name) for part, name in CIFAR10_PARTS.items()}
    return Images(parts["train"][0], parts["test"][0], parts["train"][1], parts["test"][1])


class PictureFolder:
    """Pictures of a folder and its subfolders, decoded when asked for: a map-style Dataset of (image, label).

    Images are float32 (3, size, size) in [-1, 1]: the central square, scaled. Labels: number of the subfolder in ``classes``,
    which are in alphabetical order; 0 where pictures lie in the folder itself. Order: one fixed permutation of the sorted
    names. Raises InputError without pictures.
    """

    def __init__(self, path: str | os.PathLike[str], size: int):
        root = Path(path)
        found = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        if not found:
            raise InputError(f"{root} has no pictures; wanted files ending in {', '.join(PICTURES)}")
        owners = [p.relative_to(root).parts[0] if p.parent != root else "" for p in found]
        order = shuffled(len(found))
        self.size, self.paths = size, [found[i] for i in order]
        self.classes = sorted(set(owners)) if "" not in owners else []
        self.labels = torch.tensor([self.classes.index(owners[i]) if self.classes else 0 for i in order])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return from_pixels(_decoded(self.paths[index], str(self.paths[index]), self.size)[None])[0], self.labels[index]

    def images(self, indices: Any) -> Tensor:
        """Those at ``indices``, (N, 3, size, size)."""
        return torch.stack([self[int(i)][0] for i in indices])


def _read_classes(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """(images, labels) of ``folder``/name.zip or ``folder``/name."""
    archive = folder / f"{name}.zip"
    if not archive.is_file():
        if not (folder / name).is_dir():
            raise InputError(f"CIFAR-10: {folder} has neither {name}.zip nor {name}/, a folder of pictures for each class")
        pictures = PictureFolder(folder / name, 32)
        return pictures.images(range(len(pictures))), pictures.labels
    pixels, owners = [], []
    for member, content in _members(archive):
        pixels.append(_decoded(BytesIO(content), f"{archive}: {member}", 32))
        owners.append(Path(member).parent.name)
    if not pixels:
        raise InputError(f"CIFAR-10: {archive} has no pictures")
    order, classes = shuffled(len(pixels)), sorted(set(owners))
    return from_pixels(np.stack(pixels)[order]), torch.tensor([classes.index(owners[i]) for i in order])


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each picture of a zip, in order of names."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(n for n in opened.namelist() if n.lower().endswith(PICTURES)):
                yield name, opened.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive} cannot be read as a zip ({error}); fetch the file again") from error


def _decoded(file: Path | IO[bytes], name: str, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the central square, scaled where it is of another size."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{name} cannot be read as a picture ({error})") from error
    if picture.size != (size, size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)
