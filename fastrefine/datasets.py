"""Real images: scikit-learn's digits, MNIST, CIFAR-10, any folder of pictures."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastrefine.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")  # of pictures
NUM_DIGITS_TRAIN = 1400  # of 1,797

MNIST_FILES = {
    "train": "train-images-idx3-ubyte.gz",
    "test": "t10k-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}

CIFAR10_PARTS = {"train": "cifar10-train", "test": "cifar10-test"}


class Images(NamedTuple):
    """Real images with their labels, in a training and a held-out part.

    Images are float32 of shape (N, C, H, W) in [-1, 1], labels are int64 of shape (N,).
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor


def load_digits() -> Images:
    """The 1,797 handwritten 8x8 digits that come with scikit-learn (UCI optdigits): 1,400 to train with, 397 held out.

    The split is one fixed permutation: the same on every machine and in every version.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    order = _shuffled(len(bunch.target))
    images = torch.from_numpy((bunch.images[order] / 8 - 1).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    n = NUM_DIGITS_TRAIN
    return Images(images[:n], images[n:], labels[:n], labels[n:])


def load_mnist(path: str | os.PathLike[str]) -> Images:
    """MNIST from a folder that holds its four original files (``train-images-idx3-ubyte.gz``, ...): 60,000 and 10,000.

    Raises InputError that names the file when one is absent, is not what its name says, or is cut short.
    """
    folder = Path(path)
    missing = [name for name in MNIST_FILES.values() if not (folder / name).is_file()]
    if missing:
        raise InputError(f"MNIST: {folder} has no {', '.join(missing)}; wanted the four original .gz files")
    arrays = {part: _read_idx(folder / name) for part, name in MNIST_FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[part], arrays[f"{part}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise InputError(
                f"MNIST: {folder / MNIST_FILES[part]} has shape {images.shape} and its labels {labels.shape}; "
                "wanted (N, H, W) and (N,)"
            )
    return Images(
        from_pixels(arrays["train"][..., None]), from_pixels(arrays["test"][..., None]),
        *(torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test")),
    )  # fmt: skip


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
        found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise InputError(f"{root} has no pictures; wanted files ending in {', '.join(SUFFIXES)}")
        owners = [p.relative_to(root).parts[0] if p.parent != root else "" for p in found]
        order = _shuffled(len(found))
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
    order, classes = _shuffled(len(pixels)), sorted(set(owners))
    return from_pixels(np.stack(pixels)[order]), torch.tensor([classes.index(owners[i]) for i in order])


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each picture of a zip, in order of names."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(n for n in opened.namelist() if n.lower().endswith(SUFFIXES)):
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


def from_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")).div_(127.5).sub_(1)


def _shuffled(n: int) -> np.ndarray:
    return np.random.RandomState(0).permutation(n)  # the legacy stream is frozen by numpy's policy


def _read_idx(path: Path) -> np.ndarray:
    """A uint8 array from a gzipped idx file: two zero bytes, type 8, number of axes, big-endian lengths, data."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"MNIST: {path} cannot be read as gzip ({error}); fetch the file again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise InputError(f"MNIST: {path} is no idx file of bytes (starts with {content[:4].hex() or 'nothing'})")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise InputError(f"MNIST: {path} ends inside its header; fetch the file again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"MNIST: {path} holds {len(content) - start} bytes of data, its header says {'x'.join(map(str, shape))}; "
            "fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
