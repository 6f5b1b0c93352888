"""The code blocks of the documentation run, each page's in one namespace and one folder from top to bottom."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    "samplers.md", "quickstart.md", "production.md", "evaluation.md", "embedding.md", "choosing.md", "reports.md"
)  # fmt: skip
BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.S)


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    blocks = BLOCK.findall((DOCS / page).read_text())
    assert blocks
    namespace = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if page == "samplers.md" else "default")
        for kind, text in blocks:
            if kind == "python":
                exec(compile(text, page, "exec"), namespace)
                continue
            for line in text.splitlines():
                assert line.startswith("$ fastrefine "), line
                command = [sys.executable, "-m", "fastrefine", *shlex.split(line)[2:]]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, (line, done.stderr[-2000:])
    assert capsys.readouterr().out or not any(kind == "python" for kind, _ in blocks)
