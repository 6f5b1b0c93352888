"""A run on disk grows: more ids in the same folder, the bytes of one go, nothing made twice. Calibrated selection."""

import json
import warnings
from dataclasses import replace

import click
import pytest
import torch

import fastrefine as fr
from fastrefine.production import per_image_selection, run_folder
from fastrefine.production.configuration import Configuration, contains, in_ranges
from fastrefine.production.worker import Worker
from tests.support import flat_pairs
from tests.support.commands import fastrefine, told


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pair, real = flat_pairs.saved(tmp_path_factory.mktemp("pair"))
    return Configuration(pair=str(pair), real=str(real), stop=-2.0, max_steps=30, num_slots=8, shard_size=20, ids="0-29")


def worker(configuration):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fr.FastrefineWarning)
        return Worker(configuration)


def shards(path):
    """The bytes of all shards, by name."""
    folder = run_folder.Folder.open(path)
    assert run_folder.verify(path).complete
    files = [folder.file(shard) for shard in folder.shards()]
    parts = [sorted(file.iterdir()) if file.is_dir() else [file] for file in files]
    return {str(part.relative_to(path)): part.read_bytes() for some in parts for part in some}


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


@pytest.mark.parametrize("change", [
    {"format": "npz"}, {"format": "png", "image_range": (-1.5, 1.5)}, {"format": "safetensors"},
    {"format": "wds", "select": "mh", "chain_length": 3}, {"select": "drs", "chain_length": 3, "calibrate": "isotonic"},
], ids=lambda change: "-".join(map(str, change.values())))  # fmt: skip
def test_a_grown_run_has_the_bytes_of_one_go(base, tmp_path, monkeypatch, change):
    monkeypatch.setattr(per_image_selection, "PILOT", 64)
    first = replace(base, **change)
    then = replace(first, ids="0-54,70")
    worker(first).run(tmp_path / "grown")
    old, before = shards(tmp_path / "grown"), manifest(tmp_path / "grown")
    one = worker(then)
    made, stream, length = [], one.refiner.stream, then.proposals
    monkeypatch.setattr(
        one.refiner, "stream", lambda n, **more: made.append((more["first_id"] // length, n // length)) or stream(n, **more)
    )
    outcome = one.run(tmp_path / "grown")
    assert made == [(30, 25), (70, 1)] and (outcome.found, outcome.made, outcome.images, outcome.refined) == (1, 3, 56, 26)
    one.run(tmp_path / "whole")
    grown, whole = shards(tmp_path / "grown"), shards(tmp_path / "whole")
    assert grown == whole and all(grown[name] == old[name] for name in old if "000000" in name.partition("/")[0])
    after, direct = manifest(tmp_path / "grown"), manifest(tmp_path / "whole")
    assert after["configuration"]["ids"] == "0-54,70" and before["identity"] == after["identity"] == direct["identity"]
    for name in ("images", "logit_before", "logit_after", "mean_steps", "status", "of", "complete", "findings"):
        assert after["summary"][name] == pytest.approx(direct["summary"][name]) if name.startswith("logit") else (
            after["summary"][name] == direct["summary"][name]
        ), name  # fmt: skip
    assert run_folder.merge(tmp_path / "grown", tmp_path / "grown.npz") == 56


def test_several_workers_grow_a_run_and_the_summary_is_that_of_the_whole(base, tmp_path):
    one = worker(base)
    one.run(tmp_path / "run", worker=0, workers=2)
    part = manifest(tmp_path / "run")["summary"]
    assert not part["complete"] and (part["images"], part["of"]) == (20, 30)
    more = worker(replace(base, ids="0-79"))
    for number in (1, 0, 2):
        more.run(tmp_path / "run", worker=number, workers=3)
    more.run(tmp_path / "whole")
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")
    columns = [columns for _, columns in run_folder.Folder.open(tmp_path / "run").parts()]
    summary = manifest(tmp_path / "run")["summary"]
    assert summary["complete"] and summary["images"] == 80
    assert summary["mean_steps"] == pytest.approx(sum(c["steps"].sum() for c in columns) / 80)
    assert summary["logit_after"] == pytest.approx(sum(c["logits"].sum() for c in columns) / 80, abs=1e-5)


def test_a_run_that_is_cut_while_it_grows_goes_on(base, tmp_path, monkeypatch):
    worker(base).run(tmp_path / "run")
    more = worker(replace(base, ids="0-54"))
    monkeypatch.setattr(run_folder.Folder, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        more.run(tmp_path / "run")
    monkeypatch.undo()
    found = run_folder.verify(tmp_path / "run")
    assert found.images == 20 and [name for name, _ in found.damaged] == ["shard-000001.npz"] and len(found.missing) == 1
    more.run(tmp_path / "run")
    more.run(tmp_path / "whole")
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")


def test_damaged_images_are_not_kept(base, tmp_path):
    worker(base).run(tmp_path / "run")
    file = tmp_path / "run" / "shard-000001.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    more = worker(replace(base, ids="0-39"))
    assert more.run(tmp_path / "run").refined == 20
    more.run(tmp_path / "whole")
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")


def test_what_is_no_growth_is_refused_in_words(base, tmp_path):
    path = tmp_path / "run"
    worker(base).run(path)
    for ids in ("0-28", "1-40", "100-199"):
        with pytest.raises(fr.InputError, match=f"holds the run of the images 0-29, and {ids} leaves some of them out"):
            worker(replace(base, ids=ids)).run(path)
    with pytest.raises(fr.InputError, match="another configuration .differs in max_steps, ids"):
        worker(replace(base, ids="0-39", max_steps=5)).run(path)
    assert manifest(path)["configuration"]["ids"] == "0-29" and run_folder.verify(path).complete


def test_a_manifest_of_before_goes_on_and_a_wider_one_is_not_narrowed(base, tmp_path):
    path, old = tmp_path / "run", worker(base)
    old.run(path)
    there = manifest(path)
    del there["summary"], there["configuration"]["calibrate"], there["configuration"]["held_out"]
    there["configuration"]["seeds"] = there["configuration"].pop("ids")
    (path / "manifest.json").write_text(json.dumps(there | {"identity": there["identity"]}))
    assert old.run(path).found == 2
    folder = old.folder(path)
    worker(replace(base, ids="0-39")).run(path)
    folder.record(lambda: old.summary(folder))  # a worker of the smaller run, which ends late
    assert manifest(path)["configuration"]["ids"] == "0-39" and manifest(path)["summary"]["of"] == 40


def test_ids_contain_others():
    assert (
        contains("0-9,10-20", "3-15") and contains("5", "5") and not contains("0-9,11", "9-11") and not contains("1-3", "0-3")
    )
    assert in_ranges([0, 1, 2, 5, 7, 8]) == (range(3), range(5, 6), range(7, 9)) and in_ranges([]) == ()


# --- calibrated selection


@pytest.mark.parametrize("select", ["mh", "drs", "obrs"])
def test_a_calibrated_selection_is_the_selection_by_calibrated_logits(select):
    torch.manual_seed(0)
    pilot, real, held_out = 3 * torch.randn(400), 3 * torch.randn(300) + 2, 3 * torch.randn(300) + 2
    plain = Configuration(pair="digits", select=select, chain_length=4)
    given = fr.stopping.RealLogits(real)
    chooser = per_image_selection.Chooser.piloted(
        replace(plain, calibrate="platt", real="digits"), pilot, None, given, held_out
    )  # fmt: skip
    mapped = fr.calibrate(held_out, pilot, "platt")
    by_hand = per_image_selection.Chooser.piloted(plain, mapped(pilot), None, fr.stopping.RealLogits(mapped(real)))
    table = 3 * torch.randn(200, 4)
    found, wanted = (
        chooser.choose(table, torch.arange(200)),
        by_hand.choose(mapped(table.flatten()).view(200, 4), torch.arange(200)),
    )
    assert all(map(torch.equal, found, wanted))
    without = per_image_selection.Chooser.piloted(plain, pilot, None, given).choose(table, torch.arange(200))
    assert not torch.equal(found[0], without[0])


def test_the_command_line_is_told_to_calibrate_and_can(base, tmp_path, monkeypatch):
    monkeypatch.setattr(per_image_selection, "PILOT", 64)
    given = ("refine", "--pair", base.pair, "--real", base.real, "--max-steps", 0, "--slots", 8, "--select", "mh",
             "--chain-length", 3, "--ids", "0-39")  # fmt: skip
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        told(fastrefine(*given, "--outdir", tmp_path / "plain"))
    (message,) = [w.message for w in seen if "density ratio" in str(w.message)]
    assert "--calibrate isotonic" in message.command and "calibrate(" not in message.command
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        told(fastrefine(*given, "--calibrate", "isotonic", "--held-out", base.real, "--outdir", tmp_path / "run"))
    assert not [w for w in seen if "calibrate" in str(w.message)]
    there = manifest(tmp_path / "run")
    assert there["configuration"]["calibrate"] == "isotonic" and len(there["held_out_sha256"]) == 64
    wrong = fastrefine(*given, "--held-out", base.real, "--outdir", tmp_path / "x").exception
    assert isinstance(wrong, click.UsageError) and "for calibrate" in str(wrong)


@pytest.mark.parametrize(("change", "match"), [
    ({"calibrate": "isotonic"}, "select is none"), ({"calibrate": "isotonic", "select": "mh"}, "--real, or --held-out"),
    ({"held_out": "digits"}, "calibrate, which is not given"), ({"calibrate": "mean"}, "isotonic, platt"),
])  # fmt: skip
def test_a_calibration_that_has_nothing_to_do_is_refused(change, match):
    with pytest.raises(fr.InputError, match=match):
        Configuration(pair="digits", **change)
