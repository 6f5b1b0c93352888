"""FAULTS 23 and 24: runs in shards: bytes depend on the configuration alone; damage is found."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastrefine as fr
from fastrefine.cli import cli
from fastrefine.errors import InputError
from fastrefine.networks.target import Target
from fastrefine.production import formats, per_image_selection, run_folder
from fastrefine.production.configuration import Configuration, ranges
from fastrefine.production.worker import Worker

BASE = Configuration(pair="digits", ids="3-40,45,50-117", shard_size=50, max_steps=4, num_slots=16)
COUNT = 38 + 1 + 68


def merged(path):
    output = path / ".." / f"{path.name}.npz"
    run_folder.merge(path, output)
    return output.read_bytes()


@pytest.fixture(scope="module")
def worker():
    return Worker(BASE)


@pytest.fixture(scope="module")
def whole(worker, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    worker.run(path)
    return path


def command(outdir, *more, ids="0-199", **options):
    arguments = [sys.executable, "-m", "fastrefine", "refine", "--pair", "digits", "--ids", ids, "--outdir", str(outdir)]
    arguments += ["--shard-size", "20", "--max-steps", "3", "--slots", "16", *more]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)


# --- ranges and configurations


def test_seeds_are_ranges_that_ascend():
    assert ranges("0-2,5,7-7") == [range(3), range(5, 6), range(7, 8)]
    for wrong in ("", "a", "3-1", "0-5,5", "5,3", "-3", "1-"):
        with pytest.raises(InputError, match="ids"):
            ranges(wrong)


def test_shards_lie_on_one_grid_whatever_the_range():
    one = {s.index: s.ids for s in run_folder.shards(replace(BASE, ids="0-199"))}
    other = {s.index: s.ids for s in run_folder.shards(replace(BASE, ids="60-160"))}
    assert one[2] == other[2] == list(range(100, 150)) and other[1] == list(range(60, 100))
    assert [s.index for s in run_folder.shards(replace(BASE, ids="0-9,500-509"))] == [0, 10]


def test_a_configuration_comes_back_from_its_json_and_an_unknown_name_is_refused():
    configuration = replace(BASE, stop="median", real="digits", image_range=(0.0, 1.0))
    assert Configuration.from_json(json.loads(json.dumps(configuration.to_json()))) == configuration
    with pytest.raises(InputError, match="step_sizes"):
        Configuration.from_json({"pair": "digits", "step_sizes": 3})


# --- what is written


def test_shards_hold_the_refiners_own_samples_by_seed(whole, worker):
    pixels, columns = (
        np.concatenate(x) for x in zip(*((p, c["ids"]) for p, c in run_folder.Folder.open(whole).parts()), strict=True)
    )
    expected = worker.refiner.sample(118, seed=0)
    levels = torch.floor(127.5 * expected.images[columns] + 128).clamp(0, 255).byte()
    assert columns.tolist() == [*range(3, 41), 45, *range(50, 118)]
    assert np.array_equal(pixels, levels.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(worker, whole, tmp_path, workers):
    for i in reversed(range(workers)):
        worker.run(tmp_path / "run", worker=i, workers=workers)
    assert merged(tmp_path / "run") == merged(whole)


@pytest.mark.parametrize("select", ["mh", "drs", "obrs"])
def test_selection_depends_on_neither_shard_size_nor_workers(tmp_path, monkeypatch, select):
    monkeypatch.setattr(per_image_selection, "PILOT", 64)
    found = []
    for size, workers in ((50, 1), (17, 2)):
        configuration = replace(BASE, select=select, chain_length=3, shard_size=size, real="digits")
        path = tmp_path / f"{size}"
        for i in range(workers):
            Worker(configuration).run(path, worker=i, workers=workers)
        found.append(merged(path))
    assert found[0] == found[1]


def test_every_format_holds_the_same_images_and_columns(tmp_path):
    found = {}
    for kind in ("npz", "png", "wds", "safetensors"):
        configuration = replace(BASE, format=kind, select="mh", chain_length=2, classes=None)
        path = tmp_path / kind
        Worker(configuration).run(path)
        assert run_folder.verify(path).complete
        found[kind] = list(run_folder.Folder.open(path).parts())
    for parts in found.values():
        for (pixels, columns), (expected, facts) in zip(parts, found["npz"], strict=True):
            assert np.array_equal(pixels, expected)
            assert {k: v.tolist() for k, v in columns.items()} == {k: v.tolist() for k, v in facts.items()}


# --- what readers of these formats see


def test_the_merged_npz_is_as_the_adm_evaluator_wants_it(whole, tmp_path):
    path = tmp_path / "a.npz"
    assert run_folder.merge(whole, path) == COUNT
    # ADM reads the member arr_0.npy, its header, then rows
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        rows = np.frombuffer(member.read(), np.uint8).reshape(shape)
    assert shape == (COUNT, 8, 8, 1) and not fortran and dtype == np.uint8
    assert np.array_equal(rows, np.load(path)["arr_0"])


def test_the_png_tree_holds_a_file_for_each_seed(whole, tmp_path):
    run_folder.merge(whole, tmp_path / "png")
    pixels, columns = next(run_folder.Folder.open(whole).parts())
    for row, seed in enumerate(columns["ids"].tolist()):
        image = np.asarray(Image.open(tmp_path / "png" / "000000" / f"{seed:06d}.png"))
        assert np.array_equal(image, pixels[row, ..., 0])
    assert len(list((tmp_path / "png").rglob("*.png"))) == COUNT


def test_webdataset_reads_the_tar(whole, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    run_folder.merge(whole, path)
    rows = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("l"))
    assert len(rows) == COUNT and rows[0]["__key__"] == "000000003"
    assert rows[0]["json"]["ids"] == 3 and rows[0]["png"].shape == (8, 8)


def test_labels_become_arr_1_and_cls_files(tmp_path):
    batch = formats.Batch(torch.zeros(3, 3, 2, 2), {"ids": np.arange(3), "labels": np.array([4, 5, 6])}, (-1.0, 1.0))
    formats.write("npz", tmp_path / "a.npz", batch)
    formats.merge_npz(tmp_path / "m.npz", 3, iter([formats.read("npz", tmp_path / "a.npz", (-1.0, 1.0))]))
    assert np.load(tmp_path / "m.npz")["arr_1"].tolist() == [4, 5, 6]
    formats.write("wds", tmp_path / "a.tar", batch)
    assert formats.read("wds", tmp_path / "a.tar", (-1.0, 1.0))[1]["labels"].tolist() == [4, 5, 6]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_the_ends_of_the_range_are_black_and_white(low, high):
    images = torch.tensor([low, (low + high) / 2, high]).view(3, 1, 1, 1)
    assert formats.Batch(images, {}, (low, high)).values().ravel().tolist() == [0, 128, 255]


# --- faults


@pytest.mark.parametrize("damage", ["cut", "gone", "marker", "changed", "foreign marker"])
def test_a_damaged_shard_is_found_and_made_anew(worker, whole, tmp_path, damage):
    path = tmp_path / "run"
    worker.run(path)
    file, marker = path / "shard-000001.npz", path / "shard-000001.npz.done.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "gone":
        file.unlink()
    elif damage == "marker":
        marker.write_text("{")
    elif damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"identity": "another"}))
    verdict = run_folder.verify(path)
    assert not verdict.complete and verdict.damaged[0][0] == file.name
    with pytest.raises(InputError, match="made|anew"):
        run_folder.merge(path, tmp_path / "m.npz")
    assert not (tmp_path / "m.npz").exists()
    outcome = worker.run(path)
    assert (outcome.made, outcome.found) == (1, 2)
    assert merged(path) == merged(whole)


def test_a_foreign_file_is_left_alone_and_named(worker, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    worker.run(path)
    assert run_folder.verify(path).foreign == ["notes.txt"] and (path / "notes.txt").read_text() == "mine"


def test_another_configuration_in_the_folder_is_refused_and_named(whole):
    with pytest.raises(InputError, match=r"another configuration \(differs in max_steps"):
        Worker(replace(BASE, max_steps=5)).run(whole)


def test_other_weights_in_the_folder_are_refused(whole, monkeypatch):
    other = Worker(BASE)
    other.facts["generator_sha256"] = "0" * 64
    with pytest.raises(InputError, match="generator_sha256"):
        other.run(whole)


def test_a_writer_that_fails_leaves_no_shard_under_its_name(worker, tmp_path, monkeypatch):
    path = tmp_path / "run"

    def full(*_):
        raise OSError(28, "No space left on device")

    worker.folder(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        worker.run(path)
    assert [p.name for p in path.iterdir()] == ["manifest.json"]
    monkeypatch.undo()
    assert worker.run(path).made == 3


def test_a_run_whose_layer_is_wrong_claims_no_folder(tmp_path):
    with pytest.raises(fr.SplitError, match="act9"):
        Worker(replace(BASE, at="act9")).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_are_not_merged_into_a_folder_that_holds_something(whole, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "real.png").touch()
    with pytest.raises(InputError, match="not empty"):
        run_folder.merge(whole, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["real.png"]


@pytest.mark.parametrize("name", ["m.npz", "m.tar"])
def test_a_merge_that_fails_leaves_no_file(whole, tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run_folder.merge(whole, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_neighbouring_shards_are_one_stream(monkeypatch, tmp_path):
    """Slots run empty once a share, not once a shard."""
    worker, streams = Worker(BASE), []
    stream = worker.refiner.stream
    monkeypatch.setattr(worker.refiner, "stream", lambda n, **more: streams.append((more["first_id"], n)) or stream(n, **more))
    worker.run(tmp_path / "run")
    assert streams == [(3, 38), (45, 1), (50, 68)]


def test_where_memory_runs_out_the_marker_tells_how_many_slots_were_left(tmp_path, monkeypatch):
    """FAULTS 22: from there on the run has fewer slots, the shards before keep theirs."""
    worker, calls = Worker(BASE), []
    evaluate = Target.evaluate

    def short_of_memory(target, a, context, view=None):
        calls.append(len(a))
        if len(a) > 8 and len(calls) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(target, a, context, view)

    monkeypatch.setattr(Target, "evaluate", short_of_memory)
    worker.run(tmp_path / "run")
    told = [json.loads((tmp_path / "run" / f"shard-00000{i}.npz.done.json").read_text())["num_slots"] for i in range(3)]
    assert told == [16, 8, 8]
    assert run_folder.verify(tmp_path / "run").complete


def test_a_selection_by_a_discriminator_that_is_no_density_ratio_warns_once(tmp_path):
    worker = Worker(replace(BASE, select="mh", chain_length=3, stop="median", real="digits"))
    with pytest.warns(fr.FastrefineWarning, match="select=mh: D's logits are no density ratio") as told:
        worker.run(tmp_path / "run")
    assert len(told) == 1


# --- the selection's laws


def test_chains_by_image_are_those_of_metropolis_hastings():
    logits = torch.randn(40 * 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    chooser = per_image_selection.Chooser(replace(BASE, select="mh", chain_length=5, seed=7), {})
    position, moved = chooser.choose(logits.view(40, 5), torch.arange(40))
    expected = fr.metropolis_hastings(logits, 5, seed=7)
    assert torch.equal(torch.arange(40) * 5 + position, expected.indices) and torch.equal(moved, expected.moved)


@pytest.mark.parametrize("select", ["drs", "obrs"])
def test_rejection_by_image_accepts_what_one_pass_with_the_pilots_figures_would(select):
    logits = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    configuration = replace(BASE, select=select, chain_length=1, budget=0.3, seed=3)
    chooser = per_image_selection.Chooser.piloted(configuration, logits)
    _, selected = chooser.choose(logits.view(-1, 1), torch.arange(4000))
    whole = fr.rejection_sample(logits, seed=3) if select == "drs" else fr.budgeted_rejection(logits, 0.3, seed=3)
    assert torch.equal(selected.nonzero()[:, 0], whole)


def test_the_first_accepted_proposal_is_taken_and_none_is_told():
    chooser = per_image_selection.Chooser(replace(BASE, select="obrs", chain_length=3), {None: {"log_scale": 0.0}})
    never = -math.inf
    table = torch.tensor([[never, 9.0, 9.0], [never, never, never], [9.0, never, 9.0]])
    position, selected = chooser.choose(table, torch.arange(3))
    assert position.tolist() == [1, 0, 0] and selected.tolist() == [True, False, True]


# --- the command


def test_a_killed_worker_and_a_stopped_one_are_taken_up_by_another_number_of_workers(tmp_path):
    configuration = replace(BASE, ids="0-499", shard_size=20, max_steps=60)
    path, arguments = tmp_path / "run", ["--ids", "0-499", "--shard-size", "20", "--max-steps", "60", "--slots", "16"]
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        started = subprocess.Popen(
            [sys.executable, "-m", "fastrefine", "refine", "--pair", "digits", "--outdir", str(path), *arguments],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
        )  # fmt: skip
        parts = set(path.glob("*.part"))
        before = len(list(path.glob("*.done.json"))) if path.exists() else 0
        until = time.monotonic() + 120
        while len(list(path.glob("*.done.json"))) == before and started.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        started.send_signal(how)
        _, told = started.communicate(timeout=60)
        assert started.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 3}[how], told
        if how != signal.SIGKILL:
            assert "To go on:\n  fastrefine refine --pair digits" in told
            assert set(path.glob("*.part")) <= parts
            assert f"stopped; {len(list(path.glob('*.done.json')))} finished shards are kept" in told
    done = {p: p.stat().st_mtime_ns for p in path.glob("shard-*.npz")}
    assert 0 < len(done) < 25
    worker = Worker(configuration)
    for shard in range(3):
        worker.run(path, worker=shard, workers=3)
    assert all(p.stat().st_mtime_ns == then for p, then in done.items()), "finished shards were made again"
    worker.run(tmp_path / "whole")
    assert merged(path) == merged(tmp_path / "whole")


def test_torchrun_starts_workers_that_share_the_shards(tmp_path):
    path = tmp_path / "run"
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", "fastrefine", "refine",
         "--pair", "digits", "--ids", "0-199", "--outdir", str(path), "--shard-size", "20", "--max-steps", "3",
         "--slots", "16"], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert launched.stderr.count("5 shards made") == 2
    Worker(replace(BASE, ids="0-199", shard_size=20, max_steps=3)).run(tmp_path / "one")
    assert merged(path) == merged(tmp_path / "one")


def test_verify_and_merge_tell_what_is_missing(tmp_path):
    Worker(replace(BASE, ids="0-199", shard_size=20, max_steps=1)).run(tmp_path / "run", worker=0, workers=2)
    told = CliRunner().invoke(cli, ["verify", str(tmp_path / "run")])
    assert told.exit_code == 3 and "missing  5 of 10 shards, first shard-000005.npz" in told.output
    told = CliRunner().invoke(cli, ["merge", str(tmp_path / "run"), "--output", str(tmp_path / "m.npz")])
    assert isinstance(told.exception, InputError) and not (tmp_path / "m.npz").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes read-only folders")
def test_a_read_only_folder_is_one_line(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    told = command(tmp_path / "run")
    assert told.returncode == 1 and "Permission denied" in told.stderr and "Traceback" not in told.stderr


def test_flags_win_over_the_configuration_file(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"pair": "digits", "ids": "0-19", "max_steps": 2, "stop": 0.5, "num_slots": 16}))
    arguments = ["refine", "--config", str(file), "--outdir", str(tmp_path / "run"), "--max-steps", "1"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]
    assert (told["max_steps"], told["stop"], told["ids"], told["num_slots"]) == (1, 0.5, "0-19", 16)
