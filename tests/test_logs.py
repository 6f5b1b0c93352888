"""docs/logs.md: its adapters write what they say, read back from the files; its table names every logger."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "logs.md").read_text()


def block(word):
    """The first block of the page with this word in it."""
    return next(text for text in re.findall(r"```py(?:thon)?\n(.*?)```", PAGE, re.S) if word in text)


def test_what_tensorboard_reads_back(tmp_path, monkeypatch, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(block("SummaryWriter"), "docs/logs.md", "exec"), namespace)
    kept = accumulator.EventAccumulator(str(tmp_path / "logs"))
    kept.Reload()
    finished = [(event.step, event.value) for event in kept.Scalars("refine/finished")]
    assert finished == sorted(finished) and finished[-1][1] == 100 and len(finished) > 3
    assert kept.Histograms("refine/logits")[0].histogram_value.num == 100
    mean = kept.Histograms("refine/steps")[0].histogram_value.sum / 100
    assert mean == pytest.approx(namespace["out"].steps.float().mean().item())
    assert kept.Images("refine/images")


class Run:
    """Stands in for a run of wandb, and keeps what it is told."""

    def __init__(self):
        self.told = []

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        return None

    def log(self, values, step=None):
        self.told.append((step, values))


def test_what_wandb_is_told(monkeypatch):
    run = Run()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project: run, Histogram=len))
    exec(compile(block("wandb.init"), "docs/logs.md", "exec"), {})
    *during, (_, last) = run.told
    assert [step for step, _ in during] == sorted(step for step, _ in during) and during[-1][1] == {"refine/finished": 100}
    assert last["refine/logits"] == 100 and 0 < last["refine/mean_steps"] <= 10


def test_the_table_names_every_logger():
    files = (ROOT / "fastrefine").rglob("*.py")
    own = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if "getLogger(__name__)" in f.read_text()}
    assert set(re.findall(r"^\| `(fastrefine\.[\w.]+)` \|", PAGE, re.M)) == own
