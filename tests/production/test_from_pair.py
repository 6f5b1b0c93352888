"""A pair makes a Refiner; the command line's names work in Python; public things print short."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastrefine as fr
from fastrefine import checks, samplers, stopping
from fastrefine.datasets import load_digits
from fastrefine.models import digits as networks
from fastrefine.samplers import as_sampler
from fastrefine.stopping import as_rule
from tests.support.commands import fastrefine, told

ROOT = Path(__file__).parents[2]
CODE = ("fastrefine.models.digits:digits_generator", "fastrefine.models.digits:digits_discriminator")


def save(folder, **more):
    torch.manual_seed(0)
    given = {"code": CODE, "prior": fr.Normal(32), "at": "act2", **more}
    return fr.save_pair(folder, networks.digits_generator(), networks.digits_discriminator(), **given)


def images_of(folder):
    return np.load(next(folder.glob("*.npz")))["arr_0"]


def uint8(images):
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).numpy()


# --- pairs


def test_a_refiner_from_a_pair_is_the_one_spelled_out():
    pair = fr.load_pair("digits")
    out = fr.Refiner.from_pair(pair, max_steps=5, stop=None).sample(8, seed=0)
    plain = fr.Refiner(pair.generator, pair.discriminator, fr.Collaborative(0.1), "act2", 5, prior=fr.Normal(32)).sample(8)
    assert torch.equal(out.images, plain.images) and repr(pair.prior) == "Normal(32)" and pair.at == "act2"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A pair that says everything of a run."""
    return save(
        tmp_path_factory.mktemp("pair") / "p", sampler=fr.DDLS([0.2, 0.1], noise_scale=0.0), stop=0.0, max_steps=0, at="input",
        image_range=(0.0, 1.0), num_classes=7, discriminator_output="critic", prior=fr.Uniform(32, low=-2.0), on_noise="freeze",
        discriminator_kwargs={},
    )  # fmt: skip


def test_a_pair_holds_what_a_run_needs(full):
    pair = fr.load_pair(full)
    assert pair.sampler == fr.DDLS((0.2, 0.1), noise_scale=0.0) and pair.stop == stopping.Threshold(0.0) and pair.max_steps == 0
    assert (pair.at, pair.image_range, pair.num_classes, pair.discriminator_output) == ("input", (0.0, 1.0), 7, "critic")
    assert pair.prior.low == -2 and pair.prior.high == 1
    with pytest.warns(fr.FastrefineWarning, match="keeps its law"):
        o = fr.Refiner.from_pair(pair).options
    assert (o.sampler, o.stop, o.max_steps, o.scale, o.on_noise) == (pair.sampler, pair.stop, 0, "critic", "freeze")
    assert fr.Refiner.from_pair(pair, max_steps=3, stop=None, at="input").max_steps == 3


def test_real_images_give_the_stop_rule_that_a_pair_lacks(tmp_path):
    save(tmp_path / "p"), save(tmp_path / "q", stop="none"), save(tmp_path / "r", stop=0.1)
    pairs = [fr.load_pair(tmp_path / name) for name in "pqr"]
    real = load_digits().train[:100]
    rules = [fr.Refiner.from_pair(pair, real=real).stop for pair in pairs]
    assert isinstance(rules[0], stopping.MedianOfReal) and rules[1:] == [stopping.FixedSteps(), stopping.Threshold(0.1)]
    plain = fr.Refiner.from_pair(pairs[0]), fr.Refiner.from_pair(pairs[0], real=real, stop=None)
    assert all(one.stop == stopping.FixedSteps() and "stop=None" in repr(one) for one in plain)
    assert "stop=None" in repr(pairs[0])
    out = fr.Refiner.from_pair(pairs[0], real=real, num_slots=8).sample(8)
    assert torch.equal(out.images, plain[1].replaced(stop="median", num_slots=8).sample(8).images) and out.steps.min() < 50
    with warnings.catch_warnings():  # the law of a sampler is kept
        warnings.simplefilter("error")
        law = fr.Refiner.from_pair(pairs[0], real=real, sampler=fr.DDLS(0.01), at="input")
    assert law.stop == stopping.FixedSteps()
    np.save(tmp_path / "real.npy", real.numpy())
    for flags, word in (((), "MedianOfReal"), (("--sampler", "ddls", "--at", "input"), "FixedSteps")):
        command = "check", "--pair", tmp_path / "p", "--real", tmp_path / "real.npy", "--slots", 8, *flags
        assert f"stop {word}" in told(fastrefine(*command, "--samples", 20, "--refined", 8))


@pytest.mark.parametrize(("flags", "stop"), [
    ((), "median"), (("--stop", "none"), "none"), (("--stop", 0.1), 0.1), (("--max-steps", 0), "none"),
    (("--select", "mh", "--chain-length", 2), "none"), (("--sampler", "ddls", "--at", "input"), "none"),
])  # fmt: skip
def test_real_images_give_a_command_the_stop_rule_too(tmp_path, flags, stop):
    given = "--pair", "digits", "--real", "digits:test", "--ids", "0-7", "--slots", 8, "--max-steps", 2
    told(fastrefine("refine", *given, *flags, "--outdir", tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["stop"] == stop


def test_a_pair_is_saved_again_as_it_was(full, tmp_path):
    again = fr.load_pair(full).saved(tmp_path / "q")
    assert json.loads((again / "config.json").read_text()) == json.loads((full / "config.json").read_text())


@pytest.mark.parametrize("flags", [(), ("--max-steps", 2), ("--step-size", 0.02), ("--sampler", "dgflow"), ("--stop", "none")])
def test_the_command_and_python_make_the_same_images_of_a_pair(tmp_path, flags):
    save(tmp_path / "p", sampler=fr.Collaborative(0.5, control="fixed"), stop=0.1, max_steps=4)
    told(fastrefine("refine", "--pair", tmp_path / "p", "--ids", "0-7", "--slots", 8, "--outdir", tmp_path / "run", *flags))
    changes = {
        "--max-steps": {"max_steps": 2}, "--stop": {"stop": "none"}, "--sampler": {"sampler": "dgflow"},
        "--step-size": {"sampler": fr.Collaborative(0.02, control="fixed")},
    }.get(flags[0] if flags else "", {})  # fmt: skip
    out = fr.Refiner.from_pair(fr.load_pair(tmp_path / "p"), **changes).sample(8)
    np.testing.assert_array_equal(images_of(tmp_path / "run"), uint8(out.images))
    said = json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]
    assert (said["max_steps"], said["stop"]) == (changes.get("max_steps", 4), changes.get("stop", 0.1))


def test_a_shaped_pair_is_for_what_it_was_shaped_for(tmp_path):
    save(tmp_path / "p", max_steps=4)
    given = "--real", "digits", "--stop", "median", "--step-size", 0.3, "--iterations", 1
    told(fastrefine("shape", "--pair", tmp_path / "p", *given, "--outdir", tmp_path / "s"))
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert (config["max_steps"], config["stop"], config["sampler"]["step_size"]) == (4, "median", 0.3)
    command = "refine", "--pair", tmp_path / "s", "--ids", "0-7"
    error = fastrefine(*command, "--outdir", tmp_path / "run").exception
    assert "--real FOLDER" in error.command and "real=" not in error.command and "real=images" in str(error)
    told(fastrefine(*command, "--max-steps", 0, "--outdir", tmp_path / "raw"))  # unrefined images need no real ones


@pytest.mark.parametrize(("wrong", "why"), [
    ({"step_size": 0.1}, "step_size: a Refiner has no such option"),
    ({"max_step": 3}, "did you mean 'max_steps'"),
    ({"stop": "median"}, "reads real logits: pass real=images"),
])  # fmt: skip
def test_changes_that_do_not_fit_are_named(wrong, why):
    with pytest.raises(fr.InputError, match=why):
        fr.Refiner.from_pair(fr.load_pair("digits"), **wrong)


def test_what_is_no_pair_is_named():
    with pytest.raises(fr.InputError, match="pair is a str; wanted what fastrefine.load_pair"):
        fr.Refiner.from_pair("digits")


def test_what_cannot_be_written_down_is_not_saved(tmp_path):
    for more in (
        {"stop": stopping.Hazard(0.5)},
        {"stop": stopping.MedianOfReal(torch.zeros(3))},
        {"prior": fr.Product(*2 * [fr.Normal(16)])},
    ):
        with pytest.raises(fr.InputError, match="cannot be written down"):
            save(tmp_path / "p", **more)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "said", [{"sampler": {"name": "ddls"}}, {"sampler": {"name": "dlls"}}, {"stop": "media"}, {"max_steps": -1}]
)
def test_a_pairs_file_with_a_wrong_run_is_named(tmp_path, said):
    file = save(tmp_path / "p") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(fr.InputError, match="config.json"):
        fr.load_pair(tmp_path / "p")


def test_a_class_of_the_running_program_is_not_saved(tmp_path):
    program = """
import sys
import fastrefine as fr
from torch import nn
class G(nn.Linear):
    pass
try:
    fr.save_pair(sys.argv[1], G(4, 2), G(2, 1), code=("__main__:G", "__main__:G"), prior=fr.Normal(4))
except fr.InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "p"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "put it in a file of its own, e.g. mynetworks.py" in done.stdout and '"mynetworks:G"' in done.stdout
    assert not (tmp_path / "p").exists()


# --- names


def test_every_name_of_the_command_line_is_known_in_python():
    for name, kind in checks.SAMPLERS.items():
        sampler = as_sampler(name)
        assert type(sampler).__name__ == kind and sampler.step_size == 0.1
        assert as_sampler(samplers.described(sampler)) == sampler
    for name, kind in checks.STOPS.items():
        assert type(as_rule(name)).__name__ == kind and stopping.described(as_rule(name)) == name
    assert as_sampler({"name": "ddls", "step_size": 0.05}) == fr.DDLS(0.05)
    assert as_sampler({"name": "collaborative", "clamp": [0, 1]}) == fr.Collaborative(clamp=(0, 1))


def test_a_refiner_takes_names():
    pair, real = fr.load_pair("digits"), load_digits().train[:200]
    one, two = (
        fr.Refiner(pair.generator, pair.discriminator, sampler, "act2", 3, stop, fr.Normal(32), real).sample(8)
        for sampler, stop in (("dgflow", "median"), (fr.DGflow(0.1), stopping.MedianOfReal()))
    )
    assert torch.equal(one.images, two.images) and one.steps.min() < 3
    refiner = fr.Refiner.from_pair(pair, real=real)
    assert isinstance(refiner.replaced(stop="uniform").stop, stopping.UniformStep)


@pytest.mark.parametrize(("given", "why"), [
    ({"sampler": "dlls"}, "did you mean 'ddls'"), ({"sampler": "Collaborativ"}, "did you mean 'collaborative'"),
    ({"sampler": {"name": "ddls"}}, "sampler ddls: .*step_size"), ({"sampler": {"name": "mala", "noise": 1}}, "sampler mala: "),
    ({"sampler": 3}, "sampler is 3; wanted a sampler such as"), ({"stop": "mediam"}, "did you mean 'median'"),
    ({"stop": []}, "wanted None, a logit"), ({"precision": "float31"}, "did you mean 'float32'"),
])  # fmt: skip
def test_unknown_names_are_told_with_close_ones(given, why):
    with pytest.raises(fr.InputError, match=why):
        fr.Refiner.from_pair(fr.load_pair("digits"), **given)


# --- what is printed


def test_public_things_print_short():
    pair, real = fr.load_pair("digits"), load_digits().train
    refiner = fr.Refiner.from_pair(pair, real=real, stop="median", max_steps=4)
    out = refiner.sample(32, snapshots=(0, 2))
    distilled = fr.distil(refiner, pairs=64, iterations=2, shaping={"iterations": 1, "batch_size": 8})
    things = [
        pair, refiner, refiner.options, refiner.dataset(5), out, out.snapshots[2], distilled,
        fr.Product(fr.Normal(2), fr.Uniform(3)), fr.calibrate(out.logits, -out.logits),
        stopping.MedianOfReal(torch.randn(5000)), stopping.ReferenceSample(), stopping.Hazard(0.1), as_rule(None),
        fr.diagnose(refiner.score(real[:100]), out), fr.diagnose_steps(out, refiner.sampler),
        fr.metropolis_hastings(out, chain_length=4, untrusted="allow"), *map(as_sampler, checks.SAMPLERS),
    ]  # fmt: skip
    for thing in things:
        text = repr(thing)
        assert type(thing).__name__ in text and len(text) < 800 and text.count("\n") < 3, text
    assert "90,688 parameters" in repr(refiner) and "1400 real images" in repr(refiner)
    assert "distilled at 'act2'" in repr(distilled) and "more FLOPs" in repr(distilled)
