"""FAULTS 24: a run's folder among others: workers that begin at once, foreign files, parts of the dead."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastrefine as fr
from fastrefine.cli import cli
from fastrefine.errors import InputError
from fastrefine.models import digits as networks
from fastrefine.production import formats, run_folder
from fastrefine.production.configuration import Configuration, Network
from fastrefine.production.run_folder import Folder
from fastrefine.production.worker import Worker

BASE = Configuration(pair="digits", ids="0-9", shard_size=5, max_steps=1, num_slots=8)
CODE = ("fastrefine.models.digits:digits_generator", "fastrefine.models.digits:digits_discriminator")
BATCH = formats.Batch(torch.zeros(2, 1, 4, 4), {"ids": np.arange(2)}, (-1.0, 1.0))
OTHERS_NAME = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def worker():
    return Worker(BASE)


@pytest.fixture
def run(worker, tmp_path):
    worker.run(tmp_path / "run")
    return tmp_path / "run"


def interrupted(monkeypatch, name, between):
    """os.``name`` calls ``between`` before its first call, as another worker would at that moment."""
    usual, calls = getattr(os, name), []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            between()
        return usual(*arguments)

    monkeypatch.setattr(os, name, call)


# --- several at once


def test_a_folder_may_be_claimed_while_another_worker_claims_it(tmp_path, monkeypatch):
    interrupted(monkeypatch, "link", lambda: Folder.claim(tmp_path, BASE, {}))
    assert Folder.claim(tmp_path, BASE, {}).identity == Folder.open(tmp_path).identity
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_threads_may_claim_a_folder_at_once(tmp_path):
    barrier = Barrier(8)

    def claim(path):
        barrier.wait()
        return Folder.claim(path, BASE, {}).identity

    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            assert len(set(pool.map(claim, [tmp_path / str(i)] * 8))) == 1


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_shard_may_be_written_while_another_worker_writes_it(tmp_path, monkeypatch, kind):
    path = tmp_path / "shard"
    interrupted(monkeypatch, "replace", lambda: formats.write(kind, path, BATCH))
    formats.write(kind, path, BATCH)
    assert [p.name for p in tmp_path.iterdir()] == ["shard"] and len(formats.read(kind, path, (-1.0, 1.0))[0]) == 2


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_parts_that_a_killed_worker_left_hinder_nobody(tmp_path, kind):
    (tmp_path / f"shard.{os.getpid()}.part").mkdir()
    formats.write(kind, tmp_path / "shard", BATCH)
    assert len(formats.read(kind, tmp_path / "shard", (-1.0, 1.0))[0]) == 2


# --- what is not the run's


@pytest.mark.parametrize(("kind", "name"), [
    ("npz", "shard-000000.npz"), ("npz", "shard-000001.npz.done.json"), ("png", "000001"),
])  # fmt: skip
def test_a_folder_without_manifest_that_holds_names_of_the_run_is_refused(tmp_path, kind, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(InputError, match=f"has no manifest.json, but holds {name}, .* wanted a new or empty --outdir"):
        Folder.claim(tmp_path, replace(BASE, format=kind), {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {name: b"precious"}


def test_a_shard_of_another_worker_that_claimed_the_folder_meanwhile_is_no_foreign_file(tmp_path, monkeypatch):
    folder = Folder.claim(tmp_path / "first", BASE, {})
    names = Folder.names

    def while_another_begins(claimed):  # between the look at the files and the look at the manifest
        found = names(claimed)
        if not (tmp_path / "run").joinpath(run_folder.MANIFEST).exists():
            (tmp_path / "run" / "shard-000000.npz").write_bytes(b"its shard")
            (tmp_path / "run" / run_folder.MANIFEST).write_bytes((folder.path / run_folder.MANIFEST).read_bytes())
        return found

    monkeypatch.setattr(Folder, "names", while_another_begins)
    assert Folder.claim(tmp_path / "run", BASE, {}).identity == folder.identity


def test_parts_of_the_runs_files_are_told_apart_from_foreign_files(run):
    ours = [f"manifest.json.{OTHERS_NAME}.part", f"shard-000001.npz.{OTHERS_NAME}.part"]
    for name in (*ours, "mine.part"):
        (run / name).touch()
    verdict = run_folder.verify(run)
    assert (verdict.leftovers, verdict.foreign, verdict.complete) == (ours, ["mine.part"], True)


def test_verify_shows_leftovers_in_text_and_json(run):
    name = f"shard-000001.npz.{OTHERS_NAME}.part"
    (run / name).touch()
    text, data = (CliRunner().invoke(cli, ["verify", str(run), *flags]).output for flags in ([], ["--json"]))
    assert f"leftover {name} (of a worker that was killed, or is at work" in text and "foreign" not in text
    assert json.loads(data)["leftovers"] == [name]


# --- merging into pictures


def test_a_cut_merge_into_pictures_leaves_nothing_and_can_be_repeated(run, tmp_path, monkeypatch):
    encoded, made = formats._encoded, []

    def until_the_disk_is_full(*given):
        for png in encoded(*given):
            made.append(png)
            if len(made) == 7:
                raise OSError(28, "No space left on device")
            yield png

    monkeypatch.setattr(formats, "_encoded", until_the_disk_is_full)
    with pytest.raises(OSError, match="No space"):
        run_folder.merge(run, tmp_path / "out" / "png")
    assert not list((tmp_path / "out").iterdir())
    assert run_folder.merge(run, tmp_path / "out" / "png") == len(list((tmp_path / "out").rglob("*.png"))) == 10


def test_pictures_may_be_merged_into_an_empty_folder(run, tmp_path, monkeypatch):
    (tmp_path / "png").mkdir()
    monkeypatch.chdir(tmp_path / "png")
    run_folder.merge(run, (tmp_path / "png").relative_to(tmp_path / "png"))  # Path(".")
    assert len(list((tmp_path / "png" / "000000").iterdir())) == 10 and len(list(tmp_path.iterdir())) == 2


def test_pictures_may_be_merged_into_a_mount_point(run, tmp_path, monkeypatch):
    (tmp_path / "png").mkdir()
    replace_file = os.replace

    def busy(source, target):
        if Path(target) == tmp_path / "png":
            raise OSError(16, "Device or resource busy")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", busy)
    assert run_folder.merge(run, tmp_path / "png") == len(list((tmp_path / "png" / "000000").glob("*.png"))) == 10
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_pictures_are_not_merged_over_a_file(run, tmp_path):
    (tmp_path / "png").write_bytes(b"precious")
    with pytest.raises(InputError, match="is a file; wanted a new folder"):
        run_folder.merge(run, tmp_path / "png")
    assert (tmp_path / "png").read_bytes() == b"precious"


# --- what a run depends on


def saved(folder, seed=0, **more):
    torch.manual_seed(seed)
    g, d = networks.digits_generator().eval(), networks.digits_discriminator().eval()
    torch.save(g.state_dict(), folder / "g.pt")
    torch.save(d.state_dict(), folder / "d.pt")
    fr.save_pair(folder / "pair", g, d, prior=fr.Normal(32), **{"code": CODE, **more})
    np.savez(folder / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))


@pytest.mark.parametrize("how", ["pair", "networks"])
def test_a_run_is_taken_up_from_another_working_directory(tmp_path, monkeypatch, how):
    saved(tmp_path)
    (tmp_path / "inner").mkdir()

    def configuration(prefix):
        given = {"pair": f"{prefix}pair"} if how == "pair" else {
            "prior": {"name": "normal", "shape": [32]}, "generator": Network(CODE[0], weights=f"{prefix}g.pt"),
            "discriminator": Network(CODE[1], weights=f"{prefix}d.pt"),
        }  # fmt: skip
        return Configuration(**given, real=f"{prefix}real.npz", stop="median", ids="0-9", max_steps=1, num_slots=8)

    monkeypatch.chdir(tmp_path)
    Worker(configuration("")).run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "inner")
    assert Worker(configuration("../")).run(tmp_path / "run").found == 1
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]
    assert told["real"] == "real.npz" and (told["pair"] or told["generator"]["weights"]) in ("pair", "g.pt")


def test_another_pair_with_the_same_weights_is_another_run(tmp_path):
    for name, code in (("a", CODE), ("b", (CODE[0], f"{__name__}:steeper"))):
        (tmp_path / name).mkdir()
        saved(tmp_path / name, code=code)
    Worker(replace(BASE, pair=str(tmp_path / "a" / "pair"))).folder(tmp_path / "run")
    with pytest.raises(InputError, match=r"another configuration \(differs in code\)"):
        Worker(replace(BASE, pair=str(tmp_path / "b" / "pair")), trust_code=True).folder(tmp_path / "run")


def steeper():
    """The discriminator with other activations."""
    module = networks.digits_discriminator()
    for layer in module.modules():
        if isinstance(layer, torch.nn.LeakyReLU):
            layer.negative_slope = 0.5
    return module


# --- ranges and formats


class Unsigned(torch.nn.Module):
    """(N, 4) -> (N, C, 4, 4) in 0 to 1."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels, self.out = channels, torch.nn.Linear(4, 16 * channels)

    def forward(self, z):
        return torch.sigmoid(self.out(z)).view(-1, self.channels, 4, 4)


class Judge(torch.nn.Sequential):
    """(N, C, 4, 4) -> (N, 1)."""

    def __init__(self, channels=1):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(16 * channels, 1))


def unsigned(folder, channels=1):
    """The path of a pair whose images lie in 0 to 1, and that of real images."""
    torch.manual_seed(0)
    fr.save_pair(
        folder / "pair", Unsigned(channels), Judge(channels), code=(f"{__name__}:Unsigned", f"{__name__}:Judge"),
        arguments=({"channels": channels}, {"channels": channels}), prior=fr.Normal(4), image_range=(0.0, 1.0),
    )  # fmt: skip
    np.savez(folder / "real.npz", arr_0=np.arange(256, dtype=np.uint8).reshape(16, 4, 4, 1))
    return str(folder / "pair"), str(folder / "real.npz")


def test_real_images_are_scaled_to_the_range_of_the_pair(tmp_path):
    pair, real = unsigned(tmp_path)
    made = Worker(Configuration(pair=pair, real=real, stop="median", ids="0-9", max_steps=1, num_slots=8))
    assert torch.allclose(made.refiner.real.flatten(), torch.arange(256) / 255)
    assert made.run(tmp_path / "run").images == 10


def test_real_images_of_the_usual_range_keep_their_bits(tmp_path):
    from fastrefine.production.images import load_labelled

    assert torch.equal(Worker(replace(BASE, real="digits")).refiner.real, load_labelled("digits")[0])


@pytest.mark.parametrize("how", ["pair", "networks"])
def test_shape_scales_real_images_to_the_range_of_the_generator(tmp_path, how):
    pair, real = unsigned(tmp_path)
    given = ["--pair", pair] if how == "pair" else [
        "--generator", f"{__name__}:Unsigned", "--generator-weights", f"{pair}/generator.safetensors", "--discriminator",
        f"{__name__}:Judge", "--discriminator-weights", f"{pair}/discriminator.safetensors", "--prior",
        '{"name": "normal", "shape": [4]}', "--image-range", "0", "1",
    ]  # fmt: skip
    more = ["--real", real, "--iterations", "1", "--batch-size", "8", "--max-steps", "1"]
    done = CliRunner().invoke(cli, ["shape", *given, *more, "--outdir", str(tmp_path / "shaped")], standalone_mode=False)
    assert done.exception is None and (tmp_path / "shaped" / "discriminator.safetensors").exists()


def test_real_floats_in_the_range_of_the_pair_are_not_scaled_twice(tmp_path):
    pair, _ = unsigned(tmp_path)
    np.savez(tmp_path / "floats.npz", arr_0=np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 1, 4, 4))
    with pytest.raises(InputError, match=r"are they 0..1\? Scale them by 2 x - 1"):
        Worker(Configuration(pair=pair, real=str(tmp_path / "floats.npz")))


@pytest.mark.parametrize(("flags", "wanted"), [((), [0.0, 1.0]), (("--image-range", "-1", "1"), [-1.0, 1.0])])
def test_an_image_range_that_is_given_wins_over_the_pairs(tmp_path, flags, wanted):
    given = ["--pair", unsigned(tmp_path)[0], "--ids", "0-3", "--max-steps", "1", "--outdir", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, ["refine", *given, *flags], standalone_mode=False)
    assert done.exception is None
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["image_range"] == wanted


def test_the_range_is_the_usual_one_where_neither_flags_nor_pair_give_any(worker):
    assert BASE.image_range is None and worker.configuration.image_range == (-1.0, 1.0)


@pytest.mark.parametrize("kind", ["png", "wds"])
def test_a_format_that_cannot_hold_the_channels_claims_no_folder(tmp_path, kind):
    pair, _ = unsigned(tmp_path, channels=2)
    wanted = rf"the {kind} format holds images \(C, H, W\) of 1, 3 or 4 channels, got samples of shape \(2, 4, 4\); use npz"
    with pytest.raises(InputError, match=wanted):
        Worker(Configuration(pair=pair, format=kind)).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
