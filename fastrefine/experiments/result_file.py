"""The file an experiment leaves: its rows, what they claim, and on what they were measured."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastrefine as fr


def write(outdir: Path, experiment: str, *, cores: int, **content: Any) -> dict[str, Any]:
    """Writes ``outdir``/result.json: ``content`` (rows, seeds, recipe, claims, ...) with commit, hardware and versions."""
    record = {
        "experiment": experiment,
        **content,
        "commit": _commit(),
        "hardware": {"cpu": _cpu(), "cores": cores},
        "versions": {"fastrefine": fr.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    outdir.mkdir(parents=True, exist_ok=True)
    (outdir / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def tell(record: dict[str, Any]) -> None:
    """Prints what the record claims, and whether it holds."""
    for claim in record["claims"]:
        print(f"{'holds' if claim['holds'] else 'FAILS'}: {claim['claim']}")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with "+" where tracked files differ from it; None outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
