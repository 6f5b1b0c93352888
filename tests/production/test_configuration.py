"""What a run may be made of: a value of the wrong kind or out of range is told before anything is loaded."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fastrefine.cli import cli
from fastrefine.errors import InputError
from fastrefine.production.configuration import Configuration, Network

BASE = Configuration(pair="digits")


@pytest.mark.parametrize(("name", "value", "wanted"), [
    ("budget", 0.0, "more than 0 and at most 1"), ("budget", 1.5, "more than 0"), ("budget", float("nan"), "more than 0"),
    ("percentile", -1, "0 to 100"), ("percentile", 100.5, "0 to 100"), ("percentile", "95", "0 to 100"),
    ("image_range", (1.0, -1.0), "low before high"), ("image_range", (0.0, 0.0), "low before high"),
    ("image_range", (0.0, float("inf")), "two finite numbers"), ("image_range", [0, 1, 2], "two finite numbers"),
    ("image_range", "01", "two finite numbers"), ("image_range", 1, "two finite numbers"),
    ("seed", 1.5, "whole number"), ("seed", -1, "at least 0"), ("seed", True, "whole number"),
    ("max_steps", 2.5, "whole number"), ("max_steps", -1, "at least 0"), ("shard_size", 2.5, "whole number"),
    ("shard_size", 0, "at least 1"), ("num_slots", "8", "whole number"), ("chain_length", 0, "at least 1"),
    ("num_classes", None, "whole number"), ("classes", 1.5, "or random"), ("classes", "all", "or random"),
    ("ids", 5, "wanted text"), ("real", None, "wanted text"), ("at", 3, "wanted text"), ("format", [], "wanted text"),
    ("keep", "first", "last, best"), ("precision", "fp8", "float64"), ("discriminator_output", "score", "logit, prob"),
    ("stop", [1], "wanted a logit"), ("stop", float("nan"), "wanted a logit"), ("stop", True, "wanted a logit"),
    ("prior", [32], "an object"), ("sampler", "dot", "an object"),
])  # fmt: skip
def test_a_value_that_does_not_fit_is_told_with_what_was_wanted(name, value, wanted):
    with pytest.raises(InputError, match=f"{name} is .*{wanted}"):
        replace(BASE, **{name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("budget", 1), ("percentile", 0), ("percentile", 100), ("seed", 0), ("max_steps", 0), ("classes", 0), ("stop", 0),
    ("stop", -0.5),
])  # fmt: skip
def test_values_at_the_ends_of_their_ranges_fit(name, value):
    assert getattr(replace(BASE, **{name: value}), name) == value


def test_ends_of_a_range_are_kept_as_floats():
    assert json.dumps(replace(BASE, image_range=[0, 1]).to_json()["image_range"]) == "[0.0, 1.0]"


@pytest.mark.parametrize("role", ["generator", "discriminator"])
@pytest.mark.parametrize("value", [5, "a:b", {"code": 5}, {"code": "a:b", "arguments": [1]}, {"weights": "g.pt"}])
def test_a_network_that_is_none_is_told(role, value):
    networks = {"generator": Network("a:b"), "discriminator": Network("a:b"), role: value}
    with pytest.raises(InputError):
        Configuration.from_json(networks)


@pytest.mark.parametrize(("content", "told"), [
    ({"ids": 5}, "ids is 5"), ([1], "holds [1]; wanted a JSON object"), ({"shard_size": 2.5}, "shard_size is 2.5"),
    ({"configuration": 3}, "holds 3; wanted a JSON object"), ({"image_range": None, "budget": 2}, "budget is 2"),
    ({"pair": 3}, "pair is 3"),
])  # fmt: skip
def test_a_file_of_flags_that_does_not_fit_is_a_usage_error(tmp_path, content, told):
    (tmp_path / "c.json").write_text(json.dumps(content))
    pair = [] if "pair" in content else ["--pair", "digits"]
    given = ["refine", "--config", str(tmp_path / "c.json"), *pair, "--outdir", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, given, terminal_width=1000)
    assert done.exit_code == 2 and told in done.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_network_in_a_file_of_flags_that_is_none_is_a_usage_error_beside_flags(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"generator": 5}))
    given = ["refine", "--config", str(tmp_path / "c.json"), "--generator-key", "g", "--outdir", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, given)
    assert done.exit_code == 2 and "has a generator 5" in done.output


@pytest.mark.parametrize("flags", [("--budget", "1.5"), ("--percentile", "101"), ("--image-range", "1", "-1")])
def test_a_flag_out_of_range_is_a_usage_error(tmp_path, flags):
    done = CliRunner().invoke(cli, ["refine", "--pair", "digits", *flags, "--outdir", str(tmp_path / "run")])
    assert done.exit_code == 2 and f"{flags[0][2:].replace('-', '_')} is " in done.output
