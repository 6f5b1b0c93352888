"""What a run leaves behind as it goes: each part of it is kept when it is done, so a cut run loses nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastrefine.datasets import Images
from fastrefine.demo.gan import Pair, Trainer, build
from fastrefine.demo.judge import Judge, trained_classifier
from fastrefine.errors import InputError
from fastrefine.models.digits import Classifier

SAVE_EVERY = 60.0  # seconds between states that a cut training is taken up from
M = TypeVar("M", bound=nn.Module)


class Cells:
    """A folder of finished parts of one experiment under one recipe, each made once and read afterwards.

    A file gets its name when it is complete. recipe: the dataclass that says what the parts are made of; a folder that
    holds parts of another recipe is refused with InputError, for the two would be mixed. What differs between the parts
    (seed, checkpoint, row) belongs into their keys.
    """

    def __init__(self, folder: Path, recipe: Any):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(recipe), sort_keys=True, default=str)
        path = folder / "recipe.json"
        if not path.exists():
            self._write(path, lambda part: part.write_text(text))
        elif path.read_text() != text:
            raise InputError(
                f"{folder} holds parts of another recipe; wanted an --outdir of this one's own "
                f"(recipes {_short(path.read_text())} there, {_short(text)} here)"
            )

    def row(self, key: str, make: Callable[[], Any]) -> Any:
        """The JSON value of a key."""
        path = self._path(key, ".json")
        if not path.exists():
            value = make()
            self._write(path, lambda part: part.write_text(json.dumps(value)))
        return json.loads(path.read_text())

    def network(self, key: str, empty: M, make: Callable[[], nn.Module]) -> M:
        """The network of a key, in eval mode: its weights are loaded into ``empty``."""
        empty.load_state_dict(self.tensors(key, lambda: make().state_dict()))
        return empty.eval()

    def tensors(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The named tensors of a key."""
        path = self._path(key, ".safetensors")
        if not path.exists():
            self.put(key, make())
        return load_file(path)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep named tensors under a key, in place of those that were there."""
        own = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}  # tied weights share memory
        self._write(self._path(key, ".safetensors"), lambda part: save_file(own, part))

    def has(self, key: str) -> bool:
        """Whether there are tensors under a key."""
        return self._path(key, ".safetensors").exists()

    def _path(self, key: str, suffix: str) -> Path:
        plain = "".join(c if c.isalnum() or c in "-._+" else "_" for c in key)
        if plain != key:  # two keys must not meet in one name
            plain += "-" + _short(key)
        return self.folder / (plain + suffix)

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        part = path.with_name(path.name + ".part")
        write(part)
        part.replace(path)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def trained_judge(cells: Cells, make: Callable[[], Classifier], data: Images, *, seed: int, **training: Any) -> Judge:
    """A judge whose classifier is from ``cells``, or trained now; training: arguments of ``train_classifier``."""
    return Judge(
        cells.network(f"classifier-{seed}", build(make, seed), lambda: trained_classifier(make, data, seed=seed, **training)),
        data,
    )


def checkpoints(cells: Cells, name: str, make: Callable[[], Trainer], steps: Sequence[int]) -> dict[int, Pair]:
    """The pair after each of ``steps``, in eval mode: from ``cells``, or trained now, from where a cut training stood.

    make: the trainer at step 0; called once more for each pair, whose weights are loaded into its networks.
    """
    missing = [k for k in sorted(steps) if not cells.has(f"{name}-{k}")]
    state = f"{name}-state"
    if missing:
        trainer = make()
        if cells.has(state):
            trainer.load(cells.tensors(state, dict))
        if trainer.step > missing[0]:  # a checkpoint was added: begin again
            trainer = make()
        saved = time.monotonic()
        with tqdm(total=missing[-1], initial=trainer.step, desc=name, disable=None) as bar:
            for target in missing:
                for _ in trainer.advance(target):
                    bar.update()
                    if time.monotonic() - saved > SAVE_EVERY:
                        cells.put(state, trainer.state())
                        saved = time.monotonic()
                pair = nn.ModuleList([trainer.generator, trainer.discriminator])
                cells.put(f"{name}-{target}", pair.state_dict())
                cells.put(state, trainer.state())
    return {k: _loaded(cells, f"{name}-{k}", make()) for k in steps}


def _loaded(cells: Cells, key: str, trainer: Trainer) -> Pair:
    pair = nn.ModuleList([trainer.generator, trainer.discriminator])
    pair.load_state_dict(cells.tensors(key, dict))
    return trainer.generator.eval(), trainer.discriminator.eval()
