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
    assert (
        summary["status"][share] == 1.0
        and re.search(rf"100% [a-z ]+ \({share}\)", said)
        and "steps on average" in said
        and "logit" in said
    )
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
    out, _ = warned(lambda: flat_pairs.refiner(liked=0.0, stop=None).sample(20))
    assert "20 of 20 proposals passed the highest real logit before their first step" in messages_of(out)
    far = flat_pairs.refiner(stop=None, max_steps=40, real=torch.zeros(20, 1, 4, 4) + 0.45 * torch.eye(4))
    out, _ = warned(lambda: far.sample(20))
    assert [entry["code"] for entry in out.report["findings"]] == ["over_refined"] and "MedianOfReal" in messages_of(out)


def test_raw_samples_are_no_reason_for_a_warning(tmp_path):
    raw = flat_pairs.refiner(liked=0.0, stop=None, max_steps=0)  # D prefers them, which changes none of them
    out, messages = warned(lambda: raw.sample(20))
    assert out.report["findings"] == [] and messages == [] and "no steps were allowed" in repr(out)
    pair, real = flat_pairs.saved(tmp_path, liked=0.0)
    said = told(fastrefine("refine", "--pair", pair, "--real", real, "--max-steps", 0, "--ids", "0-39", "--slots", 8,
                          "--outdir", tmp_path / "raw"))  # fmt: skip
    assert "no steps were allowed, so images are as the generator makes them" in said
    assert "EXHAUSTED" not in said and "warning" not in said
    pytest.importorskip("jinja2")
    told(fastrefine("report", tmp_path / "raw", "--output", tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "no image was refined" in page and "EXHAUSTED" not in page and "Warning" not in page


def test_a_pair_that_knows_the_highest_real_logit_needs_no_real_images_to_tell(tmp_path):
    g, d = flat_pairs.networks()
    with torch.no_grad():
        highest = float(d(torch.zeros(1, 1, 4, 4) + 0.3))
    code = (f"{flat_pairs.__name__}:Generator", f"{flat_pairs.__name__}:Discriminator")
    fr.save_pair(tmp_path / "pair", g, d, code=code, prior=fr.Normal(4), at="2", highest_real_logit=highest)
    far = fr.Refiner.from_pair(fr.load_pair(tmp_path / "pair"), max_steps=40, num_slots=8)
    assert far.options.highest_real_logit == highest
    out, messages = warned(lambda: far.sample(40))
    assert [entry["code"] for entry in out.report["findings"]] == ["over_refined"] and len(messages) == 1
    assert far.replaced(max_steps=1).sample(40).report["findings"] == []
    assert far.with_discriminator(d).options.highest_real_logit is None, "it was the other one's"
    said = told(fastrefine("refine", "--pair", tmp_path / "pair", "--max-steps", 40, "--ids", "0-39", "--slots", 8,
                          "--outdir", tmp_path / "run"))  # fmt: skip
    text = "40 of 40 logits passed the highest real logit"
    assert f"warning: {text}" in said and "--stop median with --real" in said
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]
    assert summary["findings"][0]["text"].startswith(text)
    pytest.importorskip("jinja2")
    told(fastrefine("report", tmp_path / "run", "--output", tmp_path / "report.html"))
    assert text in (tmp_path / "report.html").read_text()
    config = tmp_path / "pair" / "config.json"
    config.write_text(config.read_text().replace(f'"highest_real_logit": {highest}', '"highest_real_logit": "high"'))
    with pytest.raises(fr.InputError, match="highest_real_logit is 'high'"):
        fr.load_pair(tmp_path / "pair")


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
