"""Images from files: a folder of pictures, .npz, .npy or .safetensors, as float32 (N, C, H, W) in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrefine.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")


def load_images(path: str | Path, limit: int | None = None) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], float32; the first ``limit``.

    A folder: its pictures, those of subfolders too, in order of names, all of one size, grey ones with one channel. A
    .npz or .npy: its first array, uint8 (N, H, W, C) or (N, C, H, W). A .safetensors: "images", float32 in [-1, 1], or
    uint8 as above. "digits": the digits that come with scikit-learn. Raises InputError on anything else.
    """
    if str(path) == "digits" and not Path(path).exists():
        from fastrefine.datasets import load_digits

        return load_digits().train[:limit]
    path = Path(path)
    if path.is_dir():
        return _signed(_folder(path, limit), path)
    if not path.is_file():
        raise InputError(f"{path} is not there; wanted a folder of pictures, .npz, .npy or .safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _signed(load_file(path)["images"].numpy()[:limit], path)
        content = np.load(path, allow_pickle=False)
        array = content if isinstance(content, np.ndarray) else content[content.files[0]]
    except Exception as error:
        raise InputError(f"{path} cannot be read as images ({type(error).__name__}: {error})") from error
    return _signed(array[:limit], path)


def _folder(path: Path, limit: int | None) -> np.ndarray:
    from PIL import Image

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)[:limit]
    if not files:
        raise InputError(f"{path} has no pictures ({', '.join(SUFFIXES)})")
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
    return np.stack(images)


def _signed(array: np.ndarray, path: Path) -> Tensor:
    if array.ndim != 4 or not len(array):
        raise InputError(f"{path} holds an array of shape {array.shape}; wanted (N, H, W, C) or (N, C, H, W)")
    if array.shape[1] not in (1, 3, 4) and array.shape[3] in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    x = torch.from_numpy(np.ascontiguousarray(array))
    if x.dtype == torch.uint8:
        return x.float().div_(127.5).sub_(1)
    if not x.is_floating_point() or not -1.001 <= float(x.min()) <= float(x.max()) <= 1.001:
        raise InputError(
            f"{path} holds {x.dtype} in {float(x.min()):g} to {float(x.max()):g}; wanted uint8, or floats in [-1, 1]"
        )
    return x.float()
