"""Checkpoint files of other people: read without running any code in them, refused with the reason where they are none."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.errors import InputError

PREFIXES = ("module.", "_orig_mod.", "generator.", "discriminator.", "netG.", "netD.")
SHOWN = 5


def read_weights(path: Path, key: str = "", *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch.save file, on the CPU.

    key: where a checkpoint holds several, e.g. "g_ema" ("a.b" for one inside another). allow_pickle: unpickle files that
    hold more than tensors, which runs whatever code they bring; otherwise they are refused.

    Raises InputError that says what the file is instead: absent, empty, an HTML page, a Git LFS pointer, cut short, a
    pickle with code, or without the key.
    """
    _looks_like_weights(path)
    if path.suffix == ".safetensors":
        return _chosen(_safetensors(path), key, path)
    return _chosen(_torch(path, allow_pickle), key, path)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into ``module`` in place; prefixes that wrappers add to every name are taken off.

    Raises InputError with the first missing and unexpected names, or the shapes that differ.
    """
    own = module.state_dict()
    found = _without_prefix(dict(weights), set(own))
    missing, unexpected = [n for n in own if n not in found], [n for n in found if n not in own]
    if missing or unexpected:
        raise InputError(
            f"{source} does not fit {type(module).__name__}: {len(missing)} missing{_first(missing)}, {len(unexpected)} "
            f"unexpected{_first(unexpected)}; is it the other network's file, or of another size?"
        )
    shapes = [
        f"{n} {tuple(found[n].shape)}, wanted {tuple(t.shape)}" for n, t in own.items() if found[n].shape != t.shape
    ]  # fmt: skip
    if shapes:
        raise InputError(f"{source} does not fit {type(module).__name__}: {'; '.join(shapes[:SHOWN])}")
    module.load_state_dict(found)


def digest(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of parameters and buffers: what the output depends on."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        x = tensor.detach().cpu().contiguous()
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return total.hexdigest()


def _looks_like_weights(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is not there; wanted a .safetensors or torch.save file")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise InputError(f"{path} is empty (0 bytes); fetch it again")
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is an HTML page, not weights; the download gave an error or a log-in page")


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is no complete safetensors file ({error}); fetch it again") from error


def _torch(path: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise InputError(f"{path} cannot be unpickled ({_line(error)}); fetch it again") from error
        if "weights only" not in str(error).lower() and "weights_only" not in str(error):
            raise InputError(f"{path} is no torch.save file, or cut short ({_line(error)})") from error
        raise InputError(
            f"{path} is a pickle that holds more than tensors, and loading it could run code: nothing was executed. "
            "Convert it to safetensors, or pass --allow-pickle if you trust where it comes from"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, ImportError) as error:
        wanted = "wanted one, or .safetensors"
        raise InputError(f"{path} is no torch.save file, or cut short ({type(error).__name__}); {wanted}") from error


def _chosen(content: Any, key: str, path: Path) -> dict[str, Tensor]:
    for part in key.split(".") if key and not (isinstance(content, Mapping) and key in content) else [key] * bool(key):
        if not isinstance(content, Mapping) or part not in content:
            names = list(content) if isinstance(content, Mapping) else []
            raise InputError(f"{path} has no {key!r}; it holds {', '.join(map(str, names[:12])) or type(content).__name__}")
        content = content[part]
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return {str(name): tensor for name, tensor in content.items()}
    inner = [k for k, v in content.items() if isinstance(v, Mapping) and v] if isinstance(content, Mapping) else []
    if len(inner) == 1 and not key:
        return _chosen(content, str(inner[0]), path)
    choice = f"one of {', '.join(map(str, inner[:12]))}" if inner else "the name of a state dict"
    raise InputError(f"{path} holds {type(content).__name__}, not one state dict; pass its key: {choice}")


def _without_prefix(weights: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    while not wanted & set(weights):
        prefix = next((p for p in PREFIXES if weights and all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name[len(prefix) :]: tensor for name, tensor in weights.items()}
    return weights


def _first(names: list[str]) -> str:
    return f" ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})" if names else ""


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]
