"""``--step-size auto``: collaborative refinement finds its step size by itself, from every command and file."""

import json

import pytest
import torch

import fastrefine as fr
from fastrefine.production.configuration import changed_sampler
from tests.support import flat_pairs
from tests.support.commands import fastrefine, told

FEW = ("--max-steps", 2, "--slots", 8)


def sampler_of(run):
    return fr.Refiner.from_pair(fr.load_pair("digits"), sampler=configuration(run)["sampler"]).sampler


def configuration(run):
    return json.loads((run / "manifest.json").read_text())["configuration"]


@pytest.fixture
def backtracking(tmp_path):
    g, d = flat_pairs.networks()
    code = (f"{flat_pairs.__name__}:Generator", f"{flat_pairs.__name__}:Discriminator")
    return fr.save_pair(tmp_path / "pair", g, d, code=code, prior=fr.Normal(4), at="2", sampler=fr.Collaborative(0.3))


@pytest.mark.parametrize("flags", [
    ("--step-size", "auto"), ("--sampler-args", '{"step_size": null}'), ("--sampler", "collaborative", "--step-size", "auto"),
])  # fmt: skip
def test_refine_with_auto_makes_the_images_of_python_without_a_step_size(tmp_path, backtracking, flags):
    told(fastrefine("refine", "--pair", backtracking, *FEW, "--ids", "0-7", "--outdir", tmp_path / "run",
                    "--format", "safetensors", *flags))  # fmt: skip
    assert sampler_of(tmp_path / "run") == fr.Collaborative()
    from safetensors.torch import load_file

    images = load_file(next((tmp_path / "run").glob("*.safetensors")))["images"]
    out = fr.Refiner.from_pair(fr.load_pair(backtracking), sampler=fr.Collaborative(), max_steps=2, num_slots=8).sample(8)
    assert torch.equal(images.flatten(), out.images.flatten())


def test_check_repeats_the_flag_and_shape_keeps_it_in_the_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, real = flat_pairs.saved(tmp_path)
    given = ("--pair", folder, "--real", real, "--step-size", "auto", *FEW)
    assert "--step-size auto" in told(fastrefine("check", *given, "--samples", 20, "--refined", 4))
    told(fastrefine("shape", *given, "--stop", "none", "--iterations", 1, "--batch-size", 8, "--outdir", "shaped"))
    assert fr.load_pair("shaped").sampler == fr.Collaborative()
    told(fastrefine("refine", "--pair", "shaped", *FEW, "--ids", "0-3", "--step-size", 0.2, "--outdir", "number"))
    assert sampler_of(tmp_path / "number") == fr.Collaborative(0.2), "a number wants backtracking again"


def test_a_control_stays_where_the_step_size_stays_of_its_kind():
    pair = {"name": "collaborative", "step_size": 0.3, "control": "barzilai_borwein"}
    assert changed_sampler(pair, {"step_size": 0.2}) == {**pair, "step_size": 0.2}
    assert changed_sampler(pair, {"loss": "minimax"}) == {**pair, "loss": "minimax"}
    assert changed_sampler(pair, {"step_size": None, "control": "backtracking"}) == {
        "name": "collaborative", "step_size": None, "control": "backtracking",
    }  # fmt: skip
    assert changed_sampler({**pair, "control": "fixed"}, {"step_size": None})["control"] == "fixed"


@pytest.mark.parametrize(("flags", "why"), [
    (("--sampler", "ddls", "--step-size", "auto"), "sampler ddls has no step size, and only collaborative finds one"),
    (("--step-size", "automatic"), "'automatic' is no number; wanted e.g. 0.1, or auto"),
    (("--step-size", "auto", "--sampler-args", '{"control": "fixed"}'), "control='fixed' wants a number"),
])  # fmt: skip
def test_where_there_is_nothing_to_find_it_is_said(tmp_path, flags, why):
    error = fastrefine("refine", "--pair", "digits", "--ids", "0-3", "--outdir", tmp_path / "run", *flags).exception
    assert why in str(getattr(error, "message", error))


def test_an_imported_pair_finds_its_step_size(tmp_path):
    g, d = flat_pairs.networks()
    torch.save({"g": g.state_dict(), "d": d.state_dict()}, tmp_path / "both.pt")
    roles = [flag for role, key in (("generator", "g"), ("discriminator", "d"))
             for flag in (f"--{role}", f"{flat_pairs.__name__}:{role.title()}", f"--{role}-key", key)]  # fmt: skip
    told(fastrefine("import", tmp_path / "both.pt", *roles, "--prior", '{"name": "normal", "shape": [4]}',
                    "--outdir", tmp_path / "pair"))  # fmt: skip
    assert fr.load_pair(tmp_path / "pair").sampler == fr.Collaborative()
