"""Reads checkpoint files of other people without running code in them, and says why a file is no checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrefine.errors import InputError

SHOWN = 5  # names in a message at most
# Words in the names that checkpoints give the networks of a GAN, and moving averages of weights.
ROLES = {
    "generator": {"g", "gen", "generator", "netg"},
    "discriminator": {"d", "dis", "disc", "discriminator", "netd", "critic"},
}  # fmt: skip
_ROLE_WORDS = set().union(*ROLES.values())
AVERAGED = {"ema", "avg", "average", "averaged", "shadow", "running"}
# What checkpoints hold besides tensors and cannot run code: activations in a configuration, numbers of numpy, parsed arguments.
SAFE: list[Any] = [
    nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.ELU, nn.GELU, nn.Tanh, argparse.Namespace, np.dtype, np.float64(0).dtype.__class__,
    np.float32(0).dtype.__class__, np.int64(0).dtype.__class__, np.float64(0).__reduce__()[0],
]  # fmt: skip


def read_weights(path: Path, key: str = "", *, allow_pickle: bool = False, role: str = "") -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch.save file, on the CPU.

    key: which one, where a checkpoint holds several, e.g. "g_ema" ("a.b" for one inside another). role: "generator" |
    "discriminator"; without a key the one whose name says so is taken, of a generator the moving average where there is one.
    allow_pickle: unpickle files that hold more than tensors; this runs any code in them. Without it they are refused.

    Raises InputError that says what is wrong: absent, empty, an HTML page, a Git LFS pointer, cut short, a pickle with code,
    or without the key.
    """
    return chosen(read_content(path, allow_pickle=allow_pickle), key, path, role)


def read_content(path: Path, *, allow_pickle: bool = False) -> Any:
    """What a .safetensors or torch.save file holds, as ``read_weights``."""
    _check_head(path)
    if path.suffix != ".safetensors":
        return _torch(path, allow_pickle)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is no complete safetensors file ({error}); fetch it again") from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str, role: str = "") -> None:
    """Load a state dict into ``module`` in place. role: as for ``read_weights``.

    Names in it may have a prefix, as wrappers add it ("module.", "_orig_mod.", "ema_model.", "generator."); names without the
    prefix, those of other networks, are left out. Names of torch's old spectral and weight norms (weight_orig, weight_g) stand
    for those of its parametrizations, and the other way round.

    Raises InputError with the first missing and unexpected names, or the shapes that differ.
    """
    own = module.state_dict()
    found = dict(weights)
    if not own.keys() & found.keys():
        prefix = _prefix(own, found, source, role)
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
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


def _prefix(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str, role: str) -> str:
    """What stands before the module's own names in a file; "" where nothing does. InputError where it may be one or another."""
    names = list(own)
    probes = {other for name in names[:: max(len(names) // 16, 1)] for other in (name, *_other_names(name))}
    counts = Counter(name.removesuffix(probe) for probe in probes for name in found if name.endswith(f".{probe}"))
    most = _preferred([prefix for prefix, count in counts.items() if count == max(counts.values())], role)
    if len(most) > 1:
        raise InputError(
            f"{source} holds the names of this network more than once, behind {', '.join(most[:SHOWN])}: pass one file each"
        )
    return most[0] if most else ""


def _words(name: str) -> set[str]:
    """The words of a name in lower case: "netG_ema" has net, g and ema."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _preferred(names: Iterable[str], role: str) -> list[str]:
    """Of names that differ, those of the role; of a generator the moving averages, of anything else what is none."""
    names = list(names)
    if len(names) < 2 or not role:
        return names
    mine, others = ROLES[role], _ROLE_WORDS - ROLES[role]
    names = [name for name in names if _words(name) & mine and not _words(name) & others] or [
        name for name in names if not _words(name) & (mine | others)
    ]
    return [name for name in names if bool(_words(name) & AVERAGED) == (role == "generator")] or names


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
    if not os.path.isfile(path):  # which is False too of a name that no file can have
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
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
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


def states(content: Any, name: str = "") -> dict[str, dict[str, Tensor]]:
    """Every state dict in what a file holds, by its key; those of optimizers are left out."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return {name: dict(content)}
    inner = ((f"{name}.{key}".lstrip("."), value) for key, value in content.items() if "optim" not in key.lower())
    return {key: state for own, value in inner for key, state in states(value, own).items()}


def chosen(content: Any, key: str, path: Path, role: str = "") -> dict[str, Tensor]:
    """The state dict at ``key`` of a file's content; without a key the only one in it, or that of the role."""
    for part in key.split(".") if key and not (isinstance(content, Mapping) and key in content) else [key] * bool(key):
        if not isinstance(content, Mapping) or part not in content:
            names = list(content) if isinstance(content, Mapping) else []
            raise InputError(f"{path} has no {key!r}; it holds {', '.join(map(str, names[:12])) or type(content).__name__}")
        content = content[part]
    found = states(content)
    names = _preferred(found, role)
    if len(names) == 1:
        state = found[names[0]]
        for name, other in found.items():  # an average of parameters has no buffers of its own
            if (_words(names[0]) - _words(name)) & AVERAGED and _words(names[0]) & _ROLE_WORDS == _words(name) & _ROLE_WORDS:
                state = {**other, **state} if other.keys() > state.keys() else state
        return state
    choice = f"one of {', '.join(list(found)[:12])}" if found else "the name of a state dict"
    raise InputError(f"{path} holds {type(content).__name__}, not one state dict; pass its key: {choice}")


def _first(names: list[str]) -> str:
    return f" ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})" if names else ""
