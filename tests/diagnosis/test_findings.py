"""A run that did nothing says so: as a warning, in the result's report, on the command line and in the manifest."""

import json
import re
import warnings

import pytest
import torch

import fastrefine as fr
from tests.support import flat_pairs
from tests.support.commands import fastrefine, told

NO_OP, TOO_FAR = {"liked": 0.0}, {"liked": 1.0}  # D likes generated images best; no step reaches what it likes
CASES = {
    "unrefined": (NO_OP, "40 of 40 proposals were at the stop threshold before their first step", "shape D first"),
    "exhausted": (TOO_FAR, "none of 40 samples reached the stop threshold within 4 steps", "shape D first"),
}
PYTHON = re.compile(r"fastrefine\.\w|\bfr\.|\w+=\w|max_steps|step_size")


def warned(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = run()
    return out, [w.message for w in seen if issubclass(w.category, fr.FastrefineWarning)]


@pytest.mark.parametrize("code", CASES)
def test_python_is_told_in_its_own_words(code):
    which, text, advice = CASES[code]
    one = flat_pairs.refiner(**which)
    out, messages = warned(lambda: one.sample(40))
    entry = next(entry for entry in out.report["findings"] if entry["code"] == code)
    assert text in entry["text"] and advice in entry["advice"] and "fastrefine.shape_discriminator" in entry["advice"]
    message = next(m for m in messages if text in str(m))
    assert str(message) == f"{entry['text']}; {entry['advice']}" and not PYTHON.search(message.command)
    assert "fastrefine shape" in message.command
    assert text in fr.diagnose_steps(out, one.sampler).advice, "nothing speaks against the step size, it said"


@pytest.mark.parametrize("code", CASES)
def test_a_run_on_disk_is_told_in_the_words_of_the_command_line(code, tmp_path):
    which, text, advice = CASES[code]
    pair, real = flat_pairs.saved(tmp_path, **which)
    said = told(fastrefine("refine", "--pair", pair, "--real", real, "--stop", "median", "--max-steps", 4, "--ids", "0-39",
                          "--slots", 8, "--outdir", tmp_path / "run"))  # fmt: skip
    line = next(line for line in said.splitlines() if line.startswith("warning: ") and text in line)
    assert advice in line and not PYTHON.search(line)
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]
    entry = next(entry for entry in summary["findings"] if entry["code"] == code)
    assert line == f"warning: {entry['text']}; {entry['advice']}"
    assert summary["complete"] and summary["images"] == summary["of"] == 40
    share = {"unrefined": "REACHED", "exhausted": "EXHAUSTED"}[code]
    assert summary["status"][share] == 1.0 and f"100.0% {share}" in said and "steps on average" in said and "logit" in said
    pytest.importorskip("jinja2")
    told(fastrefine("report", tmp_path / "run", "--output", tmp_path / "report.html"))
    assert text in (tmp_path / "report.html").read_text()


def test_a_good_run_is_not_complained_of():
    one = flat_pairs.refiner(stop=-2.0, max_steps=30)  # the proposals begin at about -3
    out, messages = warned(lambda: one.sample(40))
    assert out.report["findings"] == [] and messages == [] and float(out.steps.float().mean()) > 0


def test_what_stands_still_and_what_scores_above_every_real_image_are_found():
    still = flat_pairs.refiner(sampler=fr.Collaborative(1e-12, control="fixed"), stop=None)
    out, _ = warned(lambda: still.sample(20))
    assert [entry["code"] for entry in out.report["findings"]] == ["unmoved"] and "larger step_size" in messages_of(out)
    for steps in (0, 4):
        out, _ = warned(lambda steps=steps: flat_pairs.refiner(liked=0.0, stop=None, max_steps=steps).sample(20))
        assert "20 of 20 proposals passed the highest real logit before their first step" in messages_of(out)
    far = flat_pairs.refiner(stop=None, max_steps=40, real=torch.zeros(20, 1, 4, 4) + 0.45 * torch.eye(4))
    out, _ = warned(lambda: far.sample(20))
    assert [entry["code"] for entry in out.report["findings"]] == ["over_refined"] and "MedianOfReal" in messages_of(out)


def messages_of(out):
    return " ".join(f"{entry['text']} {entry['advice']}" for entry in out.report["findings"])


def test_the_last_part_of_a_stream_judges_the_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = list(flat_pairs.refiner(**NO_OP).stream(40, chunk=16))
    assert [bool(part.report["findings"]) for part in parts] == [False, False, True]
    assert parts[-1].report["findings"][0]["text"].startswith("40 of 40")


def test_errors_name_flags_where_the_command_line_has_them():
    error = fr.CouplingError("pass coupling='freeze', or coupling='lockstep' with a group_size; then max_steps=5, or real=")
    assert error.command == "pass --coupling freeze, or --coupling lockstep with a group_size; then --max-steps 5, or --real"
    assert "coupling='freeze'" in str(error)
