"""Real images: scikit-learn's digits and MNIST."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrefine.errors import InputError

NUM_DIGITS_TRAIN = 1400  # of 1,797

MNIST_FILES = {
    "train": "train-images-idx3-ubyte.gz",
    "test": "t10k-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


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
    order = shuffled(len(bunch.target))
    images = torch.from_numpy((bunch.images[order] / 8 - 1).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    n = NUM_DIGITS_TRAIN
    return Images(images[:n], images[n:], labels[:n], labels[n:])


def load_mnist(path: str | os.PathLike[str]) -> Images:
    """MNIST from a folder that holds its four original files (``train-images-idx3-ubyte.gz``, ...): 60,000 and 10,000.

    The files may also be unpacked ones (``train-images-idx3-ubyte``). Sets in the same format, such as Fashion-MNIST, are read
    too. Raises InputError that names the file when one is absent, is not what its name says, or is cut short.

    Example: ``load_mnist("data/MNIST/raw").test.shape  # (10000, 1, 28, 28)``
    """
    folder = Path(path)
    files = {part: _idx_file(folder, name) for part, name in MNIST_FILES.items()}
    missing = [MNIST_FILES[part] for part, file in files.items() if file is None]
    if missing:
        raise InputError(f"MNIST: {folder} has no {', '.join(missing)}; wanted the four original .gz files")
    arrays = {part: _read_idx(file) for part, file in files.items() if file is not None}
    for part in ("train", "test"):
        images, labels = arrays[part], arrays[f"{part}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise InputError(
                f"MNIST: {files[part]} has shape {images.shape} and its labels {labels.shape}; wanted (N, H, W) and (N,)"
            )
    return Images(
        from_pixels(arrays["train"][..., None]), from_pixels(arrays["test"][..., None]),
        *(torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test")),
    )  # fmt: skip


def is_mnist(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds some file of MNIST's format, so that ``load_mnist`` is what reads it."""
    return any(_idx_file(Path(path), name) is not None for name in MNIST_FILES.values())


def from_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")).div_(127.5).sub_(1)


def shuffled(n: int) -> np.ndarray:
    """One fixed permutation of 0 ... n - 1."""
    return np.random.RandomState(0).permutation(n)  # the legacy stream is frozen by numpy's policy


def _idx_file(folder: Path, name: str) -> Path | None:
    """The packed file, or the unpacked one; None where there is neither."""
    return next((file for file in (folder / name, folder / name.removesuffix(".gz")) if file.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an idx file: two zero bytes, type 8, number of axes, big-endian lengths, data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
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
