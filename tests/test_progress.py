"""Progress: a bar on a terminal, lines elsewhere, nothing where nobody asked; stdout is left alone."""

import json
import re
import sys

import pytest

from fastrefine import progress
from fastrefine.progress import ProgressBar, counted, over
from tests.support import flat_pairs
from tests.support.commands import fastrefine


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)


@pytest.mark.usefixtures("at_once")
def test_lines_elsewhere_tell_count_speed_and_time_left(capsys):
    assert list(counted(3, "shaping", None)) == [0, 1, 2]
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert not told.out and [line.partition(",")[0] for line in lines] == [f"shaping: {k} of 3 iterations" for k in (1, 2, 3)]
    assert all(re.search(r", [\d.]+ iterations/s, 0 s left$", line) for line in lines)


def test_a_line_is_not_told_before_its_time(capsys):
    list(counted(3, "shaping", None))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "said"), [
    (10.0, "5.0 images/s, 80 s left"), (100.0, "2.0 s each, 13 min left"), (1000.0, "20.0 s each, 2.2 h left"),
])  # fmt: skip
def test_speed_counts_what_was_done_since_the_start(seconds, said):
    bar = ProgressBar(500, "refining", "images", False, done=50)
    bar.done, bar.note = 100, "mean steps 3.5"
    assert bar.line(seconds) == f"refining: 100 of 500 images, {said}, mean steps 3.5"


def test_the_speed_is_that_of_the_last_lines(monkeypatch, capsys):
    """Work that becomes ten times slower: the time left is told by the new speed."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = ProgressBar(100, "shaping", "iterations", None)
    for done in range(1, 41):
        now += 10.0 if done <= 20 else 100.0
        bar.to(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "shaping: 1 of 100 iterations, 10.0 s each, 16 min left"
    assert lines[-1] == "shaping: 40 of 100 iterations, 100.0 s each, 1.7 h left"


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(over("abcd", 8, "merging", "images", None, lambda _: 2)) == list("abcd")
    told = capsys.readouterr()
    assert not told.out and "merging" in told.err and "8/8" in told.err and "\r" in told.err


@pytest.mark.usefixtures("at_once")
def test_false_is_silent_and_true_is_a_bar_everywhere(capsys):
    list(counted(2, "x", False))
    assert capsys.readouterr() == ("", "")
    list(counted(2, "x", True))
    assert "2/2" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_refine_tells_images_and_mean_steps_and_json_stays_json(tmp_path):
    pair, real = flat_pairs.saved(tmp_path)
    done = fastrefine("refine", "--pair", pair, "--real", real, "--stop", -2, "--max-steps", 30, "--ids", "0-39", "--slots", 8,
                      "--outdir", tmp_path / "run", "--json")  # fmt: skip
    assert json.loads(done.stdout)["summary"]["images"] == 40
    lines = [line for line in done.stderr.splitlines() if line.startswith("refining: ")]
    counts = [int(re.match(r"refining: (\d+) of 40 images", line)[1]) for line in lines]
    assert counts == sorted(counts) and counts[-1] == 40 and len(set(counts)) > 5, "within a shard, too"
    assert re.search(r"mean steps \d", lines[-1]) and "mean logit" in done.stderr and "steps on average" in done.stderr
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]["status"]) == 4
    merged = fastrefine("merge", tmp_path / "run", "--output", tmp_path / "m.npz")
    assert "merging: 40 of 40 samples" in merged.stderr and merged.stdout == f"wrote {tmp_path / 'm.npz'}: 40 images\n"
