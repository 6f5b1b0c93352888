"""Reads checkpoint files of other people without running code in them, and says why a file is no checkpoint."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrefine.errors import InputError

PREFIXES = ("module.", "_orig_mod.", "generator.", "discriminator.", "netG.", "netD.")  # that wrappers add to names
SHOWN = 5  # names in a message at most


def read_weights(path: Path, key: str = "", *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch.save file, on the CPU.

    key: which one, where a checkpoint holds several, e.g. "g_ema" ("a.b" for one inside another). allow_pickle: unpickle
    files that hold more than tensors; this runs any code in them. Without it they are refused.

    Raises InputError that says what is wrong: absent, empty, an HTML page, a Git LFS pointer, cut short, a pickle with code,
    or without the key.
    """
    _check_head(path)
    if path.suffix != ".safetensors":
        return _chosen(_torch(path, allow_pickle), key, path)
    try:
        return _chosen(load_file(path), key, path)
    except SafetensorError as error:
        raise InputError(f"{path} is no complete safetensors file ({error}); fetch it again") from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into ``module`` in place; PREFIXES that all names share are removed.

    Names of torch's old spectral and weight norms (weight_orig, weight_g) stand for those of its parametrizations, and the
    other way round.

    Raises InputError with the first missing and unexpected names, or the shapes that differ.
    """
    own = module.state_dict()
    found = dict(weights)
    while not own.keys() & found.keys():
        prefix = next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if lacking := own.keys() - found.keys():
        known = {name: other for name in lacking for other in _other_names(name) if other in found and other not in own}
        found = {n: t for n, t in found.items() if n not in known.values()} | {n: found[other] for n, other in known.items()}
    missing, unexpected = [n for n in own if n not in found], [n for n in found if n not in own]
    if missing or unexpected:
        raise InputError(
            f"{source} does not fit {type(module).__name__}: {len(missing)} missing{_first(missing)}, {len(unexpected)} "
            f"unexpected{_first(unexpected)}; is it the other network's file, or of another size?"
        )
    shapes = [f"{n} {tuple(found[n].shape)}, wanted {tuple(t.shape)}" for n, t in own.items() if found[n].shape != t.shape]
    if shapes:
        raise InputError(f"{source} does not fit {type(module).__name__}: {'; '.join(shapes[:SHOWN])}")
    module.load_state_dict(found)


# Names within a module of the same tensor, as hooks and as parametrizations of a weight W have it.
_NORMS = (
    ("W_orig", "parametrizations.W.original"), ("W_u", "parametrizations.W.0._u"), ("W_v", "parametrizations.W.0._v"),
    ("W_g", "parametrizations.W.original0"), ("W_v", "parametrizations.W.original1"),
)  # fmt: skip


def _other_names(name: str) -> list[str]:
    """The names that a tensor of a spectral or weight norm may have in a file of another version of torch."""
    found = []
    for pair in _NORMS:
        for one, other in (pair, pair[::-1]):
            match = re.fullmatch(r"(.*\.|)" + re.escape(one).replace("W", r"(\w+?)"), name)
            if match is not None:
                found.append(match[1] + other.replace("W", match[2]))
    return found


def digest(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        x = tensor.detach().cpu().contiguous()
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return total.hexdigest()


def _check_head(path: Path) -> None:
    """Raise InputError where the first bytes show that this is no file of weights."""
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


def _torch(path: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, ImportError
    ) as error:  # fmt: skip
        refused = not allow_pickle and isinstance(error, pickle.UnpicklingError)
        if refused and "weights only" in str(error).lower().replace("_", " "):
            raise InputError(
                f"{path} is a pickle that holds more than tensors, and loading it could run code: nothing was executed. "
                "Convert it to safetensors, or pass --allow-pickle if you trust where it comes from"
            ) from error
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        raise InputError(f"{path} is no torch.save file, or cut short ({why}); wanted one, or .safetensors") from error


def _chosen(content: Any, key: str, path: Path) -> dict[str, Tensor]:
    """The state dict at ``key`` of a file's content; without a key the only one in it."""
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


def _first(names: list[str]) -> str:
    return f" ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})" if names else ""
