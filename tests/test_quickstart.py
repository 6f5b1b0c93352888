"""docs/quickstart.md from its first line to its last, in processes of their own, with the figures that it shows."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.S)
FILE = re.compile(r"# (\w+\.py)\n")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
CLOSE, NEAR_ZERO = 0.3, 0.1  # relative, as the page says, and absolute for shares and logits


def fits(shown: str, line: str, near_zero: float = NEAR_ZERO) -> bool:
    """Whether a printed line has the words of one of the page, and figures near it."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, line)]
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(line), strict=False)
    return words[0] == words[1] and all(math.isclose(float(a), float(b), rel_tol=CLOSE, abs_tol=near_zero) for a, b in pairs)


def test_figures_are_compared_to_the_stated_tolerance():
    assert fits("recall[x-60, n=9]  0.5 (0.4 to 6)   3", "recall[x-60, n=9] 0.59 (0.49 to 7) 3.5")
    assert not fits("distance 97.2", "distance 160")
    assert not fits("distance 97.2", "other 97.2")


@pytest.fixture
def folder(tmp_path):
    """A folder, and the environment of a shell in which ``fastrefine`` and ``python`` are those of this checkout."""
    for name, module in (("fastrefine", "-m fastrefine"), ("python", "")):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        path = f'PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{ROOT}"'
        file.write_text(f'#!/bin/sh\n{path} PYTHONSAFEPATH={"1" if module else ""} exec "{sys.executable}" {module} "$@"\n')
        file.chmod(0o755)
    (tmp_path / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    return tmp_path / "work", environment


@pytest.mark.whole
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_page_runs_as_it_is_and_shows_what_it_prints(folder):
    work, environment = folder
    exports, checked = "", 0
    for kind, block in BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text()):
        if kind == "python":
            (work / FILE.match(block)[1]).write_text(block)
            continue
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, shown = part.partition("\n")
            if command.startswith("export "):
                exports += f"{command}; "
                continue
            done = subprocess.run(
                ["bash", "-c", exports + command], cwd=work, env=environment, capture_output=True, text=True, timeout=600
            )
            print(f"$ {command}\n{done.stdout}{done.stderr}")
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            printed = (done.stdout + done.stderr).splitlines()
            for line in filter(str.strip, shown.splitlines()):
                assert any(fits(line, other) for other in printed), (command, line, printed)
                checked += 1
    assert checked > 20
    assert Image.open(work / "quickstart.png").size == Image.open(ROOT / "docs" / "quickstart.png").size
