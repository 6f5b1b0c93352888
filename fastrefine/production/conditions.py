"""Reads further inputs of the networks from a file, one row for each sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastrefine.errors import InputError


def load_conditions(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a .npz or .safetensors file by name, each (N, ...) of numbers: row i belongs to sample i.

    Raises InputError where the file is absent or another one, or where the arrays have no rows or not equally many.
    """
    path = Path(path)
    wanted = "wanted a .npz or .safetensors of arrays (N, ...) by name, row i for sample i"
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            raise InputError(f"{path} is no file of conditions; {wanted}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read as conditions ({type(error).__name__}: {error}); {wanted}") from error
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if (
        not found
        or not all(shapes.values())
        or len({shape[0] for shape in shapes.values()}) > 1
        or 0 in map(len, found.values())
    ):
        raise InputError(f"{path} holds arrays of shapes {shapes}; {wanted}, equally many rows in each")
    return found
