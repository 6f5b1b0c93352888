"""Saved pairs and data sets of the Hugging Face Hub. What comes from there is data: it runs no code without trust."""

from __future__ import annotations

import glob
import json
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from fastrefine.errors import InputError
from fastrefine.extras import package
from fastrefine.production import sources
from fastrefine.production.named_code import check_inside

NAME = re.compile(r"(?!.*\.\.)[\w.-]+/[\w.-]+(@[\w./-]+)?")  # user/name, or user/name@revision
FILES = ["config.json", "*.safetensors"]


def snapshot(name: str) -> Path:
    """The local folder of a repository "user/name" or "user/name@revision", fetched if need be. Raises InputError."""
    repository, _, revision = name.partition("@")
    hub = _hub(f"{name} is no folder here, and the Hub")
    try:
        return Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} is no folder here, and no repository of the Hub ({type(error).__name__}: {first})") from error


def dataset(name: str, part: str) -> Path:
    """The local folder of a data set "user/name" or "user/name@revision", with the files of one part of it: ``of_part``.

    Only pictures, sound, .parquet and .tar are fetched. Raises InputError.
    """
    repository, _, revision = name.partition("@")
    given: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
    hub = _hub(f"{name} is not there, and the Hub")
    try:
        names = hub.HfApi().list_repo_files(repository, **given)
        files = sources.of_part(sources.files_of(map(PurePosixPath, names)), PurePosixPath(), part)
        if not files:
            raise InputError("it has no pictures, sound, .parquet or .tar")
        return Path(hub.snapshot_download(repository, allow_patterns=[glob.escape(str(file)) for file in files], **given))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} is not there, and no data set of the Hub ({type(error).__name__}: {first})") from error


def push_pair(folder: str | Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Write a saved pair and a model card into the repository "user/name" of the Hugging Face Hub, made if it is not there.

    private: of a new repository. token: of the Hub, None for the one you are logged in with. Only config.json, the weights
    that it names and README.md are written; a README.md in the folder is the model card. Paths of this machine are left out.
    Returns the address. Needs huggingface_hub. Raises InputError where the folder is no saved pair, or the Hub refuses.

    Example: ``fr.push_pair("pair", "me/my-gan")``, then anywhere ``fr.load_pair("me/my-gan")``
    """
    folder, hub = Path(folder), _hub("the Hub")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"name is {name!r}; wanted user/name")
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        weights = [str(config[role]["weights"]) for role in ("generator", "discriminator")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} is no saved pair ({type(error).__name__}: {error}); wanted a folder of save_pair"
        ) from error
    with tempfile.TemporaryDirectory() as made:
        for each in dict.fromkeys(weights):
            check_inside(each, file, folder)
            shutil.copyfile(folder / each, Path(made) / Path(each).name)
        config.pop("checkout", None)
        (Path(made) / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        own = folder / "README.md"
        check_inside(own.name, file, folder)
        (Path(made) / "README.md").write_text(own.read_text() if own.is_file() else card(config, name))
        try:
            hub.create_repo(name, private=private, exist_ok=True, token=token)
            hub.upload_folder(repo_id=name, folder_path=made, token=token, commit_message="A pair of fastrefine")
        except Exception as error:
            raise InputError(f"the Hub did not take {name} ({type(error).__name__}: {str(error).strip()[:300]})") from error
    return f"https://huggingface.co/{name}"


def card(config: dict[str, Any], name: str) -> str:
    """A model card: what the pair is made of and how it is used."""
    g, d = (config[role]["code"] for role in ("generator", "discriminator"))
    own = all(code.startswith("fastrefine.") for code in (g, d))
    needs = (
        "" if own else f"\nThe classes `{g}` and `{d}` must be importable: install their package, or put it on `PYTHONPATH`.\n"
    )
    low, high = config.get("image_range", (-1, 1))
    return f"""---
library_name: fastrefine
tags:
- gan
- image-generation
---

# {name.partition("/")[2]}

A generator and its discriminator, for fastrefine, which refines the generator's samples
with the discriminator's gradient.
{needs}
```python
import fastrefine as fr

pair = fr.load_pair("{name}")
images = fr.Refiner.from_pair(pair).sample(16, seed=0).images
```

| | |
|---|---|
| generator | `{g}` |
| discriminator | `{d}`, its output is a {config.get("discriminator_output", "logit")} |
| latents | `{json.dumps(config["prior"])}` |
| refined at | `{config.get("at", "input")}` |
| images | {low:g} to {high:g} |
| classes | {config.get("num_classes") or "none"} |

Loading it runs no code of this repository.
"""


def _hub(what: str) -> Any:
    return package("huggingface_hub", "hub", what)
