"""A run whose logits hardly moved says so, in all four places; a shaped discriminator is not told to be shaped first."""

import copy
import json
import warnings

import pytest

import fastrefine as fr
from fastrefine.networks.copies import is_shaped
from tests.support import flat_pairs
from tests.support.commands import fastrefine, told

SLOW = fr.Collaborative(1e-3, control="fixed")


def codes(out):
    return [entry["code"] for entry in out.report["findings"]]


def test_python_is_warned_with_the_share_of_the_way_to_real_images():
    one = flat_pairs.refiner(sampler=SLOW)
    with pytest.warns(fr.FastrefineWarning, match="the samples hardly moved"):
        out = one.sample(40)
    assert codes(out) == ["exhausted", "hardly_moved"]
    gain = float((out.logits - out.initial_logits).double().mean())
    way = float(one.score(one.real).double().median() - out.initial_logits.double().mean())
    assert 0 < gain < 0.05 * way
    assert (
        f"rose by {gain:.3g} in 4 steps on average, which is {gain / way:.1%} of the way" in out.report["findings"][1]["text"]
    )
    assert "hardly moved" in fr.diagnose_steps(out, one.sampler).advice


def test_without_real_images_the_spread_of_the_raw_logits_is_the_measure():
    slow = flat_pairs.refiner(sampler=fr.Collaborative(1e-5, control="fixed"), stop=None, real=None)
    with pytest.warns(fr.FastrefineWarning, match="of the spread of the raw logits"):
        slow.sample(40)


@pytest.mark.parametrize("options", [{"sampler": fr.Collaborative(1.0)}, {"sampler": fr.Collaborative(), "max_steps": 3}])
def test_what_moved_is_not_complained_of(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codes(flat_pairs.refiner(stop=None, **options).sample(40)) == []


def test_a_sampler_of_a_law_need_not_ascend():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codes(flat_pairs.refiner(sampler=fr.MALA(1e-4), at="input", stop=None, real=None).sample(40)) == []


def test_command_manifest_and_report_tell_it(tmp_path):
    pair, real = flat_pairs.saved(tmp_path)
    said = told(fastrefine("refine", "--pair", pair, "--real", real, "--stop", "none", "--max-steps", 4, "--step-size", 1e-3,
                          "--ids", "0-39", "--slots", 8, "--outdir", tmp_path / "run"))  # fmt: skip
    assert "warning: the samples hardly moved" in said and "--step-size auto" in said and "step_size" not in said
    (entry,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]["findings"]
    assert entry["code"] == "hardly_moved"
    pytest.importorskip("jinja2")
    told(fastrefine("report", tmp_path / "run", "--output", tmp_path / "report.html"))
    assert "the samples hardly moved" in (tmp_path / "report.html").read_text()


def test_the_sums_of_a_run_in_parts_are_those_of_the_whole(tmp_path):
    pair, real = flat_pairs.saved(tmp_path)
    texts = []
    for size in (40, 10):
        folder = tmp_path / f"run{size}"
        told(fastrefine("refine", "--pair", pair, "--real", real, "--max-steps", 4, "--step-size", 1e-3, "--ids", "0-39",
                        "--slots", 8, "--shard-size", size, "--outdir", folder))  # fmt: skip
        texts.append(json.loads((folder / "manifest.json").read_text())["summary"]["findings"][0]["text"])
    assert texts[0] == texts[1]


# --- a shaped discriminator


def test_a_shaped_discriminator_is_known_by_python_and_from_files(tmp_path):
    one = flat_pairs.refiner()
    shaped = fr.shape_discriminator(one, one.real, 1, 8, 1e-5)
    assert is_shaped(shaped) and is_shaped(copy.deepcopy(shaped)) and not is_shaped(one.discriminator)
    assert not is_shaped(fr.shape_discriminator(one, one.real, 0, 8, 1e-5)), "no update"
    assert not is_shaped(fr.tune_discriminator(one, one.real, 1, 8, 1e-5)), "on raw samples"
    assert shaped.state_dict().keys() == one.discriminator.state_dict().keys()
    with pytest.warns(fr.FastrefineWarning) as seen:
        one.with_discriminator(shaped).sample(40)
    words = " ".join(str(w.message) for w in seen)
    assert "none of 40 samples reached" in words and "for fewer iterations" in words and "shape D first" not in words
    assert "shape D first" not in one.with_discriminator(shaped).check().next()

    pair, real = flat_pairs.saved(tmp_path)
    for given in (("--pair", pair), ("--generator", f"{flat_pairs.__name__}:Generator", "--generator-weights",
                  pair / "generator.safetensors", "--discriminator", f"{flat_pairs.__name__}:Discriminator",
                  "--discriminator-weights", pair / "discriminator.safetensors", "--prior", '{"name": "normal", "shape": [4]}',
                  "--at", "2")):  # fmt: skip
        folder = tmp_path / f"shaped{len(given)}"
        few = ("--real", real, "--stop", "median", "--max-steps", 4, "--slots", 8)
        told(fastrefine("shape", *given, *few, "--iterations", 1, "--batch-size", 8, "--outdir", folder))
        again = ("--pair", folder)
        if "--pair" not in given:
            again = tuple(folder / "discriminator.safetensors" if word == pair / "discriminator.safetensors" else word
                          for word in given)  # fmt: skip
        said = told(fastrefine("refine", *again, *few, "--ids", "0-39", "--outdir", folder / "run"))
        assert "none of 40 samples reached" in said and "shape D first" not in said and "for fewer iterations" in said


@pytest.mark.parametrize("call", [lambda one: one.sample(4), lambda one: list(one.stream(4))])
def test_a_warning_points_at_the_callers_own_line(call):
    with pytest.warns(fr.FastrefineWarning, match="moved") as told:
        call(flat_pairs.refiner(sampler=SLOW))
    assert {one.filename for one in told} == {__file__}
