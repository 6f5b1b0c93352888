"""Readers of data sets as others store them: pictures, parquet files, webdataset shards, sound.

Nothing is unpacked, nothing of a file is run, and names in an archive are no paths. Pictures of other sizes are not decoded.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from fastrefine.errors import InputError
from fastrefine.extras import package
from fastrefine.production.named_code import check_inside

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
SOUNDS = (".wav", ".flac")
KINDS = ((".parquet",), (".tar",), PICTURES, SOUNDS)  # a folder is of the first of which it has files
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
COLUMNS = ("ids", "labels", "logits", "steps", "status", "selected")  # of a run's samples
LABELS = ("label", "labels", "cls")
LARGEST = 2**28  # bytes of one member of a tar
ROWS = 256  # of a parquet file, decoded at once
MOST = 10**8  # rows
Labels = np.ndarray | None
Key = tuple[int, str]


def some(n: int, limit: int | None) -> np.ndarray | slice:
    """``limit`` of n rows in ascending order, by one fixed random draw: the first rows may all be of one class."""
    if limit is None or limit >= n:
        return slice(None)
    return np.sort(np.random.RandomState(2020).permutation(n)[:limit])


def split_of(file: PurePath) -> str:
    """ "train" of data/train-00000-of-00002.parquet, test/cats/1.png and so on; "" where the name says none.

    file: below the folder of the data set. Of pictures and sound only the first folder counts.
    """
    words = file.parts[:1] if file.suffix.lower() in (*PICTURES, *SOUNDS) else re.split(r"[^a-z0-9]+", str(file).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def files_of(files: Iterable[Any]) -> list[Any]:
    """Those of a data set's files that hold its samples, in order of names: all of one kind."""
    ordered = sorted(files)
    each = ([file for file in ordered if file.suffix.lower() in kind] for kind in KINDS)
    return next((found for found in each if found), [])


def of_part(files: Sequence[Any], root: PurePath, part: str) -> list[Any]:
    """The files of one part: train, validation or test; "": train where there are parts, else all. Raises InputError."""
    splits = [split_of(file.relative_to(root)) for file in files]
    if part and part not in splits:
        known = ", ".join(sorted({split for split in splits if split}))
        why = (
            f"no part {part}; it has {known}" if known else f"no parts, so no :{part}; wanted e.g. test-00000.parquet or test/"
        )
        raise InputError(f"{root} has {why}")
    wanted = part or ("train" if "train" in splits else None)
    return [file for file, split in zip(files, splits, strict=True) if wanted is None or split == wanted]


def folder(root: Path, part: str, limit: int | None) -> tuple[np.ndarray, Labels]:
    """What a folder holds, as ``samples`` gives it. Raises InputError where it has no data, and on damaged files."""
    files = of_part(files_of(root.rglob("*")), root, part)
    if not files:
        raise InputError(f"{root} has no pictures ({', '.join(PICTURES)}), .parquet, .tar or idx files of MNIST")
    return samples(files, root, limit)


def samples(files: list[Path], root: Path, limit: int | None = None) -> tuple[np.ndarray, Labels]:
    """Of files of one kind: pixels (N, H, W, C) uint8, sound (N, C, T) or a table (N, F) float32; labels (N,) or None.

    limit: see ``some``. Raises InputError on damaged files.
    """
    suffix = files[0].suffix.lower()
    if suffix == ".parquet":
        return _parquet(files, root, limit)
    if suffix == ".tar":
        return _tar(files, limit)
    at = np.arange(len(files))[some(len(files), limit)]
    chosen = [files[i] for i in at]
    found = stacked((str(file), file) for file in chosen) if suffix in PICTURES else _sounds(chosen)
    owners = [file.relative_to(root).parts[:-1] for file in files]
    if owners[0] and all(owner and owner[0].lower() in SPLITS for owner in owners):
        owners = [owner[1:] for owner in owners]
    names = sorted({parts[0] for parts in owners if parts})
    labelled = all(owners) and len(names) > 1 and not all(name.isdecimal() and len(name) == 6 for name in names)
    return found, np.array([names.index(owners[i][0]) for i in at]) if labelled else None


def stacked(pictures: Iterable[tuple[str, Path | bytes]]) -> np.ndarray:
    """(N, H, W, C) uint8 of (name, file or its bytes): 1 channel if all are grey, 4 if all are RGBA and some see-through.

    Raises InputError on what is no picture, and where sizes differ.
    """
    found: list[np.ndarray] = []
    first, alike = "", (0, 0, 0)
    for name, content in pictures:
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
                shape = (opened.height, opened.width, 1 if opened.mode == "L" else 3)
                if not first:
                    first, alike = name, shape
                if shape == alike:
                    pixels = np.asarray(opened if opened.mode in ("L", "RGB", "RGBA") else opened.convert("RGB"))
        except Exception as error:  # of whichever part of Pillow reads it
            raise InputError(f"{name} is no picture ({type(error).__name__}: {error})") from error
        if shape != alike:
            raise InputError(f"{name} is of shape {shape}, {first} of {alike}; wanted all alike")
        found.append(np.atleast_3d(pixels))
    if alike[2] == 3 and not (all(x.shape[2] == 4 for x in found) and any(x[..., 3].min() < 255 for x in found)):
        found = [x[..., :3] for x in found]
    return np.stack(found)


def sound(content: bytes) -> np.ndarray:
    """(C, T) float32 in [-1, 1] of the bytes of a file of sound."""
    read = package("soundfile", "audio", "sound").read
    return np.ascontiguousarray(read(io.BytesIO(content), dtype="float32", always_2d=True)[0].T)


def _sounds(files: list[Path]) -> np.ndarray:
    found: list[np.ndarray] = []
    for file in files:
        try:
            found.append(sound(file.read_bytes()))
        except InputError:
            raise
        except Exception as error:  # of libsndfile
            raise InputError(f"{file} is no file of sound ({type(error).__name__}: {error})") from error
        if found[-1].shape != found[0].shape:
            raise InputError(f"{file} is of shape {found[-1].shape}, {files[0]} of {found[0].shape}; wanted all alike")
    return np.stack(found)


# --- parquet, as the Hub stores data sets


def _parquet(files: list[Path], root: Path, limit: int | None) -> tuple[np.ndarray, Labels]:
    """Pictures of the first column that has some, else all columns of numbers as a table."""
    if len({file.parent for file in files}) > 1:
        folders = sorted({str(file.parent.relative_to(root)) for file in files})
        raise InputError(f"{root} holds several data sets: {', '.join(folders)}; wanted the folder of one")
    arrow, reader = (package(name, "parquet", "a .parquet file") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        opened = [reader.ParquetFile(file) for file in files]
        schema = opened[0].schema_arrow
        picture, label = _picture_column(schema), _label_column(schema)
        numbers = [f.name for f in schema if _is_number(f.type) and f.name not in (*COLUMNS, label)]
        names = [picture] if picture else numbers
        if not names:
            raise InputError(f"{files[0]} has no column of pictures or numbers, but {', '.join(schema.names)}")
        n = sum(file.metadata.num_rows for file in opened)
        if not 0 < n <= MOST:
            raise InputError(f"{files[0]} and those beside it say that they have {n:,} rows; wanted 1 to {MOST:,}")
        wanted = np.zeros(n, bool)
        wanted[some(n, limit)] = True
        labels: list[Any] = []

        def batches() -> Iterator[tuple[Path, Any]]:
            row = 0
            for path, file in zip(files, opened, strict=True):
                for batch in file.iter_batches(ROWS, columns=[*names, label] if label else names):
                    chosen = batch.filter(arrow.array(wanted[row : row + len(batch)]))
                    labels.extend(chosen.column(label).to_pylist() if label else [None] * len(chosen))
                    row += len(batch)
                    yield path, chosen

        if picture:
            found = stacked(
                (f"a row of {path}", _bytes(value, path, root))
                for path, batch in batches() for value in batch.column(picture).to_pylist()
            )  # fmt: skip
        else:
            tables = ([batch.column(name).to_numpy(zero_copy_only=False) for name in names] for _, batch in batches())
            found = np.concatenate([np.stack(table, 1).astype(np.float32) for table in tables])
            if not np.isfinite(found).all():
                raise InputError(f"{files[0]} or a file beside it has rows without a number in {', '.join(names)}")
    except InputError:
        raise
    except Exception as error:  # of pyarrow's many
        raise InputError(f"{files[0]} cannot be read as parquet ({type(error).__name__}: {error})") from error
    return found, _whole(labels)


def _picture_column(schema: Any) -> str:
    """The first column of bytes, or of {"bytes", "path"} as `datasets` writes them; "" where there is none."""
    for field in schema:
        kind = field.type
        nested = [kind.field(i).name for i in range(kind.num_fields)] if str(kind).startswith("struct") else []
        if str(kind) in ("binary", "large_binary") or "bytes" in nested:
            return field.name
    return ""


def _label_column(schema: Any) -> str:
    return next((f.name for f in schema if f.name in LABELS and re.fullmatch(r"u?int\d+", str(f.type))), "")


def _is_number(kind: Any) -> bool:
    return re.fullmatch(r"u?int\d+|halffloat|float|double|bool", str(kind)) is not None


def _bytes(value: Any, file: Path, root: Path) -> bytes:
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        check_inside(value["path"], file, file.parent, root)
        return (file.parent / value["path"]).read_bytes()
    content = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise InputError(f"{file} has rows without a picture")
    return content


# --- webdataset


def _tar(files: list[Path], limit: int | None) -> tuple[np.ndarray, Labels]:
    """Members KEY.png (.jpg, ...), their labels in KEY.cls or KEY.json; other members and links are left out."""
    keys = [key for key, suffix, _ in _members(files) if suffix in PICTURES]
    if not keys:
        raise InputError(f"{files[0]} cannot be read as images: it has no pictures ({', '.join(PICTURES)})")
    chosen = {keys[i] for i in np.arange(len(keys))[some(len(keys), limit)]}
    labels: dict[Key, Any] = {}
    owners: list[Key] = []

    def pictures() -> Iterator[tuple[str, bytes]]:
        for key, suffix, content in _members(files, chosen):
            if suffix in PICTURES:
                owners.append(key)
                yield f"{key[1]}{suffix} of {files[key[0]]}", content
            elif suffix in (".cls", ".json"):
                labels.setdefault(key, _label(content))

    found = stacked(pictures())
    return found, _whole([labels.get(key) for key in owners])


def _members(files: list[Path], wanted: Container[Key] = ()) -> Iterator[tuple[Key, str, bytes]]:
    """((number of the file, key), suffix, content) of each member that is a file; without content where it is not wanted."""
    for number, file in enumerate(files):
        try:
            with tarfile.open(file) as archive:
                for member in archive:
                    if member.size > LARGEST:
                        raise InputError(f"{file} has a member of {member.size:,} bytes; wanted at most {LARGEST:,}")
                    folders, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    owner = number, f"{folders}/{key}"
                    content = archive.extractfile(member) if member.isfile() and owner in wanted else None
                    if member.isfile() and (content or not wanted):
                        yield owner, f".{suffix.lower()}", content.read() if content else b""
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{file} cannot be read as images ({type(error).__name__}: {error})") from error


def _label(content: bytes) -> Any:
    """What KEY.cls or KEY.json says of the label."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return next((found[name] for name in LABELS if name in found), None) if isinstance(found, dict) else found


def _whole(labels: list[Any]) -> Labels:
    """(N,) int64; None unless all are whole numbers of at least 0."""
    whole = all(type(label) is int and 0 <= label < 2**31 for label in labels)
    return np.array(labels, np.int64) if labels and whole else None
