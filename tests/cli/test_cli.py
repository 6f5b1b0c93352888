"""The command line: exit codes, one line for an error, and that help needs no torch."""

import subprocess
import sys
import warnings

import pytest
import torch

from fastrefine.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """arguments -> what ``fastrefine`` prints on stdout and stderr, in this process."""

    def call(*arguments, code):
        monkeypatch.setattr(sys, "argv", ["fastrefine", *arguments])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == code
        return capsys.readouterr()

    return call


def test_help_answers_without_importing_torch():
    code = """
import sys
from fastrefine.cli import cli
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in cli.commands)):
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert not end.code and "torch" not in sys.modules, arguments
    else:
        raise AssertionError(arguments)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [("demo", "--no-such-flag"), ("nonsense",), ("demo", "--samples", "3")])
def test_wrong_arguments_exit_with_2_and_one_line(run, arguments):
    assert "Error: " in run(*arguments, code=2).err.splitlines()[-1]


def test_errors_of_ours_exit_with_1_and_one_line(run, tmp_path):
    said = run("demo", "--data", str(tmp_path), "--outdir", str(tmp_path / "out"), code=1).err
    assert said.splitlines()[-1].startswith("fastrefine: ") and "Traceback" not in said


def test_doctor_says_which_backend_serves():
    """A process of its own, as every command is."""
    done = subprocess.run([sys.executable, "-m", "fastrefine", "doctor"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    out = done.stdout
    assert "backend reference  ok" in out and "used on cpu" in out and f"torch              {torch.__version__}" in out
