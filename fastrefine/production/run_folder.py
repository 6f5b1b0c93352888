"""The folder of a run: its manifest, its shards and their markers. Tells done, damaged and foreign files apart."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrefine.errors import InputError
from fastrefine.production import formats
from fastrefine.production.configuration import Configuration, Shard, contains, renamed, shards, without_paths
from fastrefine.progress import over

MANIFEST = "manifest.json"
_PLAIN = Configuration(pair="digits").to_json() | {"pair": ""}


class Folder:
    """A run's folder: one configuration, and a marker beside every finished shard.

    A marker holds the shard's count and sha256 and the run's identity; a shard counts as done where all three are right. Files
    that the run did not write are never changed.
    """

    def __init__(self, path: Path, configuration: Configuration, identity: str):
        self.path, self.configuration, self.identity = path, configuration, identity

    @classmethod
    def claim(cls, path: Path, configuration: Configuration, facts: dict[str, Any]) -> Folder:
        """The folder of this configuration, made if need be; facts: what else the identity depends on.

        A run grows where the configuration has all of its ids and more, and is the same otherwise. Raises InputError where the
        folder has a manifest of another configuration, or has none but holds files with names that this run would use.
        """
        path.mkdir(parents=True, exist_ok=True)
        identity = configuration.identity(facts)
        manifest = {"fastrefine": 1, "identity": identity, "configuration": configuration.to_json(), **facts}
        text = json.dumps(manifest, indent=1) + "\n"
        target = path / MANIFEST
        taken = sorted(cls(path, configuration, identity).names() & {p.name for p in path.iterdir()} - {MANIFEST})
        if taken and not target.exists():  # read after the files' names: a worker writes its manifest before them
            raise InputError(
                f"{path} has no {MANIFEST}, but holds {taken[0]}, which the run would write over; wanted a new or empty "
                "--outdir, or that file elsewhere"
            )
        with contextlib.suppress(FileExistsError):  # another worker was first
            if not target.exists():
                formats.publish(target, text.encode(), new=True)
        there = _read_manifest(path)
        differing = _differences(there, json.loads(text))
        if differing == ["ids"]:
            known = Configuration.from_json(there["configuration"]).ids
            if not contains(configuration.ids, known):
                raise InputError(
                    f"{path} holds the run of the images {known}, and {configuration.ids} leaves some of them out; wanted all "
                    "of them and more, or another --outdir"
                )
            _write(path, there, configuration)
        elif differing:
            raise InputError(
                f"{path} belongs to a run of another configuration (differs in {', '.join(differing)}); wanted a new "
                "--outdir, or the flags of that run"
            )
        return cls(path, configuration, there["identity"])

    @classmethod
    def open(cls, path: Path) -> Folder:
        """The folder of a run that was begun. Raises InputError where there is none."""
        there = _read_manifest(path)
        return cls(path, Configuration.from_json(there["configuration"]), there["identity"])

    def shards(self) -> list[Shard]:
        """All shards of the run."""
        return list(shards(self.configuration))

    def names(self) -> set[str]:
        """The names of all files of the run."""
        return {MANIFEST}.union(*({self.file(shard).name, self.marker(shard).name} for shard in self.shards()))

    def share(self, worker: int, workers: int) -> list[Shard]:
        """The shards of one worker of several: consecutive ones, equally many for each as far as the number allows."""
        every = self.shards()
        return every[len(every) * worker // workers : len(every) * (worker + 1) // workers]

    def file(self, shard: Shard) -> Path:
        """Where a shard is."""
        return self.path / formats.name_of(self.configuration.format, shard.index)

    def marker(self, shard: Shard) -> Path:
        """Where its marker is."""
        return self.path / f"{formats.name_of(self.configuration.format, shard.index)}.done.json"

    def write(self, shard: Shard, batch: formats.Batch, facts: dict[str, Any]) -> float:
        """Write the shard, then its marker; returns the seconds that it took."""
        began, path = time.perf_counter(), self.file(shard)
        formats.write(self.configuration.format, path, batch, self.configuration.sample_rate)
        marker = {"identity": self.identity, "count": shard.count, "sha256": formats.digest(path), **facts}
        formats.publish(self.marker(shard), (json.dumps(marker) + "\n").encode())
        return time.perf_counter() - began

    def record(self, summarised: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Write what the run did, "summary" of the manifest, and return it. The last of several workers sees every shard."""
        while True:
            seen, summary, there = self._markers(), summarised(), _read_manifest(self.path)
            known = Configuration.from_json(there["configuration"]).ids
            if not contains(self.configuration.ids, known):  # it has grown meanwhile
                return summary
            _write(self.path, there, self.configuration, summary)
            now = self._markers()
            if now == seen or len(now) < len(self.shards()):  # who makes the missing ones writes it again
                return summary

    def _markers(self) -> dict[str, int]:
        with os.scandir(self.path) as entries:
            return {e.name: e.stat().st_mtime_ns for e in entries if e.name.endswith(".done.json")}

    def done(self) -> Iterator[dict[str, Any]]:
        """The markers of the shards that are done by their word; the shards themselves are not read."""
        for shard in self.shards():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                facts = self.facts(shard)
                if (facts["identity"], facts["count"]) == (self.identity, shard.count):
                    yield facts

    def kept(self, shard: Shard) -> tuple[formats.Batch, dict[str, Any]] | None:
        """Images that are there of a shard to which a run that grows adds others, and the content of their marker."""
        kind, path = self.configuration.format, self.file(shard)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = self.facts(shard)
            if facts["identity"] == self.identity and "tally" in facts and formats.digest(path) == facts["sha256"]:
                batch = formats.stored(kind, path, self.configuration.value_range)
                if set(batch.columns["ids"].tolist()) < set(shard.ids):
                    return batch, facts
        return None

    def problem(self, shard: Shard) -> str:
        """Why a shard does not count as done; empty if it does."""
        path, marker = self.file(shard), self.marker(shard)
        if not marker.exists():
            return "no marker" if path.exists() else "missing"
        try:
            facts = self.facts(shard)
            identity, count, sha256 = facts["identity"], facts["count"], facts["sha256"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"its marker cannot be read ({error})"
        if identity != self.identity:
            return "of another configuration"
        if not path.exists():
            return "gone, though its marker is there"
        if count != shard.count:
            return f"holds {count} images, wanted {shard.count}"
        return "" if formats.digest(path) == sha256 else "its sha256 is not its marker's: cut short or changed"

    def check(self, shard: Shard) -> None:
        """Raise InputError unless the shard is done."""
        problem = self.problem(shard)
        if problem:
            raise InputError(f"{self.file(shard)}: {problem}; the command of the run, given again, makes it anew")

    def facts(self, shard: Shard) -> dict[str, Any]:
        """The content of its marker."""
        return _json(self.marker(shard))

    def parts(self, *, images: bool = False) -> Iterator[formats.Part]:
        """(samples, columns) of shard after shard, as ``read`` gives them. Raises InputError at the first that is not done."""
        size: tuple[int, ...] = ()
        for shard in self.shards():
            values, columns = self.read(shard, images=images)
            if values.shape[1:] != (size := size or values.shape[1:]):
                raise InputError(f"{self.file(shard)} holds samples of {values.shape[1:]}, the shards before it of {size}")
            yield values, columns

    def read(self, shard: Shard, *, images: bool = False) -> formats.Part:
        """(pixels (N, H, W, C) uint8, columns) of a shard, or (N, ...) float32 instead where its samples are no images.

        images: no others will do. Raises InputError where the shard is not done, or holds something else.
        """
        self.check(shard)
        values, columns = formats.read(self.configuration.format, self.file(shard), self.configuration.value_range)
        known = (values.dtype == np.uint8 and values.ndim == 4) or (values.dtype == np.float32 and values.ndim > 1)
        lists = all(x.shape == (shard.count,) and x.dtype.kind in "biuf" for x in columns.values())
        if not known or len(values) != shard.count or not lists:
            shapes = {"samples": values.shape, **{name: x.shape for name, x in columns.items()}}
            raise InputError(
                f"{self.file(shard)} holds arrays of shapes {shapes}; wanted {shard.count} samples, a figure for each"
            )
        if "ids" not in columns or columns["ids"].tolist() != shard.ids:
            raise InputError(f"{self.file(shard)} holds other sample ids than its place in the run says")
        if images and values.ndim != 4:
            raise InputError(
                f"{self.path} is a run of samples of shape {values.shape[1:]}; this is for images: `fastrefine merge` makes "
                "one file of other samples"
            )
        return values, columns


@dataclass(frozen=True)
class Verdict:
    """What ``verify`` found. total: shards of the run; images: in shards that are done. damaged: (file, why).

    missing: files that are not there. foreign: names of files that are not the run's. leftovers: half-written files of the
    run, of workers that were killed or are writing now.
    """

    total: int
    images: int
    damaged: list[tuple[str, str]]
    missing: list[str]
    foreign: list[str]
    leftovers: list[str]

    @property
    def complete(self) -> bool:
        """Whether every shard is done."""
        return not self.damaged and not self.missing


def verify(path: Path) -> Verdict:
    """Check every shard against its marker. Raises InputError where there is no run."""
    folder = Folder.open(path)
    every, own = folder.shards(), folder.names()
    problems = [folder.problem(shard) for shard in every]
    files = [(folder.file(shard).name, problem) for shard, problem in zip(every, problems, strict=True) if problem]
    others = sorted(p.name for p in path.iterdir() if p.name not in own)
    return Verdict(
        total=len(every),
        images=sum(shard.count for shard, problem in zip(every, problems, strict=True) if not problem),
        damaged=[(name, problem) for name, problem in files if problem != "missing"],
        missing=[name for name, problem in files if problem == "missing"],
        foreign=[name for name in others if formats.whole_of(name) not in own],
        leftovers=[name for name in others if formats.whole_of(name) in own],
    )


def merge(path: Path, output: Path, *, progress: bool | None = False) -> int:
    """Join the run's samples, and what is known of each, in one file or folder; returns how many.

    output: .npz (of images ADM's); of images also .tar (webdataset), of tables .parquet; else a folder, of PNG files, or of
    WAV files where that is the run's format. progress: as for ``ProgressBar``. Reads shard by shard. Raises InputError where a
    shard is not done or ``output`` cannot hold such samples, before anything is written.
    """
    folder = Folder.open(path)
    if output.suffix not in (".npz", ".tar", ".parquet", ""):
        raise InputError(f"output is {output}; wanted a name that ends in .npz, .tar or .parquet, or a folder of files")
    if not output.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is {'not empty' if output.is_dir() else 'a file'}; wanted a new folder")
    for shard in folder.shards():
        folder.check(shard)
    count = sum(shard.count for shard in folder.shards())
    parts = over(folder.parts(), count, "merging", "samples", progress, lambda part: len(part[0]))
    first = next(parts)
    shape = first[0].shape[1:] if first[0].dtype != np.uint8 else (first[0].shape[3], *first[0].shape[1:3])
    single = "wav" if folder.configuration.format == "wav" else "png"
    formats.check_shape({".npz": "npz", ".tar": "wds", ".parquet": "parquet"}.get(output.suffix, single), shape)
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = itertools.chain([first], parts)
    if output.suffix == ".npz":
        formats.merge_npz(output, count, parts)
    elif output.suffix == ".tar":
        formats.merge_tar(output, parts)
    elif output.suffix == ".parquet":
        formats.merge_parquet(output, parts)
    else:
        formats.merge_folder(single, output, parts, folder.configuration.sample_rate)
    return count


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("brackets within brackets without end") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    target = path / MANIFEST
    try:
        found = _json(target)
        found["identity"], found["configuration"].items()
        return found
    except FileNotFoundError as error:
        raise InputError(f"{path} has no {MANIFEST}; wanted the --outdir of `fastrefine refine`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{target} is no manifest of a run ({error}); remove it if it is yours to remove") from error


def _write(path: Path, there: dict[str, Any], configuration: Configuration, summary: dict[str, Any] | None = None) -> None:
    """Write the manifest anew, with the ids of ``configuration`` and a summary, if there is one; the rest of it stays."""
    kept = {name: value for name, value in there.items() if name != "summary"}
    kept["configuration"] = {**renamed(there["configuration"]), "ids": configuration.ids}
    text = json.dumps(kept | ({} if summary is None else {"summary": summary}), indent=1) + "\n"
    formats.publish(path / MANIFEST, text.encode())


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    settings = [_PLAIN | renamed(m["configuration"]) for m in (a, b)]  # older manifests lack what is new since
    mine, other = ({**m, "configuration": None, **without_paths(own)} for m, own in zip((a, b), settings, strict=True))
    keys = dict.fromkeys([*mine, *other])
    return [key for key in keys if mine.get(key) != other.get(key) and key not in ("identity", "summary")]
