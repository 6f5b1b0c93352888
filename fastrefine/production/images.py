"""Reads images, float32 (N, C, H, W) in [-1, 1]: a folder of pictures or of MNIST's files, .npz, .npy or .safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

from fastrefine.datasets import Images, from_pixels, is_mnist, load_digits, load_mnist
from fastrefine.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")  # of pictures
FILES = (".npz", ".npy", ".safetensors")
WANTED = f"wanted a folder of pictures or of MNIST's idx files, {', '.join(FILES[:-1])} or {FILES[-1]}, or digits"
PARTS = ("train", "test")  # "digits:test": the held-out images
SHAPED_ON = "shaped_on.npy"  # in a pair's folder: digests of the images that its discriminator was shaped on


def load_images(path: str | Path, limit: int | None = None, *, signed: bool = False) -> Tensor:
    """The images of ``load_labelled``."""
    return load_labelled(path, limit, signed=signed)[0]


def load_labelled(path: str | Path, limit: int | None = None, *, signed: bool = False) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [-1, 1], float32, and their labels (N,) int64 or None; limit: how many at most, see ``some``.

    path: one of
    - a folder of pictures of one size, in order of names, those of subfolders too; grey ones have one channel. Two or more
      subfolders that hold all pictures are classes.
    - a folder of MNIST's idx files (``load_mnist``), or "digits", scikit-learn's: their training images. "FOLDER:test" and
      "digits:test" are the held-out ones. Keras' mnist.npz (x_train, y_train, x_test, y_test) likewise.
    - a .npz or .npy: its first array, (N, H, W, C), grey (N, H, W), or (N, C, H, W) where only that gives 1 or 3 channels;
      labels: arr_1 or "labels". A .safetensors: "images" and "labels". Arrays are uint8, or floats in [-1, 1].

    Raises InputError on anything else. signed: also on floats that all lie in 0 to 1, which may be in the wrong range.

    Example: ``load_labelled("digits:test")[0].shape  # (397, 1, 8, 8)``
    """
    source, part = _parted(str(path))
    classes: Tensor | None = None
    sets: Images | None = None
    if source == "digits" and not Path(source).exists():
        sets = load_digits()
    elif is_mnist(source):
        sets = load_mnist(source)
    if sets is not None:
        images, targets = (sets.test, sets.test_labels) if part == "test" else (sets.train, sets.train_labels)
        at = some(len(images), limit)
        return images[at], targets[at]
    path = Path(source)
    keras = f"x_{part or 'train'}", f"y_{part or 'train'}"
    if part and path.suffix != ".npz":
        raise InputError(
            f"{path} has no parts, so no :{part}; wanted digits:{part}, or a folder of MNIST's idx files before it"
        )
    if path.is_dir():
        pixels, classes = _folder(path, limit)
        return _signed(pixels, path), classes
    if not path.is_file():
        raise InputError(f"{path} is not there; {WANTED}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
            array, labels = content["images"], content.get("labels")
        else:
            loaded = np.load(path, allow_pickle=False)
            content = {"arr_0": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
            if part or keras[0] in content:
                array, labels = content[keras[0]], content.get(keras[1])
            else:
                array, labels = next(iter(content.values())), content.get("labels", content.get("arr_1"))
    except Exception as error:
        known_kind = path.suffix in FILES and "pickle" not in str(error)
        why = f" ({type(error).__name__}: {error})" if known_kind else ""
        raise InputError(f"{path} cannot be read as images{why}; {WANTED}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} holds no arrays, but files such as {next(iter(content))!r}; {WANTED}")
    if isinstance(labels, np.ndarray) and labels.shape == array.shape[:1] and labels.dtype.kind in "iu":
        classes = torch.from_numpy(labels[some(len(labels), limit)].astype(np.int64))
    return _signed(array[some(len(array), limit)] if array.ndim else array, path, signed), classes


def training_part(path: str) -> str:
    """ "digits:train" of "digits:test", and so on; other paths as they are."""
    source, part = _parted(path)
    return f"{source}:train" if part == "test" else path


def held_out_part(path: str) -> str:
    """ "digits:test" of "digits" or "digits:train", and so on; "" where there is none, or ``path`` is it."""
    source, part = _parted(path)
    there = (source == "digits" and not Path(source).exists()) or is_mnist(source)
    if Path(source).suffix == ".npz" and Path(source).is_file():
        with np.load(source, allow_pickle=False) as content:
            there = "x_test" in content.files
    return f"{source}:test" if there and part != "test" else ""


def shaped_on(pair: str) -> np.ndarray | None:
    """The ``digests`` of the images that the discriminator of the folder ``pair`` was shaped on; None: nothing is known."""
    try:
        return np.load(Path(pair) / SHAPED_ON, allow_pickle=False)
    except (OSError, ValueError):
        return None


def digests(images: Tensor) -> np.ndarray:
    """A number for each image (N, C, H, W) in [-1, 1], equal for equal pixels of one byte: (N,) uint64."""
    levels = (images.float() * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return np.array([int.from_bytes(hashlib.sha256(x.tobytes()).digest()[:8], "little") for x in levels], np.uint64)


def some(n: int, limit: int | None) -> np.ndarray | slice:
    """``limit`` of n rows in ascending order, by one fixed random draw: the first rows may all be of one class."""
    if limit is None or limit >= n:
        return slice(None)
    return np.sort(np.random.RandomState(2020).permutation(n)[:limit])


def scaled(images: Tensor, image_range: tuple[float, float]) -> Tensor:
    """Images in [-1, 1] mapped to another range."""
    low, high = image_range
    return (images + 1) * ((high - low) / 2) + low


def unscaled(images: Tensor, image_range: tuple[float, float]) -> Tensor:
    """Images in ``image_range`` mapped to [-1, 1] and clipped, float32 on the CPU."""
    low, high = image_range
    return ((images - low) / (high - low) * 2 - 1).clamp(-1, 1).float().cpu()


def _parted(path: str) -> tuple[str, str]:
    """("digits", "test") of "digits:test"; a path without a part, or which exists as it is, and ""."""
    source, colon, part = path.rpartition(":")
    return (source, part) if colon and part in PARTS and not Path(path).exists() else (path, "")


def _folder(path: Path, limit: int | None) -> tuple[np.ndarray, Tensor | None]:
    found = np.array(sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES), dtype=object)
    files: list[Path] = list(found[some(len(found), limit)])
    if not files:
        raise InputError(f"{path} has no pictures ({', '.join(SUFFIXES)}) and none of MNIST's idx files")
    images: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file) as opened:
                x = np.asarray(opened if opened.mode in ("L", "RGB") else opened.convert("RGB"))
        except OSError as error:
            raise InputError(f"{file} is no picture ({error})") from error
        x = x[..., None] if x.ndim == 2 else x
        if images and x.shape != images[0].shape:
            raise InputError(f"{file} is of shape {x.shape}, {files[0]} of {images[0].shape}; wanted all alike")
        images.append(x)
    owners = [file.relative_to(path).parts[:-1] for file in files]
    names = sorted({parts[0] for parts in owners if parts})
    labelled = all(owners) and len(names) > 1 and not all(name.isdecimal() and len(name) == 6 for name in names)
    return np.stack(images), torch.tensor([names.index(parts[0]) for parts in owners]) if labelled else None


def _signed(array: np.ndarray, path: Path, signed: bool = False) -> Tensor:
    """(N, C, H, W) in [-1, 1] of the array of a file; signed: as in ``load_labelled``."""
    if array.ndim == 3 and array.shape[2] > 4:  # else it may be one picture (H, W, C)
        array = array[..., None]
    if array.ndim != 4 or not len(array) or array.dtype.kind not in "biuf":
        raise InputError(
            f"{path} holds an array of shape {array.shape}, {array.dtype}; wanted (N, H, W, C), (N, C, H, W) or grey (N, H, W)"
        )
    if array.shape[3] in (1, 3) and (array.shape[1] not in (1, 3) or array.dtype == np.uint8):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype == np.uint8:
        return from_pixels(array.transpose(0, 2, 3, 1))
    x = torch.from_numpy(np.ascontiguousarray(array))
    low, high = float(array.min()), float(array.max())
    holds = f"{path} holds {x.dtype} in {low:g} to {high:g}; wanted uint8, or floats in [-1, 1]"
    if not x.is_floating_point() or not -1.001 <= low <= high <= 1.001:
        raise InputError(holds)
    if signed and low >= 0:
        raise InputError(f"{holds}: are they 0..1? Scale them by 2 x - 1")
    return x.float()
