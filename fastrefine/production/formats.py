"""Files of samples: a shard as .npz, .safetensors, PNG folder, .tar (webdataset), WAV folder or .parquet.

Equal samples give equal bytes. Samples (C, H, W) are images: their pixels are floor(127.5 x + 128), clipped to 0..255, of x in
[-1, 1]. Others are kept in float32, but for WAV, which is PCM of 16 bits. .safetensors keeps the float32 values of images too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
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
from fastrefine.extras import package
from fastrefine.pictures import levels, png
from fastrefine.production.images import scaled, unscaled
from fastrefine.production.sources import COLUMNS, sound

PER_FOLDER = 1000  # files of a merged folder
SUFFIX = {"npz": ".npz", "png": "", "wds": ".tar", "safetensors": ".safetensors", "wav": "", "parquet": ".parquet"}
FOLDERS = ("png", "wav")  # a file for each sample
CHANNELS = (1, 3, 4)  # of PNG files: grey, RGB, RGBA
FULL = 32768  # of PCM of 16 bits
Part = tuple[np.ndarray, dict[str, np.ndarray]]  # pixels (N, H, W, C) uint8 or other samples (N, ...) float32; columns


@dataclass(frozen=True)
class Batch:
    """The samples of a shard, with what is known of each.

    images: (N, ...) float32; images (N, C, H, W) and sound lie in [low, high] of ``image_range``. columns: some of
    COLUMNS, each (N,).
    """

    images: Tensor
    columns: dict[str, Any]
    image_range: tuple[float, float]

    def values(self) -> np.ndarray:
        """Pixels (N, H, W, C) uint8 of images, (N, ...) float32 of other samples."""
        return levels(self.images, self.image_range) if self.images.ndim == 4 else self.images.numpy()


def name_of(kind: str, index: int) -> str:
    """The name of shard ``index`` in its folder."""
    return f"{index:06d}" if kind in FOLDERS else f"shard-{index:06d}{SUFFIX[kind]}"


def check_shape(kind: str, shape: tuple[int, ...]) -> None:
    """Raise InputError where the format cannot hold samples of this shape, or needs a package that is not there."""
    images = len(shape) == 3 and shape[0] in CHANNELS, "images (C, H, W) of 1, 3 or 4 channels"
    fits, wanted = {
        "png": images, "wds": images, "wav": (len(shape) in (1, 2), "sound (T,) or (C, T)"),
        "parquet": (len(shape) == 1, "rows of a table (F,)"),
    }.get(kind, (len(shape) > 0, "samples (N, ...)"))  # fmt: skip
    if not fits:
        raise InputError(f"the {kind} format holds {wanted}, got samples of shape {shape}; use npz or safetensors")
    if kind == "wav":
        _soundfile()
    if kind == "parquet":
        _pyarrow()


def write(kind: str, path: Path, batch: Batch, sample_rate: int = 0) -> None:
    """Write a shard; it gets its name when it is complete and on the disk. sample_rate: of wav, in Hz."""
    columns, content = batch.columns, io.BytesIO()
    if kind in FOLDERS:
        values = batch.values() if kind == "png" else unscaled(batch.images, batch.image_range).numpy()
        encoded = zip(_encoded(kind, values, sample_rate), columns["ids"], strict=True)
        files = {f"{number:06d}.{kind}": file for file, number in encoded}
        files["columns.json"] = json.dumps({name: values.tolist() for name, values in columns.items()}).encode()
        with _replacing(path) as part, ThreadPoolExecutor(16) as pool:  # one disk flush serves several waiting threads
            part.mkdir()
            list(pool.map(lambda name: _write(part / name, files[name]), files))
        return
    if kind == "npz":
        arrays: dict[str, Any] = {"arr_0": batch.values()}
        if "labels" in columns:
            arrays["arr_1"] = columns["labels"].astype(np.int64)
        np.savez(content, **arrays, **columns)  # every member is dated 1980, so the bytes do not depend on the time
    elif kind == "wds":
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            _fill(archive, batch.values(), columns)
    elif kind == "parquet":
        _pyarrow().write_table(_table(batch.values(), columns), content)
    else:
        content.write(safetensors.save({"images": batch.images.numpy(), **columns}))
    publish(path, content.getvalue())


def read(kind: str, path: Path, image_range: tuple[float, float]) -> Part:
    """The samples of a shard, see ``Part``; of wav (N, C, T) in [-1, 1]. Raises InputError where the file is something else."""
    if kind == "safetensors":
        batch = stored(kind, path, image_range)
        return batch.values(), batch.columns
    with _parsing(kind, path):
        if kind == "npz":
            with np.load(path) as content:
                return content["arr_0"], {name: content[name] for name in COLUMNS if name in content}
        if kind == "wds":
            return _untar(path)
        if kind == "parquet":
            return _untabled(path)
        columns = {name: np.array(values) for name, values in json.loads((path / "columns.json").read_text()).items()}
        decoded = _decoded if kind == "png" else sound
        return np.stack([decoded((path / f"{number:06d}.{kind}").read_bytes()) for number in columns["ids"]]), columns


def stored(kind: str, path: Path, image_range: tuple[float, float]) -> Batch:
    """A shard as a batch that gives the same file again; images that were stored as pixels are at the middle of a level."""
    if kind == "safetensors":
        with _parsing(kind, path):
            columns = safetensors.load_file(path)
            return Batch(torch.from_numpy(columns.pop("images")), columns, image_range)
    values, columns = read(kind, path, image_range)
    if values.dtype == np.uint8:
        x = (torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32)) - 127.5) / 127.5
    else:
        x = torch.from_numpy(values)
    return Batch(scaled(x, image_range) if values.dtype == np.uint8 or kind == "wav" else x, columns, image_range)


@contextlib.contextmanager
def _parsing(kind: str, path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of whichever library reads it
        raise InputError(f"{path} is no {kind} file of a run ({type(error).__name__}: {error})") from error


def joined(batches: list[Batch]) -> Batch:
    """The images of several batches in order of id, columns of the last one's types."""
    last = batches[-1].columns
    columns = {name: np.concatenate([b.columns[name] for b in batches]).astype(last[name].dtype) for name in last}
    order = np.argsort(columns["ids"])
    shape = batches[-1].images.shape[1:]  # sound (T,) is read as (1, T)
    images = torch.cat([b.images.reshape(-1, *shape) for b in batches])[torch.from_numpy(order)]
    return Batch(images, {name: values[order] for name, values in columns.items()}, batches[-1].image_range)


def digest(path: Path) -> str:
    """sha256 of a shard's bytes; of a folder: over the names and bytes of its files, in order of names."""
    total = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.suffix in (".png", ".wav", ".json")) if path.is_dir() else [path]
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


def merge_npz(output: Path, count: int, parts: Iterator[Part]) -> None:
    """ADM's format, part by part: arr_0 uint8 (count, H, W, C), or float32 (count, ...) where the samples are no images.

    arr_1: int64 labels (count,) where there are any. Further members are the columns.
    """
    first = next(parts)
    shape, dtype = (count, *first[0].shape[1:]), first[0].dtype
    columns: list[dict[str, np.ndarray]] = []
    with _replacing(output) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for values, more in itertools.chain([first], parts):
                member.write(values.tobytes())
                columns.append(more)
        arrays = _joined(columns)
        if "labels" in arrays:
            arrays = {"arr_1": arrays["labels"].astype(np.int64), **arrays}
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)


def merge_folder(kind: str, output: Path, parts: Iterator[Part], sample_rate: int) -> None:
    """output/000000/000123.png (or .wav), as NVlabs' tools write them, and columns.json; output: absent, or an empty folder."""
    columns: list[dict[str, np.ndarray]] = []
    with _replacing(output.resolve()) as part:
        for values, more in parts:
            for file, number in zip(_encoded(kind, values, sample_rate), more["ids"].tolist(), strict=True):
                path = part / f"{number - number % PER_FOLDER:06d}" / f"{number:06d}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file)
            columns.append(more)
        (part / "columns.json").write_text(json.dumps({name: x.tolist() for name, x in _joined(columns).items()}))


def merge_tar(output: Path, parts: Iterator[Part]) -> None:
    """One .tar as webdataset reads it."""
    with _replacing(output) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
        for pixels, columns in parts:
            _fill(archive, pixels, columns)


def merge_parquet(output: Path, parts: Iterator[Part]) -> None:
    """One table, a row group for each shard."""
    writer = None
    with _replacing(output) as part, contextlib.ExitStack() as stack:
        for values, columns in parts:
            table = _table(values, columns)
            if writer is None:
                writer = stack.enter_context(_pyarrow().ParquetWriter(part, table.schema))
            writer.write_table(table.cast(writer.schema))


def _joined(columns: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}


def _fill(archive: tarfile.TarFile, pixels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    for row, picture in enumerate(_encoded("png", pixels)):
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


def _encoded(kind: str, values: np.ndarray, sample_rate: int = 0) -> Iterator[bytes]:
    """A PNG file for each image (H, W, C) uint8, or a WAV file for each sound (T,) or (C, T) in [-1, 1]."""
    return map(png, values) if kind == "png" else (_wav(x, sample_rate) for x in values)


def _decoded(png: bytes) -> np.ndarray:
    return np.atleast_3d(np.asarray(Image.open(io.BytesIO(png))))


def _wav(x: np.ndarray, sample_rate: int) -> bytes:
    content, levels = io.BytesIO(), np.clip(np.rint(np.atleast_2d(x) * FULL), -FULL, FULL - 1).astype(np.int16)
    _soundfile().write(content, levels.T, sample_rate, format="WAV", subtype="PCM_16")
    return content.getvalue()


def _table(values: np.ndarray, columns: dict[str, np.ndarray]) -> Any:
    """Columns x0, x1, ... float32 of a table's rows (N, F), and those of ``columns``."""
    features = {f"x{i}": np.ascontiguousarray(column) for i, column in enumerate(values.T)}
    return package("pyarrow", "parquet", "the parquet format").table({**features, **columns})


def _untabled(path: Path) -> Part:
    table = _pyarrow().read_table(path, partitioning=None)
    found = {name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)}
    columns = {name: found.pop(name) for name in COLUMNS if name in found}
    return np.stack([found[f"x{i}"] for i in range(len(found))], 1), columns


def _soundfile() -> Any:
    return package("soundfile", "audio", "the wav format")


def _pyarrow() -> Any:
    return package("pyarrow.parquet", "parquet", "the parquet format")
