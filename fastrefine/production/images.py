"""Reads real samples: images, float32 (N, C, H, W) in [-1, 1], from files, folders and data sets of the Hub; sound, tables."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from fastrefine.datasets import Images, from_pixels, is_mnist, load_digits, load_mnist
from fastrefine.errors import InputError
from fastrefine.production import hub, sources
from fastrefine.production.sources import some

ARRAYS = (".npz", ".npy", ".safetensors")
FILES = (*ARRAYS, ".parquet", ".tar")
WANTED = f"wanted a folder of pictures or of MNIST's idx files, {', '.join(FILES[:-1])} or {FILES[-1]}, or digits"
PARTS = ("train", "validation", "test")  # "digits:test": the held-out images
SHAPED_ON = "shaped_on.npy"  # in a pair's folder: digests of the images that its discriminator was shaped on


def load_labelled(
    path: str | Path, limit: int | None = None, *, signed: bool = False, images_only: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [-1, 1], float32, and their labels (N,) int64 or None; limit: how many at most, see ``some``.

    path: one of
    - a folder of pictures of one size, in order of names, those of subfolders too; grey ones have one channel, and four where
      all have alpha and some are see-through. Two or more subfolders that hold all pictures are classes.
    - a .parquet of the Hub's form (a column of bytes, or of {"bytes", "path"}; label or labels), a .tar of webdataset (KEY.png,
      KEY.cls or KEY.json), or a folder of several of them, such as the local copy of a data set.
    - "user/name" or "user/name@revision", a data set of the Hugging Face Hub (needs huggingface_hub).
    - a folder of MNIST's idx files (``load_mnist``), or "digits", scikit-learn's. Keras' mnist.npz (x_train, y_train, x_test,
      y_test).
    - a .npz or .npy: its first array, (N, H, W, C), grey (N, H, W), or (N, C, H, W) where only that gives 1, 3 or 4 channels;
      labels: arr_1 or "labels". A .safetensors: "images" and "labels". Arrays are uint8, or floats in [-1, 1].

    Where there are parts, as in train-00000.parquet or a folder train/, these are the training images; with ":test" or
    ":validation" behind the path those of that part, as in "digits:test".

    images_only=False: also a folder of WAV or FLAC files of one length, or an array of floats (N, 1 or 2, T), as sound
    (N, C, T) in [-1, 1]; the columns of numbers of a .parquet, or an array of floats (N, F) or (N, C, D, H, W), as they are.

    Raises InputError on anything else. signed: also on floats that all lie in 0 to 1, which may be in the wrong range.

    Example: ``load_labelled("digits:test")[0].shape  # (397, 1, 8, 8)``
    """
    source, part = _parted(str(path))
    sets: Images | None = None
    if source == "digits" and not Path(source).exists():
        sets = load_digits()
    elif is_mnist(source):
        sets = load_mnist(source)
    if sets is not None:
        if part == "validation":
            raise InputError(f"{source} has no part validation; it has test, train")
        images, targets = (sets.test, sets.test_labels) if part == "test" else (sets.train, sets.train_labels)
        at = some(len(images), limit)
        return images[at], targets[at]
    path = Path(source)
    if not path.exists() and not path.suffix and hub.NAME.fullmatch(source):
        path = hub.dataset(source, part)
    if path.is_dir():
        array, labels = sources.folder(path, part, limit)
        others = array.dtype != np.uint8
    elif path.suffix in (".parquet", ".tar") and path.is_file() and not part:
        array, labels = sources.samples([path], path.parent, limit)
        others = array.dtype != np.uint8
    else:
        array, labels = _arrays(path, part, limit)
        sound = array.ndim == 3 and array.shape[1] < 3  # no picture has so few rows
        others = array.dtype.kind == "f" and (array.ndim in (2, 5) or sound)
    classes = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    if others and not images_only:
        found = torch.from_numpy(np.ascontiguousarray(array)).float()
        if found.ndim == 3 and not bool((found.abs() <= 1.001).all()):
            raise InputError(f"{path} holds sound beyond -1 to 1; wanted it within")
        return found, classes
    return _signed(array, path, signed, others), classes


def _arrays(path: Path, part: str, limit: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The samples of a file of arrays as they are stored, and their labels."""
    keras = f"x_{part or 'train'}", f"y_{part or 'train'}"
    if part and path.suffix != ".npz":
        raise InputError(
            f"{path} has no parts, so no :{part}; wanted digits:{part}, or a folder of MNIST's idx files before it"
        )
    if not path.is_file():
        source, _, other = str(path).rpartition(":")
        if source and Path(source).exists():
            raise InputError(f"{source} has no part {other!r}; wanted :{', :'.join(PARTS)} behind it, or nothing")
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
        known_kind = path.suffix in ARRAYS and "pickle" not in str(error)
        why = f" ({type(error).__name__}: {error})" if known_kind else ""
        raise InputError(f"{path} cannot be read as images{why}; {WANTED}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} holds no arrays, but files such as {next(iter(content))!r}; {WANTED}")
    whole = isinstance(labels, np.ndarray) and labels.shape == array.shape[:1] and labels.dtype.kind in "iu"
    return (
        array[some(len(array), limit)] if array.ndim else array,
        labels[some(len(labels), limit)] if whole and labels is not None else None,
    )


def training_part(path: str) -> str:
    """ "digits:train" of "digits:test", and so on; other paths as they are."""
    source, part = _parted(path)
    return f"{source}:train" if part in PARTS[1:] else path


def held_out_part(path: str) -> str:
    """ "digits:test" of "digits" or "digits:train", and so on; "" where there is none, or ``path`` is it."""
    source, part = _parted(path)
    folder, there = Path(source), set()
    if (source == "digits" and not folder.exists()) or is_mnist(source):
        there = {"test"}
    elif folder.suffix == ".npz" and folder.is_file():
        with np.load(source, allow_pickle=False) as content:
            there = {"test"} if "x_test" in content.files else set()
    elif folder.is_dir():
        splits = {sources.split_of(file.relative_to(folder)) for file in sources.files_of(folder.rglob("*"))}
        there = splits if "train" in splits else set()
    return next((f"{source}:{held}" for held in ("test", "validation") if held in there and part in ("", "train")), "")


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


def _signed(array: np.ndarray, path: Path, signed: bool, others: bool) -> Tensor:
    """(N, C, H, W) in [-1, 1] of the array of a file; signed: as in ``load_labelled``; others: it holds no images."""
    if array.ndim == 3 and array.shape[2] > 4 and not others:  # else it may be one picture (H, W, C)
        array = array[..., None]
    if array.ndim != 4 or not len(array) or array.dtype.kind not in "biuf":
        raise InputError(
            f"{path} holds an array of shape {array.shape}, {array.dtype}; wanted (N, H, W, C), (N, C, H, W) or grey (N, H, W)"
        )
    last, second = (array.shape[axis] in (1, 3) for axis in (3, 1))
    if (last and (not second or array.dtype == np.uint8)) or (array.shape[3] == 4 and not second):
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
