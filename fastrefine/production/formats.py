"""Files of images: a shard as .npz, PNG folder, .tar (webdataset) or .safetensors; equal images give equal bytes.

Pixels are floor(127.5 x + 128), clipped to 0..255, of x in [-1, 1]; .safetensors keeps the float32 values.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import numpy as safetensors
from torch import Tensor

from fastrefine.errors import InputError
from fastrefine.pictures import levels, png

PER_FOLDER = 1000  # PNG files
COLUMNS = ("ids", "labels", "logits", "steps", "status", "selected")
SUFFIX = {"npz": ".npz", "png": "", "wds": ".tar", "safetensors": ".safetensors"}
Part = tuple[np.ndarray, dict[str, np.ndarray]]  # pixels (N, H, W, C) uint8, columns


@dataclass(frozen=True)
class Batch:
    """The images of a shard, with what is known of each.

    images: (N, C, H, W) float32 in [low, high] of ``image_range``. columns: some of COLUMNS, each (N,).
    """

    images: Tensor
    columns: dict[str, Any]
    image_range: tuple[float, float]

    def pixels(self) -> np.ndarray:
        """(N, H, W, C) uint8."""
        return levels(self.images, self.image_range)


def name_of(kind: str, index: int) -> str:
    """The name of shard ``index`` in its folder."""
    return f"{index:06d}" if kind == "png" else f"shard-{index:06d}{SUFFIX[kind]}"


def check_channels(kind: str, channels: int) -> None:
    """Raise InputError where the format cannot hold images of so many channels."""
    if kind in ("png", "wds") and channels not in (1, 3):
        raise InputError(f"the {kind} format holds PNG files of 1 or 3 channels, got {channels}; use npz or safetensors")


def write(kind: str, path: Path, batch: Batch) -> None:
    """Write a shard; it gets its name when it is complete and on the disk."""
    columns, content = batch.columns, io.BytesIO()
    if kind == "png":
        files = {f"{number:06d}.png": png for png, number in zip(_pngs(batch.pixels()), columns["ids"], strict=True)}
        files["columns.json"] = json.dumps({name: values.tolist() for name, values in columns.items()}).encode()
        with _replacing(path) as part, ThreadPoolExecutor(16) as pool:  # one disk flush serves several waiting threads
            part.mkdir()
            list(pool.map(lambda name: _write(part / name, files[name]), files))
        return
    if kind == "npz":
        arrays: dict[str, Any] = {"arr_0": batch.pixels()}
        if "labels" in columns:
            arrays["arr_1"] = columns["labels"].astype(np.int64)
        np.savez(content, **arrays, **columns)  # every member is dated 1980, so the bytes do not depend on the time
    elif kind == "wds":
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            _fill(archive, batch.pixels(), columns)
    else:
        content.write(safetensors.save({"images": batch.images.numpy(), **columns}))
    publish(path, content.getvalue())


def read(kind: str, path: Path, image_range: tuple[float, float]) -> Part:
    """(pixels (N, H, W, C) uint8, columns) of a shard; InputError where the file is something else."""
    if kind == "safetensors":
        batch = stored(kind, path, image_range)
        return batch.pixels(), batch.columns
    with _parsing(kind, path):
        if kind == "npz":
            with np.load(path) as content:
                return content["arr_0"], {name: content[name] for name in COLUMNS if name in content}
        if kind == "wds":
            return _untar(path)
        columns = {name: np.array(values) for name, values in json.loads((path / "columns.json").read_text()).items()}
        return np.stack([_decoded((path / f"{number:06d}.png").read_bytes()) for number in columns["ids"]]), columns


def stored(kind: str, path: Path, image_range: tuple[float, float]) -> Batch:
    """A shard as a batch that gives the same file again; images that were stored as pixels are at the middle of a level."""
    if kind == "safetensors":
        with _parsing(kind, path):
            columns = safetensors.load_file(path)
            return Batch(torch.from_numpy(columns.pop("images")), columns, image_range)
    pixels, columns = read(kind, path, image_range)
    low, high = image_range
    x = (torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) - 127.5) / 127.5
    return Batch((x + 1) * ((high - low) / 2) + low, columns, image_range)


@contextlib.contextmanager
def _parsing(kind: str, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whichever library reads it
        raise InputError(f"{path} is no {kind} file of a run ({type(error).__name__}: {error})") from error


def joined(batches: list[Batch]) -> Batch:
    """The images of several batches in order of id, columns of the last one's types."""
    last = batches[-1].columns
    columns = {name: np.concatenate([b.columns[name] for b in batches]).astype(last[name].dtype) for name in last}
    order = np.argsort(columns["ids"])
    images = torch.cat([b.images for b in batches])[torch.from_numpy(order)]
    return Batch(images, {name: values[order] for name, values in columns.items()}, batches[-1].image_range)


def digest(path: Path) -> str:
    """sha256 of a shard's bytes; of a folder: over the names and bytes of its files, in order of names."""
    total = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.suffix in (".png", ".json")) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            total.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def publish(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write ``content`` to ``path``, which appears when all is on the disk. new: FileExistsError where it exists already."""
    with _replacing(path, new=new) as part:
        _write(part, content)


def whole_of(name: str) -> str:
    """The final name of a file that is being written; other names as they are."""
    return name.rsplit(".", 2)[0] if name.endswith(".part") else name


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _replacing(output: Path, *, new: bool = False) -> Iterator[Path]:
    """A path to write to, unique among threads, processes and machines. It becomes ``output``, or is removed on an error.

    A folder that exists keeps its other files.
    """
    part = output.with_name(f"{output.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        try:
            (os.link if new else os.replace)(part, output)
        except OSError:
            if not (part.is_dir() and output.is_dir()):
                raise
            if output.is_symlink():  # the link is ours to replace, the folder that it leads to is not
                output.unlink()
                os.replace(part, output)
                return
            for child in sorted(part.iterdir()):  # a folder with files in it, or a mount point, cannot be replaced
                shutil.move(child, output / child.name)
    finally:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def merge_npz(output: Path, count: int, shape: tuple[int, ...], parts: Iterator[Part]) -> None:
    """ADM's format: arr_0 uint8 (count, H, W, C), arr_1 int64 labels (count,) where there are any; part by part."""
    labels = []
    with _replacing(output) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for pixels, columns in parts:
                member.write(pixels.tobytes())
                if "labels" in columns:
                    labels.append(columns["labels"])
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels).astype(np.int64))


def merge_png(output: Path, parts: Iterator[Part]) -> None:
    """output/000000/000123.png, as NVlabs' tools write them; output: absent, or an empty folder."""
    with _replacing(output.resolve()) as part:
        for pixels, columns in parts:
            for png, number in zip(_pngs(pixels), columns["ids"].tolist(), strict=True):
                path = part / f"{number - number % PER_FOLDER:06d}" / f"{number:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png)


def merge_tar(output: Path, parts: Iterator[Part]) -> None:
    """One .tar as webdataset reads it."""
    with _replacing(output) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
        for pixels, columns in parts:
            _fill(archive, pixels, columns)


def _fill(archive: tarfile.TarFile, pixels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    for row, picture in enumerate(_pngs(pixels)):
        facts = {name: values[row].item() for name, values in columns.items()}
        members = {"png": picture, "json": json.dumps(facts).encode()}
        if "labels" in facts:
            members["cls"] = str(facts["labels"]).encode()
        for suffix, content in members.items():
            info = tarfile.TarInfo(f"{facts['ids']:09d}.{suffix}")  # its time is 0
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _untar(path: Path) -> Part:
    pixels, rows = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:  # a folder, or a link
                continue
            if member.name.endswith(".png"):
                pixels.append(_decoded(content.read()))
            elif member.name.endswith(".json"):
                rows.append(json.loads(content.read()))
    return np.stack(pixels), {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _pngs(pixels: np.ndarray) -> Iterator[bytes]:
    check_channels("png", pixels.shape[-1])
    return map(png, pixels)


def _decoded(png: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(png)))
    return image[..., None] if image.ndim == 2 else image
