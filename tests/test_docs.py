"""The code blocks of README and docs/ run, each page's in one namespace and one folder; its links lead to files."""

import os
import re
import shlex
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.papers.catalogue import EXPERIMENTS
from fastrefine.cli import cli
from fastrefine.production import evaluation

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "docs/samplers.md", "docs/production.md", "docs/evaluation.md", "docs/embedding.md",
    "docs/choosing.md", "docs/reports.md", "docs/design.md", "docs/networks.md", "docs/distil.md",
    "docs/check.md", "docs/report.md", "docs/checkpoints.md", "docs/distributed.md",
)  # fmt: skip
BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.S)
LINK = re.compile(r"\]\(<?([^)>#\s]+)")
WRITTEN = sorted(
    [*ROOT.glob("*.md"), *(p for name in ("docs", "benchmarks", "fastrefine") for p in (ROOT / name).rglob("*.md"))]
)


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(evaluation.trained_features, "__defaults__", (60, 0))  # steps of the classifier, and seed
    text = (ROOT / page).read_text()
    if page == "README.md":
        assert text.count("iterations=100") == 1  # of shaping: all that makes it last
        text = text.replace("iterations=100", "iterations=3")
        text = text.replace("--outdir shaped", "--iterations 2 --outdir shaped").replace("--ids 0-49999", "--ids 0-99")
    blocks = BLOCK.findall(text)
    assert blocks
    namespace = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if page == "docs/samplers.md" else "default")
        for kind, block in blocks:
            if kind == "python":
                exec(compile(block, page, "exec"), namespace)
                continue
            for line in block.splitlines():
                command = line.removeprefix("$ ").removeprefix("PYTHONPATH=. ")
                assert command.startswith("fastrefine "), line
                done = CliRunner().invoke(cli, shlex.split(command)[1:])
                assert done.exit_code == 0, (line, done.output[-2000:], done.exception)
    assert capsys.readouterr().out or not any(kind == "python" for kind, _ in blocks)
    assert page != "README.md" or (tmp_path / "digits.png").is_file()


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: os.fspath(path.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(path):
    links = [link for link in LINK.findall(path.read_text()) if not link.startswith(("http://", "https://", "mailto:"))]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_page_of_papers_lists_every_experiment():
    rows = [line for line in (ROOT / "docs" / "papers.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(EXPERIMENTS)
    for row, experiment in zip(rows, EXPERIMENTS.values(), strict=True):
        assert f"| {experiment.source} | {experiment.minutes} |" in row
