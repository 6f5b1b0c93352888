"""The scripts of examples/ explain themselves, say what is missing, and run on a checkout."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NETWORKS = """
from torch import nn

def generator(width):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh())

def discriminator(width):
    return nn.Sequential(nn.Linear(width, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
"""


def run(script, *arguments, cwd):
    command = [sys.executable, str(script), *map(str, arguments)]
    root = str(Path(__file__).parent.parent)
    environment = {"PYTHONPATH": root, "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_itself_and_says_that_the_checkout_is_missing(script, tmp_path, monkeypatch, capsys):
    names = "--generator", "n:generator", "--discriminator", "n:discriminator", "--latent", "4"
    for arguments, wanted in (
        (("--help",), "--checkout"),
        (("--checkout", str(tmp_path / "absent"), *names), "is no folder; clone the repository there first"),
    ):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        told = capsys.readouterr()
        assert wanted in f"{told.out}{told.err}{end.value}"


def test_an_example_refines_with_a_checkout(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORKS)
    names = "--generator", "nets:generator", "--discriminator", "nets:discriminator", "--latent", 4
    arguments = "--arguments", '{"width": 6}', '{"width": 6}', "--samples", 5, "--steps", 3
    found = run(EXAMPLES[0], "--checkout", tmp_path, *names, *arguments, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    kept = torch.load(tmp_path / "refined.pt", weights_only=True)
    assert kept["after"].shape == (5, 6) and not torch.equal(kept["before"], kept["after"])
