"""Networks that were trained here and are wanted again: files in the user's cache, which may be deleted."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

log = logging.getLogger(__name__)


def folder() -> Path:
    """$XDG_CACHE_HOME/fastrefine, or ~/.cache/fastrefine. Raises RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastrefine"


def load(network: nn.Module, name: str) -> bool:
    """Put the weights that were saved under ``name`` into the network, in eval mode; whether there were any that fit."""
    try:
        network.load_state_dict(load_file(folder() / f"{name}.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        log.debug("%s is not read from the cache: %s", name, error)
        return False
    network.eval()
    return True


def save(network: nn.Module, name: str) -> None:
    """Keep the weights of the network under ``name``; nothing where the folder cannot be written."""
    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in network.state_dict().items()}
    with contextlib.suppress(OSError, RuntimeError, SafetensorError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder(), suffix=".part") as made:
            save_file(state, Path(made) / name)
            os.replace(Path(made) / name, folder() / f"{name}.safetensors")
