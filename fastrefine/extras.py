"""Packages that an extra installs."""

from __future__ import annotations

import importlib
from typing import Any

from fastrefine.errors import InputError


def package(name: str, extra: str, what: str) -> Any:
    """The module ``name``. Raises InputError, "``what`` needs ...", where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision of another torch; OSError: a C library
        root = name.partition(".")[0]
        raise InputError(
            f"{what} needs {root}, which cannot be imported ({error}): pip install 'fastrefine[{extra}]'"
        ) from error
