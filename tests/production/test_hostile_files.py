"""Files from somebody else: whatever is in them, only our own errors come out, and no path in them leaves their folder."""

import io
import json
import shutil
import struct
import tarfile
import zipfile
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import fastrefine as fr
from fastrefine.models.mlp import mlp_discriminator, mlp_generator
from fastrefine.production import formats, hub
from fastrefine.production.conditions import load_conditions
from fastrefine.production.configuration import Configuration
from fastrefine.production.images import load_labelled
from fastrefine.production.run_folder import MANIFEST, Folder, merge, verify
from fastrefine.production.weights_file import read_weights

BOUNDED = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -1, 2**63, 10**400])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 300, "0-9" + "0" * 30, "np:array"]
)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
ANY = st.recursive(PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3), max_leaves=6)
GOOD = save({"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)})


def places(value, path=()):
    """Every place in a JSON document, as the keys that lead there."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


@st.composite
def changed(draw, document):
    """The document with other JSON at one to three places of it, or without them, or with entries that it had not."""
    document = deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(document) if place] or [("",)]))
        holder = document
        for key in way:
            holder = holder[key]
        if draw(st.booleans()) or not isinstance(holder, dict):
            holder[last] = draw(ANY)
        elif draw(st.booleans()):
            holder.pop(last, None)
        else:
            holder[draw(TEXTS)] = draw(ANY)
    return document


@st.composite
def damaged(draw, content):
    """Bytes cut short, with others in their place, or with more behind them."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.sampled_from([0, 1, 8, 10**6]))] = draw(st.binary(max_size=9))
    return bytes(content)


def fails_as_ours(call, *arguments):
    """Whether the call gives an InputError; any other error passes through."""
    try:
        call(*arguments)
    except fr.InputError as error:
        assert str(error)
        return True
    return False


# --- weights


@BOUNDED
@given(damaged(GOOD))
def test_damaged_safetensors(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    fails_as_ours(read_weights, tmp_path / "w.safetensors")


@BOUNDED
@given(changed(json.loads(GOOD[8 : 8 + struct.unpack("<Q", GOOD[:8])[0]])))
def test_safetensors_with_another_header(tmp_path, header):
    text, data = json.dumps(header).encode(), GOOD[8 + struct.unpack("<Q", GOOD[:8])[0] :]
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    fails_as_ours(read_weights, tmp_path / "w.safetensors")


def torch_file(content):
    opened = io.BytesIO()
    torch.save(content, opened)
    return opened.getvalue()


@BOUNDED
@given(damaged(torch_file({"g_ema": {"a": torch.zeros(2)}, "d": {"b": torch.ones(2)}})))
def test_damaged_torch_files(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    fails_as_ours(read_weights, tmp_path / "w.pt", "g_ema")


@BOUNDED
@given(ANY, st.sampled_from(["", "a", "a.b", ".", "..", "optim"]))
def test_torch_files_that_hold_something_else(tmp_path, content, key):
    (tmp_path / "w.pt").write_bytes(torch_file({"a": content, "b": [torch.zeros(1)]}))
    fails_as_ours(read_weights, tmp_path / "w.pt", key)


# --- configurations and pairs

FULL = Configuration(
    pair="digits", prior={"name": "normal", "shape": [32]}, sampler={"name": "ddls", "step_size": 0.1}, stop="median",
    real="digits", select="mh", calibrate="platt", image_range=(0, 1), classes=1, group_size=2, output_key="x", max_steps=3,
).to_json()  # fmt: skip


@settings(BOUNDED, max_examples=150)
@given(changed(FULL) | ANY)
def test_configurations(values):
    fails_as_ours(Configuration.from_json, values)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    code, small = ("fastrefine.models.mlp:mlp_generator", "fastrefine.models.mlp:mlp_discriminator"), {"hidden": [4]}
    return fr.save_pair(
        tmp_path_factory.mktemp("hostile") / "pair", mlp_generator(**small), mlp_discriminator(**small), code=code,
        arguments=(small, small), prior=fr.Normal(2), sampler=fr.DDLS(0.1), stop="median", generator_kwargs={"w": 1},
    )  # fmt: skip


@settings(BOUNDED, max_examples=80)
@given(data=st.data())
def test_configurations_of_pairs(pair, data):
    file = pair / "config.json"
    good = file.read_text()
    try:
        file.write_text(json.dumps(data.draw(changed(json.loads(good)) | ANY)))
        fails_as_ours(fr.load_pair, pair)
    finally:
        file.write_text(good)


# --- runs

IMAGES = torch.rand(2, 1, 3, 3) * 2 - 1
COLUMNS = {"ids": np.arange(2), "labels": np.array([1, 0]), "logits": np.zeros(2, np.float32)}
BATCH = formats.Batch(IMAGES, COLUMNS, (-1.0, 1.0))


def run_of(path, kind):
    """A finished run of one shard."""
    folder = Folder.claim(path, Configuration(pair="digits", ids="0-1", format=kind), {})
    folder.write(folder.shards()[0], BATCH, {})
    return folder


def approved(folder):
    """The run with a marker that fits whatever stands in its shard now, as who changes the one can change the other."""
    marker = folder.marker(folder.shards()[0])
    facts = json.loads(marker.read_text())
    marker.write_text(json.dumps({**facts, "sha256": formats.digest(folder.file(folder.shards()[0]))}))


@settings(BOUNDED, max_examples=60)
@given(st.data(), st.sampled_from(["manifest", "marker"]))
def test_manifests_and_markers(tmp_path_factory, data, what):
    folder = run_of(tmp_path_factory.mktemp("run") / "run", "npz")
    file = folder.path / MANIFEST if what == "manifest" else folder.marker(folder.shards()[0])
    file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())) | ANY)))
    fails_as_ours(verify, folder.path)
    fails_as_ours(merge, folder.path, folder.path.parent / "out.npz")
    fails_as_ours(Folder.claim, folder.path, folder.configuration, {})


@pytest.mark.parametrize("kind", ["npz", "wds", "safetensors"])
@settings(BOUNDED, max_examples=25)
@given(data=st.data())
def test_damaged_shards(tmp_path_factory, kind, data):
    folder = run_of(tmp_path_factory.mktemp("run") / "run", kind)
    shard = folder.file(folder.shards()[0])
    shard.write_bytes(data.draw(damaged(shard.read_bytes())))
    approved(folder)
    fails_as_ours(merge, folder.path, folder.path.parent / "out.npz")


@settings(BOUNDED, max_examples=30)
@given(changed({name: values.tolist() for name, values in COLUMNS.items()}) | ANY, st.booleans())
def test_columns_of_png_shards(tmp_path_factory, columns, as_folder):
    folder = run_of(tmp_path_factory.mktemp("run") / "run", "png")
    (folder.file(folder.shards()[0]) / "columns.json").write_text(json.dumps(columns))
    approved(folder)
    fails_as_ours(merge, folder.path, folder.path.parent / ("out" if as_folder else "out.tar"))


# --- data sets

PICTURE = io.BytesIO()
Image.fromarray(np.zeros((3, 3), np.uint8)).save(PICTURE, "png")


def a_tar(names):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PICTURE.getvalue())
            archive.addfile(info, io.BytesIO(PICTURE.getvalue()))
    return content.getvalue()


def a_parquet(columns):
    arrow, content = pytest.importorskip("pyarrow"), io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), content)
    return content.getvalue()


@settings(BOUNDED, max_examples=60)
@given(st.data(), st.sampled_from(["a.tar", "a.parquet", "table.parquet"]))
def test_damaged_data_sets(tmp_path, data, name):
    good = {
        "a.tar": lambda: a_tar(["a.png", "a.cls", "b.png", "b.cls"]), "table.parquet": lambda: a_parquet({"x": [0.5, 1]}),
        "a.parquet": lambda: a_parquet({"image": [{"bytes": PICTURE.getvalue(), "path": "a"}] * 2, "label": [0, 1]}),
    }[name]()  # fmt: skip
    (tmp_path / name).write_bytes(data.draw(damaged(good)))
    fails_as_ours(lambda: load_labelled(tmp_path / name, images_only=False))


@settings(BOUNDED, max_examples=60)
@given(st.data(), st.sampled_from(["table", "images"]))
def test_damaged_parquet_shards(tmp_path_factory, data, what):
    pytest.importorskip("pyarrow")
    batch = replace(BATCH, images=IMAGES[:, 0, 0])
    folder = Folder.claim(tmp_path_factory.mktemp("run") / "run", Configuration(pair="digits", ids="0-1", format="parquet"), {})
    folder.write(folder.shards()[0], batch, {})
    shard = folder.file(folder.shards()[0])
    other = a_parquet({"image": [PICTURE.getvalue()] * 2, "ids": [0, 1]})
    shard.write_bytes(data.draw(damaged(shard.read_bytes() if what == "table" else other)))
    approved(folder)
    fails_as_ours(merge, folder.path, folder.path.parent / "out.parquet")


def test_a_wav_shard_that_holds_something_else(tmp_path):
    pytest.importorskip("soundfile")
    folder = Folder.claim(tmp_path / "run", Configuration(pair="digits", ids="0-1", format="wav"), {})
    folder.write(folder.shards()[0], replace(BATCH, images=IMAGES[:, 0, 0]), {})
    (folder.file(folder.shards()[0]) / "000001.wav").write_bytes(b"RIFF")
    approved(folder)
    assert fails_as_ours(merge, folder.path, tmp_path / "out")


@pytest.mark.parametrize("size", [2**29, 2**60])
def test_a_member_that_says_it_is_huge_is_not_read(tmp_path, size):
    header = tarfile.TarInfo("a.png")
    header.size = size
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(fr.InputError, match=r"cannot be read as images|a member of [\d,]+ bytes; wanted at most 268,435,456"):
        load_labelled(tmp_path / "a.tar")


def test_a_parquet_file_that_says_it_has_very_many_rows_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    with pytest.importorskip("pyarrow.parquet").ParquetWriter(
        tmp_path / "a.parquet", arrow.schema({"x": arrow.int8()})
    ) as writer:
        for _ in range(2):
            writer.write_table(arrow.table({"x": arrow.nulls(6 * 10**7, arrow.int8())}), row_group_size=10**8)
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    with pytest.raises(fr.InputError, match="have 120,000,000 rows; wanted 1 to 100,000,000"):
        load_labelled(tmp_path / "a.parquet")


# --- paths that lead out


@pytest.fixture
def nothing_elsewhere(tmp_path):
    """A folder to work in; what stands beside it may not change."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "columns.json").write_text("precious")

    def there():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "own")}

    before = there()
    (tmp_path / "own").mkdir()
    yield tmp_path / "own"
    assert there() == before


def slipping_tar(path, outside):
    """A shard with members that unpacked would lie elsewhere, and links."""
    with tarfile.open(path, "w") as archive:
        for row, name in enumerate(("../../evil", str(outside / "evil"))):
            picture = io.BytesIO()
            Image.fromarray(np.full((3, 3), row, np.uint8)).save(picture, "png")
            for suffix, content in (("png", picture.getvalue()), ("json", json.dumps({"ids": row}).encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("000000009.png")
            info.type, info.linkname = kind, str(outside / "columns.json")
            archive.addfile(info)


@pytest.mark.parametrize("output", ["out.tar", "out.npz", "out"])
def test_members_of_a_tar_are_never_unpacked(nothing_elsewhere, output):
    folder = run_of(nothing_elsewhere / "run", "wds")
    slipping_tar(folder.file(folder.shards()[0]), nothing_elsewhere.parent / "other")
    approved(folder)
    assert merge(folder.path, nothing_elsewhere / output) == 2
    if output == "out.tar":
        with tarfile.open(nothing_elsewhere / output) as archive:
            assert [n for n in archive.getnames() if n.endswith("png")] == ["000000000.png", "000000001.png"]


def test_members_of_an_npz_are_names_of_arrays_only(nothing_elsewhere):
    path = nothing_elsewhere / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../evil.npy", str(nothing_elsewhere.parent / "evil.npy")):
            with archive.open(name, "w") as member:
                np.lib.format.write_array(member, np.zeros((2, 3, 3, 1), np.uint8))
    assert load_labelled(path)[0].shape == (2, 1, 3, 3) and len(load_conditions(path)) == 2
    folder = run_of(nothing_elsewhere / "run", "npz")
    shard = folder.file(folder.shards()[0])
    with zipfile.ZipFile(shard, "a") as archive, archive.open("../../evil.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros(2))
    approved(folder)
    assert merge(folder.path, nothing_elsewhere / "out") == 2


def test_members_of_a_webdataset_are_never_unpacked(nothing_elsewhere):
    slipping_tar(nothing_elsewhere / "a.tar", nothing_elsewhere.parent / "other")
    images, labels = load_labelled(nothing_elsewhere / "a.tar")
    assert len(images) == 2 and labels is None and [p.name for p in nothing_elsewhere.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("leads", ["../secret.png", "absolute", "link.png", "a\0b", "x" * 5000])
def test_pictures_that_a_parquet_file_names_lie_in_its_folder(tmp_path, leads):
    (tmp_path / "secret.png").write_bytes(PICTURE.getvalue())
    own = tmp_path / "data"
    own.mkdir()
    (own / "link.png").symlink_to(tmp_path / "secret.png")
    (own / "a.png").write_bytes(PICTURE.getvalue())
    (own / "a.parquet").write_bytes(a_parquet({"image": [{"bytes": None, "path": "a.png"}]}))
    assert load_labelled(own / "a.parquet")[0].shape == (1, 1, 3, 3)
    path = str(tmp_path / "secret.png") if leads == "absolute" else leads
    (own / "a.parquet").write_bytes(a_parquet({"image": [{"bytes": None, "path": path}]}))
    for source in (own, own / "a.parquet"):
        with pytest.raises(fr.InputError, match="leads out of|is no path|File name too long"):
            load_labelled(source)


@pytest.mark.parametrize("ids", [["../../../other/columns", 1], [0, 7], [-1, 0], [0.0, 1.5], [1, 0]])
def test_ids_in_a_shard_name_no_other_files(nothing_elsewhere, ids):
    folder = run_of(nothing_elsewhere / "run", "png")
    (folder.file(folder.shards()[0]) / "columns.json").write_text(json.dumps({"ids": ids}))
    approved(folder)
    with pytest.raises(fr.InputError):
        merge(folder.path, nothing_elsewhere / "out")
    assert not (nothing_elsewhere / "out").exists()


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_link_in_the_place_of_a_shard_is_replaced_and_not_written_through(nothing_elsewhere, kind):
    folder = run_of(nothing_elsewhere / "run", kind)
    shard, other = folder.file(folder.shards()[0]), nothing_elsewhere.parent / "other"
    shard.rename(nothing_elsewhere / "moved")
    shard.symlink_to(other if kind == "png" else other / "columns.json")
    folder.write(folder.shards()[0], BATCH, {})
    assert not shard.is_symlink() and len(folder.read(folder.shards()[0])[0]) == 2


def test_shards_of_different_sizes_are_not_merged(tmp_path):
    folder = Folder.claim(tmp_path / "run", Configuration(pair="digits", ids="0-3", shard_size=2), {})
    for shard, images in zip(folder.shards(), (IMAGES, torch.zeros(2, 1, 4, 4)), strict=True):
        folder.write(shard, replace(BATCH, images=images, columns={"ids": np.array(shard.ids)}), {})
    with pytest.raises(fr.InputError, match=r"samples of \(4, 4, 1\), the shards before it of \(3, 3, 1\)"):
        merge(folder.path, tmp_path / "out.npz")
    assert not list(tmp_path.glob("out*"))


def test_blobs_that_are_a_link_are_not_part_of_a_snapshot(pair, tmp_path):
    snapshot = tmp_path / "models--me--gan" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    config = json.loads((pair / "config.json").read_text())
    for role in ("generator", "discriminator"):
        config[role]["weights"] = f"../../blobs/{role}.safetensors"
    (snapshot / "config.json").write_text(json.dumps(config))
    (tmp_path / "models--me--gan" / "blobs").symlink_to(pair)
    with pytest.raises(fr.InputError, match="leads out of"):
        fr.load_pair(snapshot)


def test_a_model_card_that_is_a_link_is_not_sent_to_the_hub(pair, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("a key")
    copy = shutil.copytree(pair, tmp_path / "pair")
    (copy / "README.md").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(hub, "_hub", lambda what: SimpleNamespace())
    with pytest.raises(fr.InputError, match="names 'README.md', which leads out of"):
        fr.push_pair(copy, "me/gan")


def test_a_revision_of_the_hub_is_no_path():
    assert hub.NAME.fullmatch("me/gan@v1.0/a") and not hub.NAME.fullmatch("me/gan@../../x")


@pytest.mark.parametrize("weights", ["a\0b", "\ud800", "loop", "loop/x", "x" * 5000])
def test_weights_with_impossible_names(pair, tmp_path, weights):
    copy = shutil.copytree(pair, tmp_path / "pair")
    (copy / "loop").symlink_to("loop")
    config = json.loads((copy / "config.json").read_text())
    config["generator"]["weights"] = weights
    (copy / "config.json").write_text(json.dumps(config))
    assert fails_as_ours(fr.load_pair, copy)


@pytest.mark.parametrize("values", [
    {"percentile": 10**400}, {"budget": 10**400}, {"image_range": [0, 10**400]}, {"stop": 10**400}, {"ids": "9" * 5000},
    {"ids": "0-" + "9" * 30}, {"seed": 10**400}, {"ids": "²"}, {"max_steps": float("nan")},
])  # fmt: skip
def test_numbers_that_fit_no_type(values):
    assert fails_as_ours(Configuration.from_json, {"pair": "digits", **values})


def test_documents_without_an_end(tmp_path, pair):
    deep = "[" * 100_000
    folder = run_of(tmp_path / "run", "npz")
    folder.marker(folder.shards()[0]).write_text(deep)
    assert "cannot be read" in folder.problem(folder.shards()[0])
    (folder.path / MANIFEST).write_text(deep)
    copy = shutil.copytree(pair, tmp_path / "pair")
    (copy / "config.json").write_text(deep)
    assert fails_as_ours(verify, folder.path) and fails_as_ours(fr.load_pair, copy)
