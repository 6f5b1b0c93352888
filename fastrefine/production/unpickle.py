"""Unpickles a file, which runs any code in it, in a process of its own: python -m fastrefine.production.unpickle FILE FOLDER.

Into FOLDER go the tensors of every network in it (.safetensors) and networks.json, what made them. Nothing else comes out.
"""

from __future__ import annotations

import inspect
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastrefine.production.weights_file import states

NETWORKS = "networks.json"
TORCH_FILE = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zip files


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # tensors of a GPU
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        return super().find_class(module, name)


def content_of(file: Path) -> Any:
    """What a pickle or a torch.save file holds."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            content = _Unpickler(opened).load()
        if not (isinstance(content, int) and content == TORCH_FILE):
            return content
    return torch.load(file, map_location="cpu", weights_only=False)


def networks(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(key, module or state dict) of everything that holds weights."""
    if isinstance(content, nn.Module) or name in states(content, name):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from networks(value, f"{name}.{key}".lstrip("."))


def described(network: Any) -> dict[str, Any]:
    """What made a module, as JSON values: its class, and what NVlabs' persistent classes keep: source text and arguments."""
    if not isinstance(network, nn.Module):
        return {}
    kind = type(network)
    name, source = getattr(kind, "_orig_class_name", kind.__qualname__), getattr(kind, "_orig_module_src", "")
    found = {"class": name, "module": kind.__module__, "source": source}
    positional, named = getattr(network, "_init_args", ()), getattr(network, "_init_kwargs", {})
    own = kind.__mro__[1] if source else kind
    names = list(inspect.signature(own).parameters)
    try:
        arguments = json.loads(json.dumps({**dict(zip(names, positional, strict=False)), **named}, default=_plain))
    except (TypeError, ValueError) as error:
        return {**found, "problem": f"its arguments are no JSON ({error})"}
    return {**found, "arguments": arguments}


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def main(file: str, folder: str) -> None:
    """Read ``file`` and write what it holds into ``folder``."""
    found = []
    for number, (key, network) in enumerate(networks(content_of(Path(file)))):
        (state,) = states(network).values() or [{}]
        name = f"{number}.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, Path(folder) / name)
        found.append({"key": key, "weights": name, **described(network)})
    (Path(folder) / NETWORKS).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
