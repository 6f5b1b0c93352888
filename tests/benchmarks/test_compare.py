"""Two revisions timed in turn. The package is a fake one in a repository of its own, with a clock that its runs move."""

import json
import os
import subprocess

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import compare

# Each run costs COST, and every seventh is disturbed a lot. Every second process is slower by a percent.
CASES = """
import fastrefine
with open(__file__ + ".started", "a+") as started:
    started.write("x")
    own = 1 + 0.01 * (started.tell() % 2)
now, runs = 0.0, 0
def clock():
    return now
def run():
    global now, runs
    runs += 1
    now += fastrefine.COST * own * (5 if runs % 7 == 0 else 1)
    print("what a case prints is no answer")
def bench_one():
    return run
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose package costs 1.0, then 1.0 again with another text (tag "same"), 1.2 ("slow"), 0.8 ("quick")."""
    root = tmp_path / "repository"
    (root / "fastrefine").mkdir(parents=True)
    for name, value in dict(GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a", GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a").items():
        monkeypatch.setenv(name, value)

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)

    git("init")
    for tag, text in (("first", "COST = 1.0"), ("same", "COST = 1.00"), ("slow", "COST = 1.2"), ("quick", "COST = 0.8")):
        (root / "fastrefine" / "__init__.py").write_text(text)
        git("add", ".")
        git("commit", "-m", tag)
        git("tag", tag)
    (root / "cases.py").write_text(CASES)
    monkeypatch.chdir(root)
    return root


def run(*arguments):
    given = ["compare", *arguments, "--cases=cases.py", "--output=compared"]
    return CliRunner().invoke(command.main, given, catch_exceptions=False)


def ratio(done):
    """(median, lowest, highest) of the last line."""
    median, low, _, high = done.output.replace("(", "").replace(")", "").split("slower")[0].split()[-4:]
    return float(median), float(low), float(high)


def test_a_revision_against_itself_is_1_within_its_interval(repository):
    done = run("first", "--head=same")
    median, low, high = ratio(done)
    assert done.exit_code == 0 and low <= 1 <= high and abs(median - 1) < 0.03
    assert done.output.count("start ") == 6


def test_a_planted_slow_down_fails_and_says_which_case(repository):
    done = run("first", "--head=slow", "--starts=3", "--rounds=3")
    assert done.exit_code == 1 and "one " in done.output and "slower by more than 10%" in done.output
    assert ratio(done)[1] > 1.15
    assert run("first", "--head=slow", "--starts=2", "--rounds=3", "--threshold=0.3").exit_code == 0


def test_what_is_quicker_passes_and_the_seconds_are_kept(repository):
    assert run("first", "--head=quick", "--starts=2", "--rounds=3").exit_code == 0
    for side in compare.SIDES:
        kept = json.loads((repository / "compared" / f"{side}.json").read_text())
        assert kept["benchmarks"][0]["stats"]["rounds"] == 6 and kept["benchmarks"][0]["name"] == "one"
    shown = subprocess.run(
        ["pytest-benchmark", "compare", "compared/base.json", "compared/head.json"], capture_output=True, text=True,
        env={**os.environ, "PATH": f"{os.path.dirname(compare.sys.executable)}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert shown.returncode == 0 and shown.stdout.count("one ") == 2, shown.stderr


def test_one_disturbed_start_does_not_fail():
    seconds = {"base": [1.0], "head": [1.0]}
    assert not compare.Ratio("x", (0.99, 1.5, 1.5), seconds).slower(0.1)
    assert compare.Ratio("x", (1.12, 1.5, 1.5), seconds).slower(0.1)
    assert not compare.Ratio("x", (1.02, 1.05, 1.5), seconds).slower(0.1)


@pytest.mark.parametrize(("cases", "said"), [
    ("def bench_one():\n    raise ValueError('no such layer')", "the process ended"),
    ("x = 1", "has no function bench_NAME"),
])  # fmt: skip
def test_cases_that_do_not_run(repository, cases, said):
    (repository / "cases.py").write_text(cases)
    done = run("first", "--head=same", "--starts=1")
    assert done.exit_code == 1 and said in done.output


def test_a_revision_that_is_not_there(repository):
    assert "no-such-tag" in run("no-such-tag").output
