"""A run's images beside the same samples before refinement: those of a run of no steps, or rendered again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrefine.errors import InputError
from fastrefine.production.configuration import CALLS, Configuration, Shard
from fastrefine.production.named_code import Trust
from fastrefine.production.run_folder import MANIFEST, Folder
from fastrefine.production.worker import Worker

# What decides which latent an id has: of a manifest, and of its configuration.
_FACTS = ("generator_sha256", "conditions_sha256")
_SETTINGS = ("seed", "prior", "classes", "num_classes", "generate", "generator_kwargs")

# Of a configuration, what makes the samples of no steps.
_NETWORKS = ("pair", "generator", "discriminator", "prior", "at", "discriminator_output", "image_range", "conditions", *CALLS)
_DRAWN = ("num_slots", "precision", "seed", "ids", "classes", "num_classes")


class Samples(NamedTuple):
    """Images of a run in order of ids. pixels: (n, H, W, C) uint8. columns: (n,) each, see ``formats.COLUMNS``."""

    pixels: np.ndarray
    columns: dict[str, np.ndarray]


class BeforeAfter:
    """The first ``limit`` images of a run, and the same samples before refinement.

    baseline: the folder of a run with --max-steps 0, of which the images with the same ids are taken; None: the samples are
    rendered again with the networks that the run's manifest names. The rest as for ``Worker``. Raises InputError where a folder
    is no run, and where the two have no ids in common.
    """

    def __init__(
        self, run: Path, baseline: Path | None = None, limit: int | None = None, *, device: str | None = None,
        allow_pickle: bool = False, trust_code: bool = False,
    ):  # fmt: skip
        self.folder, self.raw = Folder.open(run), None if baseline is None else Folder.open(baseline)
        self.manifest = manifest_of(self.folder)
        trust = Trust(trust_code, file=run / MANIFEST)
        self._loading: dict[str, Any] = {"device": device, "allow_pickle": allow_pickle, "trust_code": trust}
        ids = _ids(self.folder)
        if self.raw is not None:
            ids = np.intersect1d(ids, _ids(self.raw))
            if not len(ids):
                raise InputError(f"{baseline} has no sample ids in common with {run}; wanted a baseline with equal --ids")
        self.ids = ids[:limit]

    @cached_property
    def unpaired(self) -> str:
        """Why an id does not mean the same sample before and after, in words; empty where it does."""
        if self.folder.configuration.select != "none":
            length = self.folder.configuration.chain_length
            return f"this run chooses one of {length} proposals for each image, so an image has no single image before it"
        if self.raw is None:
            return ""
        other = manifest_of(self.raw)
        settings, others = self.manifest["configuration"], other["configuration"]
        differing = [name for name in _FACTS if self.manifest.get(name) != other.get(name)]
        differing += [name for name in (*_SETTINGS, "select") if settings.get(name) != others.get(name)]
        if differing:
            return f"the baseline differs in {', '.join(differing)}, so equal ids are not equal samples"
        return ""

    @property
    def baseline_steps(self) -> int:
        """The most steps that the images "before" had: 0 where they are raw."""
        return 0 if self.raw is None else self.raw.configuration.max_steps or 0

    @cached_property
    def worker(self) -> Worker:
        """The networks of the run, which refine no more. Raises InputError where they cannot be had or are others by now."""
        c = self.folder.configuration
        loss = "wasserstein" if c.discriminator_output == "critic" else "nonsaturating"
        kept = {name: getattr(c, name) for name in (*_NETWORKS, *_DRAWN)}
        real = c.real if c.coupling == "freeze" else ""  # whose statistics are then the networks'
        sampler = {"name": "collaborative", "step_size": 0.1, "loss": loss}  # any one serves
        plain = Configuration(**kept, real=real, sampler=sampler, max_steps=0, stop="none")
        made = Worker(plain, **self._loading)
        for name in ("generator_sha256", "discriminator_sha256"):
            if made.facts[name] != self.manifest.get(name):
                raise InputError(f"the {name.partition('_')[0]} of {self.folder.path} has other weights now than in the run")
        return made

    @cached_property
    def every(self) -> dict[str, np.ndarray]:
        """The columns of all images of the run."""
        return self._read[1]

    @cached_property
    def after(self) -> Samples:
        """The images of the run."""
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[Samples, dict[str, np.ndarray]]:
        parts = list(_parts(self.folder, self.ids, all_columns=True))
        return _joined([part for part, _ in parts]), _columns([columns for _, columns in parts])

    @cached_property
    def before(self) -> Samples:
        """The images before. Raises InputError where they are not to be had."""
        if self.raw is not None:
            return _joined([part for part, _ in _parts(self.raw, self.ids)])
        if self.unpaired:
            raise InputError(f"{self.unpaired}; a baseline of raw images can be compared as a whole: pass --baseline")
        return self._rendered

    @cached_property
    def logits_before(self) -> np.ndarray:
        """(n,) logits before, under the run's discriminator. Raises InputError where they are not to be had."""
        if self.unpaired:
            raise InputError(self.unpaired)
        same = self.raw and manifest_of(self.raw).get("discriminator_sha256") == self.manifest.get("discriminator_sha256")
        return (self.before if same and not self.baseline_steps else self._rendered).columns["logits"]

    @cached_property
    def _rendered(self) -> Samples:
        """The samples again, with no steps."""
        try:
            worker = self.worker
        except InputError as error:
            raise InputError(
                f"the images before refinement cannot be rendered again ({error}); pass --baseline, a run with --max-steps 0"
            ) from error
        ranges = [list(group) for _, group in itertools.groupby(enumerate(self.ids.tolist()), lambda pair: pair[1] - pair[0])]
        runs = tuple(range(group[0][1], group[-1][1] + 1) for group in ranges)
        ((_, batch, _),) = worker.make([Shard(0, runs)])
        return Samples(batch.values(), batch.columns)


def manifest_of(folder: Folder) -> dict[str, Any]:
    """The manifest of a run."""
    return json.loads((folder.path / MANIFEST).read_text())


def _ids(folder: Folder) -> np.ndarray:
    return np.concatenate([np.array(shard.ids, np.int64) for shard in folder.shards()])


def _parts(folder: Folder, ids: np.ndarray, all_columns: bool = False) -> Iterator[tuple[Samples, dict[str, np.ndarray]]]:
    """Of shard after shard: the images with these ids, and all columns. Without ``all_columns`` other shards are not read."""
    for shard in folder.shards():
        wanted = np.isin(shard.ids, ids)
        if not wanted.any() and not all_columns:
            continue
        pixels, columns = folder.read(shard, images=True)
        yield Samples(pixels[wanted], {name: values[wanted] for name, values in columns.items()}), columns


def _joined(parts: list[Samples]) -> Samples:
    return Samples(np.concatenate([part.pixels for part in parts]), _columns([part.columns for part in parts]))


def _columns(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
