"""Data sets as others store them, as real samples: parquet and folders of the Hub, webdataset, sound, tables, RGBA."""

import io
import json
import sys
import tarfile
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrefine.errors import InputError
from fastrefine.production import sources
from fastrefine.production.images import held_out_part, load_labelled, training_part
from tests.support.commands import fastrefine

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 5, 4, 3), np.uint8)
LABELS = [3, 1, 0, 2, 1, 3]


def expected(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def encoded(pixels, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(content, kind)
    return content.getvalue()


def parquet(path, pixels, labels=None, plain=False, **more):
    """A file as `datasets` writes it: {"bytes", "path"} and the index of a class."""
    arrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [encoded(x) for x in pixels]
    rows = {"image": pictures if plain else [{"bytes": x, "path": f"{i}.png"} for i, x in enumerate(pictures)]}
    table = arrow.table({**rows, **({} if labels is None else {"label": arrow.array(labels, "int64")}), **more})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=2)
    return path


def shard(path, pixels, members):
    """A .tar of webdataset; members: (suffix, bytes) of each row beside its picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row, x in enumerate(pixels):
            for suffix, content in (("png", encoded(x)), *members(row)):
                info = tarfile.TarInfo(f"train.v1/{row:04}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


# --- the forms


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("form", ["parquet", "bytes", "tar", "folder", "npz", "npy"])
def test_every_form_gives_the_same_images(tmp_path, form, channels):
    pixels = np.random.RandomState(1).randint(0, 255, (6, 5, 7, channels), np.uint8)
    if form in ("parquet", "bytes"):
        path = parquet(tmp_path / "a.parquet", pixels, LABELS, plain=form == "bytes")
    elif form == "tar":
        path = shard(tmp_path / "a.tar", pixels, lambda row: [("cls", str(LABELS[row]).encode())])
    elif form == "folder":
        path = tmp_path / "folder"
        for row, x in enumerate(pixels):
            (path / "abcd"[LABELS[row]]).mkdir(parents=True, exist_ok=True)
            (path / "abcd"[LABELS[row]] / f"{row}.png").write_bytes(encoded(x))
    else:
        path = tmp_path / f"a.{form}"
        np.savez(path, pixels, np.array(LABELS)) if form == "npz" else np.save(path, pixels)
    order = np.argsort(LABELS, kind="stable") if form == "folder" else np.arange(6)
    images, labels = load_labelled(path)
    assert torch.equal(images, torch.from_numpy(pixels[order]).permute(0, 3, 1, 2).float().div(127.5).sub(1))
    assert (labels is None and form == "npy") or labels.tolist() == [LABELS[i] for i in order]
    few, some = load_labelled(path, 3)
    kept = np.sort(np.random.RandomState(2020).permutation(6)[:3])
    assert torch.equal(few, images[kept]) and (some is None or some.tolist() == labels[kept].tolist())


@pytest.mark.parametrize("alpha", ["opaque", "in some only"])
def test_alpha_that_shows_nothing_is_left_out(tmp_path, alpha):
    for row, x in enumerate(PIXELS):
        see_through = np.dstack([x, np.full(x.shape[:2], 255 if alpha == "opaque" else 100, np.uint8)])
        (tmp_path / f"{row}.png").write_bytes(encoded(see_through if alpha == "opaque" or row else x))
    torch.testing.assert_close(load_labelled(tmp_path)[0], expected(PIXELS))


def test_the_local_copy_of_a_data_set_has_parts(tmp_path):
    hub = tmp_path / "snapshot"
    for name, rows in (("train-00000-of-00002", [0, 1]), ("train-00001-of-00002", [2]), ("test-00000-of-00001", [3, 4, 5])):
        parquet(hub / "data" / f"{name}.parquet", PIXELS[rows], [LABELS[row] for row in rows])
    (hub / "README.md").write_text("---\ndataset_info:\n---")
    for part, rows in (("", [0, 1, 2]), (":train", [0, 1, 2]), (":test", [3, 4, 5])):
        images, labels = load_labelled(f"{hub}{part}")
        torch.testing.assert_close(images, expected(PIXELS[rows]))
        assert labels.tolist() == [LABELS[row] for row in rows]
    assert held_out_part(f"{hub}") == held_out_part(f"{hub}:train") == f"{hub}:test" and held_out_part(f"{hub}:test") == ""
    assert training_part(f"{hub}:test") == f"{hub}:train"
    with pytest.raises(InputError, match=r"has no part validation; it has test, train"):
        load_labelled(f"{hub}:validation")[0]
    parquet(hub / "small" / "train-0.parquet", PIXELS)
    with pytest.raises(InputError, match="several data sets: data, small; wanted the folder of one"):
        load_labelled(hub)[0]


def test_a_folder_of_pictures_may_have_parts_and_classes_in_them(tmp_path):
    for row, x in enumerate(PIXELS):
        file = tmp_path / ("validation" if row > 3 else "train") / "ab"[row % 2] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(x))
    images, labels = load_labelled(tmp_path)
    torch.testing.assert_close(images, expected(PIXELS[[0, 2, 1, 3]]))
    assert labels.tolist() == [0, 0, 1, 1] and len(load_labelled(f"{tmp_path}:validation")[0]) == 2
    assert held_out_part(str(tmp_path)) == f"{tmp_path}:validation"


def test_a_folder_of_webdataset_shards(tmp_path):
    shard(tmp_path / "00000.tar", PIXELS[:4], lambda row: [("json", json.dumps({"label": LABELS[row], "text": "x"}).encode())])
    shard(tmp_path / "00001.tar", PIXELS[4:], lambda row: [("cls", str(LABELS[4 + row]).encode()), ("mask.png", b"no picture")])
    images, labels = load_labelled(tmp_path)
    torch.testing.assert_close(images, expected(PIXELS))
    assert labels.tolist() == LABELS
    shard(tmp_path / "00001.tar", PIXELS[4:], lambda row: [("txt", b"a cat")])
    assert load_labelled(tmp_path)[1] is None


def test_webdatasets_own_writer_and_the_tar_of_a_run_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as out:
        for row, x in enumerate(PIXELS):
            out.write({"__key__": f"sample{row}", "png": Image.fromarray(x), "cls": LABELS[row]})
    images, labels = load_labelled(tmp_path / "a.tar")
    torch.testing.assert_close(images, expected(PIXELS))
    assert labels.tolist() == LABELS


def test_a_data_set_of_the_hub_is_fetched_and_only_its_part(tmp_path, monkeypatch):
    there = tmp_path / "there"
    for split in ("train", "test"):
        parquet(there / "data" / f"{split}-0.parquet", PIXELS[:2] if split == "train" else PIXELS[2:])
    (there / "loading_script.py").write_text("raise SystemExit")
    asked = []

    class Api:
        def list_repo_files(self, name, *, repo_type, revision):
            asked.append((name, repo_type, revision))
            return [str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()]

    def snapshot_download(name, *, repo_type, revision, allow_patterns):
        asked.append(allow_patterns)
        copy = tmp_path / f"copy{len(asked)}"
        for pattern in allow_patterns:
            (copy / pattern).parent.mkdir(parents=True, exist_ok=True)
            (copy / pattern).write_bytes((there / pattern).read_bytes())
        return str(copy)

    fake = types.ModuleType("huggingface_hub")
    fake.HfApi, fake.snapshot_download = Api, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(load_labelled("me/pictures")[0], expected(PIXELS[:2]))
    torch.testing.assert_close(load_labelled("me/pictures@v1:test")[0], expected(PIXELS[2:]))
    assert asked == [
        ("me/pictures", "dataset", None), ["data/train-0.parquet"], ("me/pictures", "dataset", "v1"), ["data/test-0.parquet"],
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"me/pictures is not there, and no data set of the Hub .*it has test, train"):
        load_labelled("me/pictures:validation")[0]


@pytest.mark.parametrize(("module", "path", "extra"), [
    ("huggingface_hub", "me/pictures", "hub"), ("pyarrow", "a.parquet", "parquet"), ("soundfile", "sounds", "audio"),
])  # fmt: skip
def test_without_its_extra_a_form_names_it(tmp_path, monkeypatch, module, path, extra):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {module}, .*pip install 'fastrefine\[{extra}\]'"):
        load_labelled(path, images_only=False)


def test_refine_stops_at_the_median_of_a_parquet_file(tmp_path):
    from fastrefine.datasets import load_digits

    pixels = ((load_digits().test[:40] + 1) * 8).round().mul(15).byte().permute(0, 2, 3, 1).numpy()
    path = parquet(tmp_path / "data" / "train-0.parquet", pixels)
    given = ["--pair", "digits", "--stop", "median", "--ids", "0-7", "--max-steps", "3"]
    for name, real in (("a", path), ("b", path.parents[1])):
        done = fastrefine("refine", *given, "--real", real, "--outdir", tmp_path / name)
        assert done.exception is None
    a, b = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert a["real_sha256"] == b["real_sha256"]


# --- no images


def test_sound_tables_and_volumes_are_samples_where_images_are_not_the_only_ones(tmp_path):
    soundfile, arrow = pytest.importorskip("soundfile"), pytest.importorskip("pyarrow")
    x = np.random.RandomState(0).uniform(-1, 1, (3, 50, 2)).astype(np.float32)
    (tmp_path / "sound").mkdir()
    for row, sound in enumerate(x):
        soundfile.write(tmp_path / "sound" / f"{row}.wav", sound, 8000, subtype="FLOAT")
    found, labels = load_labelled(tmp_path / "sound", images_only=False)
    assert torch.equal(found, torch.from_numpy(x).transpose(1, 2)) and labels is None
    rows = np.random.RandomState(0).randn(300, 2).astype(np.float32) * 9
    table = arrow.table({"a": rows[:, 0], "b": rows[:, 1], "name": ["x"] * 300, "label": np.arange(300)})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    found, labels = load_labelled(tmp_path / "t.parquet", images_only=False)
    assert torch.equal(found, torch.from_numpy(rows)) and labels.tolist() == list(range(300))
    for name, array in (("table", rows), ("volumes", rows.reshape(3, 1, 5, 5, 8)), ("sounds", rows.reshape(3, 1, 200) / 100)):
        np.save(tmp_path / f"{name}.npy", array)
        assert torch.equal(load_labelled(tmp_path / f"{name}.npy", images_only=False)[0], torch.from_numpy(array))
    for name in ("sound", "t.parquet", "table.npy", "volumes.npy", "sounds.npy"):
        with pytest.raises(InputError, match=r"holds an array of shape .*wanted \(N, H, W, C\)"):
            load_labelled(tmp_path / name)
    np.save(tmp_path / "loud.npy", rows.reshape(3, 1, 200))
    with pytest.raises(InputError, match="sound beyond -1 to 1"):
        load_labelled(tmp_path / "loud.npy", images_only=False)


# --- damaged ones


def test_what_is_wrong_with_a_data_set_is_said(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    write = pytest.importorskip("pyarrow.parquet").write_table
    for name, columns, reason in (
        ("text", {"text": ["a"]}, "no column of pictures or numbers, but text"),
        ("none", {"image": arrow.array([None], "binary")}, "rows without a picture"),
        ("nulls", {"a": arrow.array([1.0, None])}, "rows without a number in a"),
        ("empty", {"a": arrow.array([], "float32")}, "they have 0 rows"),
        ("broken", {"image": [b"no picture"]}, "is no picture"),
        ("sizes", {"image": [encoded(PIXELS[0]), encoded(PIXELS[0, :2])]}, "wanted all alike"),
    ):
        write(arrow.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match=reason):
            load_labelled(tmp_path / f"{name}.parquet", images_only=False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_labelled(tmp_path / "a.parquet")[0]


def test_a_picture_of_another_size_is_not_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(PIXELS[0]))
    bomb = bytearray(encoded(PIXELS[1]))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # the size that its header says
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "b.png").write_bytes(bomb)
    with pytest.raises(InputError, match="b.png is no picture .*decompression bomb"):
        load_labelled(tmp_path)[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match=r"b.png is of shape \(60000, 60000, 3\), .*wanted all alike"):
        load_labelled(tmp_path)[0]


def test_names_of_files_say_their_part():
    for name, part in (
        ("data/train-00000-of-00002.parquet", "train"), ("default/validation/0000.parquet", "validation"),
        ("dev.tar", "validation"), ("data/0000.parquet", ""),
        ("imagenet-test-000001.tar", "test"), ("contest.tar", ""), ("test/cat/1.png", "test"), ("cat/test.png", ""),
    ):  # fmt: skip
        assert sources.split_of(Path(name)) == part
