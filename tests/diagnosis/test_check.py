"""Refiner.check and fastrefine check: the table's numbers, the verdict, and the next command."""

import json
import shlex
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.diagnosis.check import of_memory, separation_of
from tests.support import flat_pairs
from tests.support.commands import fastrefine, told
from tests.support.refiners import pair, refiner
from tests.support.selection_laws import conditional, real_images

FAR = {"stop": -2.0, "max_steps": 30}  # the proposals begin at about -3, and reach it


@pytest.fixture(autouse=True)
def quiet():
    """A check warns of nothing: what it found stands in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fr.FastrefineWarning)
        yield


def test_a_discriminator_that_prefers_generated_images_is_to_be_shaped():
    found = flat_pairs.refiner(liked=0.0).check()
    assert not found.usable and found.separation == 0.0
    assert found.verdict.startswith("D scores generated images above real ones (a real image scores above a raw one in 0%")
    assert "fastrefine.shape_discriminator" in found.next() and "first (`fastrefine shape X`)" in found.next(
        {"fastrefine shape": "fastrefine shape X"}
    )
    assert {one.code for one in found.findings} >= {"inverted", "unrefined", "above_real"}
    assert found.run["mean_steps"] == 0 and found.scores["raw"].reached == found.scores["refined"].reached == 1.0
    assert str(found).splitlines()[-1] == f"next            {found.next()}"


def test_the_numbers_are_those_of_the_refiner():
    one = flat_pairs.refiner(**FAR)
    found = one.check(100, refined=20, seed=3)
    raw, out = one.replaced(max_steps=0).sample(100, seed=3), one.sample(20, seed=3)
    real = one.score(one.real)
    for name, logits in (("real", real), ("raw", raw.logits), ("refined", out.logits)):
        scores, at = found.scores[name], torch.tensor((0.05, 0.25, 0.5, 0.75, 0.95)).double()
        assert scores.count == len(logits) and scores.quantiles == pytest.approx(logits.double().quantile(at).tolist())
        assert scores.reached == pytest.approx(float((logits >= -2).double().mean()))
    assert found.usable and found.separation == 1.0 and found.thresholds == (-2.0, -2.0, -2.0)
    assert found.calibration.ece == fr.diagnose(real.double(), raw.logits.double()).ece
    assert found.run["mean_steps"] == float(out.steps.double().mean()) and found.run["images"] == 20
    assert found.ranges["generated"] == (float(raw.images.min()), float(raw.images.max()))
    assert found.ranges["real"] == pytest.approx((-0.95, 0.95)) and list(found.ladder) == out.report["ladder"]
    assert found.verdict.startswith("nothing speaks against it") and "Shaping it first usually gives more" in found.verdict
    assert found.next().startswith("shape D first (fastrefine.shape_discriminator)") and "max_steps=0" in found.next()
    assert found.entry({})["calibration"] == found.calibration.figures | {"trusted": found.calibration.trusted}
    text = str(found)
    for name, value in found.calibration.figures.items():
        assert f"{name} {value:.{1 if name == 'z' else 3}f}" in text and f"\n{name}  " in text, "a figure, and what it means"
    assert "with the scores of real images, not with 0" in text and "above 0" not in text.lower()
    for words in ("-2", "100%", "20", "do not depend on their batch", "as training left them", "bitwise", "step recorded"):
        assert words in text


def test_steps_that_never_reach_the_threshold_are_told():
    found = flat_pairs.refiner().check()
    assert found.verdict == "none of 64 samples reached the stop threshold within 4 steps" and "max_steps" in found.next()


def test_without_real_images_there_is_no_verdict_on_d():
    found = flat_pairs.refiner(real=None, **FAR).check(20)
    assert not found.usable and found.findings[0].code == "no_real" and "real=" in found.next()
    assert set(found.scores) == {"raw", "refined"} and found.separation is None and found.calibration is None


def test_a_discriminator_that_does_not_know():
    one = flat_pairs.refiner(stop=None, real=flat_pairs.refiner().replaced(max_steps=0).sample(300, first_id=1000).images)
    found = one.check()
    assert found.findings[0].code == "blind" and 0.45 < found.separation < 0.55


class Batched(nn.Module):
    def forward(self, x):
        return x.sum(1) - x.mean()


class Noisy(nn.Module):
    def forward(self, x):
        return x.sum(1) + torch.randn(len(x))


@pytest.mark.parametrize(("network", "says"), [(Batched(), "coupling='freeze'"), (Noisy(), "on_noise='freeze'")])
def test_networks_that_do_not_fit_are_the_verdict(network, says):
    one = refiner((pair()[0], network), stop=None, real=torch.randn(20, 6))
    unfit = one.check(16)
    assert unfit.findings[0].code == "unfit" and says in unfit.verdict
    name, value = says.replace("'", "").split("=")
    found = one.replaced(**{name: value}).check(16, refined=8)
    word = {"coupling": "statistics of the batch are held", "on_noise": "held for each sample"}[name]
    assert found.networks[name.removeprefix("on_")] == word


def test_statistics_that_were_never_updated_come_first_at_every_check():
    g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    with torch.no_grad():
        g[0].bias.fill_(9)
    one = fr.Refiner(g, pair()[1], fr.Collaborative(0.1), prior=fr.Normal(4), real=torch.randn(30, 6), max_steps=2)
    for _ in range(2):
        found = one.check(30)
        assert found.findings[0].code == "statistics" and "'1' carries statistics that were never updated" in found.verdict
        assert "mend that first" in found.next() and found.networks["statistics"] == "see below"


def test_labels_are_those_of_the_real_images_and_latents_may_be_given():
    y = torch.arange(30) % 3
    one = conditional(real=real_images(y), real_labels=y, stop=fr.stopping.MedianOfReal())
    found = one.check(30, refined=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network that was never trained
        raw = one.replaced(max_steps=0).sample(30, labels=y)
    assert found.scores["raw"].quantiles[2] == pytest.approx(float(raw.logits.double().quantile(0.5)))
    assert found.thresholds[0] < found.thresholds[2], "per class"
    given = refiner(prior=None, real=torch.randn(20, 6), stop=None)
    assert given.check(latents=torch.randn(10, 4), refined=3).scores["raw"].count == 10
    with pytest.raises(fr.InputError, match="pass latents"):
        given.check()
    with pytest.raises(fr.InputError, match="n is 1"):
        one.check(1)


def test_separation_is_the_share_of_pairs():
    x, y = torch.randint(5, (30,)).double(), torch.randint(5, (40,)).double()
    pairs = (x[:, None] > y).double() + (x[:, None] == y).double() / 2
    assert separation_of(x, y) == pytest.approx(float(pairs.mean()))
    assert separation_of(x, torch.tensor([torch.nan])) is None
    assert separation_of(x, torch.cat([y, torch.tensor([torch.nan]).double()])) == pytest.approx(float(pairs.mean()))


def test_the_command_ends_in_the_next_command_as_one_types_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, real = flat_pairs.saved(tmp_path, liked=0.0)
    given = ("check", "--pair", folder, "--real", real, "--slots", 8, "--sampler-args", '{"loss": "minimax"}')
    last = told(fastrefine(*given)).splitlines()[-1]
    command = shlex.split(last.partition("`fastrefine ")[2].partition("`")[0])
    assert "fastrefine.shape" not in last and command[0] == "shape" and command[-2:] == ["--outdir", "shaped"]
    given_pairs, typed = (set(zip(words[1::2], words[2::2], strict=True)) for words in (list(map(str, given)), command))
    assert typed == {*given_pairs, ("--outdir", "shaped")}
    told(fastrefine(*command[:-1], tmp_path / "shaped", "--iterations", 1))
    found = json.loads(fastrefine(*given, "--json", "--samples", 20).stdout)
    assert found["findings"][0]["code"] == "inverted" and not found["usable"] and found["scores"]["raw"]["count"] == 20
    assert "--outdir shaped2`" in found["next"], "a folder that is there is not proposed again"


# --- of a shaped pair


def test_a_shaped_discriminator_is_judged_as_one():
    found = flat_pairs.refiner(**FAR).check(shaped=True)
    assert found.usable and "D was shaped" in found.verdict and "shape" not in found.next()
    for options in ({}, {"stop": None}):  # four steps do not come up to the real images
        found = flat_pairs.refiner(**options).check(shaped=True)
        assert [one.code for one in found.findings] == ["out_of_reach"] and "max_steps" in found.next()
        assert "fewer iterations" in found.next() and "shape D first" not in found.next()
    assert "only 0 of 64" in flat_pairs.refiner().check(shaped=True).verdict
    found = flat_pairs.refiner(liked=0.0).check(shaped=True)
    assert found.findings[0].code == "inverted" and found.next().startswith("shape D for longer")


def test_training_images_that_score_higher_than_held_out_ones_are_told():
    high, low = torch.randn(200), torch.randn(200) - 1
    assert of_memory(low, high) == [] == of_memory(low, low)
    (found,) = of_memory(high, low)
    assert found.code == "by_heart" and f"{separation_of(high, low):.0%} of pairs" in found.text


def commands_of(out):
    return [shlex.split(part) for part in out.split("`") if part.startswith("fastrefine ")]


def test_shape_ends_in_a_verdict_and_check_of_the_new_pair_in_commands_that_fit_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, real = flat_pairs.saved(tmp_path)
    np.save("other.npy", -flat_pairs.real_images().numpy())
    few = ("--slots", 8, "--iterations", 2, "--batch-size", 8)
    said = told(
        fastrefine("shape", "--pair", folder, "--real", real, *few, "--stop", -2, "--max-steps", 30, "--outdir", "fine")
    )
    rows = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert rows["judged"].startswith("by       the images that it was shaped on, which flatters it")
    assert (
        "100% of pairs" in rows["separation"]
        and "100% stopped by the rule (REACHED)" in rows["refinement"]
        and "ece" in rows["calibration"]
    )
    assert rows["verdict"].startswith("nothing speaks against it: D was shaped") and "do" not in rows
    assert said.splitlines()[-1] == "to refine with it: fastrefine refine --pair fine --ids 0-999 --outdir run"
    assert fr.load_pair("fine").highest_real_logit == pytest.approx(float(
        fr.load_pair("fine").discriminator(flat_pairs.real_images()).max().detach()))  # fmt: skip

    out = told(fastrefine("check", "--pair", "fine", "--real", real, "--slots", 8))
    assert (
        "stop Threshold" in out
        and "D was shaped on 60 of these 60 real images" in out
        and "shape " not in out[out.index("next") :]
    )
    refine, raw, evaluate = commands_of(out)
    assert refine[:4] == ["fastrefine", "refine", "--pair", "fine"] and "--stop" not in refine, "the pair has its own rule"
    assert raw[raw.index("--max-steps") :][:2] == ["--max-steps", "0"] and "--real" not in raw
    assert evaluate == ["fastrefine", "evaluate", "run", "--real", "HELD_OUT_IMAGES", "--baseline", "raw"]
    for command in (refine, raw):
        told(fastrefine(*command[1:], "--ids", "0-19"))
    held_out = told(fastrefine("check", "--pair", "fine", "--real", "other.npy", "--slots", 8))
    assert "was shaped on" not in held_out and commands_of(held_out)[2][3:5] == ["--real", "other.npy"]

    said = told(fastrefine("shape", "--pair", folder, "--real", real, "--held-out", "other.npy", *few, "--stop", "median",
                           "--max-steps", 4, "--outdir", "poor"))  # fmt: skip
    assert "judged by       60 held-out real images (other.npy)" in said and "verdict         only 0 of 64 refined" in said
    assert "what to do      give more --max-steps" in said
    out = told(fastrefine("check", "--pair", "poor", "--real", real, "--slots", 8))
    assert "stop MedianOfReal" in out and "only 0 of 64 refined images" in out


def test_what_is_held_out_stays_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = told(fastrefine("check", "--pair", "digits", "--real", "digits:test", "--samples", 100, "--step-size", 0.3))
    shape, refine, raw, evaluate = commands_of(out)
    for command in (refine, shape):
        assert "digits:train" in command and "0.3" in command
    assert evaluate[3:5] == ["--real", "digits:test"] and raw[2:6] == ["--pair", "digits", "--max-steps", "0"]
