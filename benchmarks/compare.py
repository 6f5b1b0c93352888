"""Two revisions of fastrefine timed in turn: ratios with intervals, for ``python -m benchmarks compare``.

Each start has a process for each revision, and the two take turns within every round. The ratio of a start is the median of its
rounds. What differs from process to process, such as the layout of memory, lies between the starts. The interval spans them.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES, WORKER = HERE / "compare_cases.py", HERE / "compare_worker.py"
SIDES = ("base", "head")


class Failed(Exception):
    """A revision that cannot be built, or a case that does not run."""


@dataclass(frozen=True)
class Ratio:
    """Seconds of head over seconds of base, of one case: above 1 head is slower.

    ratios: one for each start. Of n starts the span holds the true median with probability 1 - 2 / 2^n, of six with 97 %.
    """

    case: str
    ratios: tuple[float, ...]
    seconds: Mapping[str, list[float]]

    @property
    def median(self) -> float:
        """Over the starts."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest."""
        return min(self.ratios), max(self.ratios)

    def slower(self, threshold: float) -> bool:
        """Whether head is slower by more than ``threshold``, and in every start."""
        return self.median > 1 + threshold and self.interval[0] > 1


def unpacked(root: Path, revision: str, folder: Path) -> tuple[str, Path]:
    """(commit, the files of a revision of the repository ``root`` in a folder of their own, its extensions built)."""
    commit = _output(root, "git", "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    tree = folder / commit[:12]
    built = tree / f".built-{sys.implementation.cache_tag}"
    if built.exists():
        return commit, tree
    tree.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(_output(root, "git", "archive", commit))) as archive:
        archive.extractall(tree, filter="data")
    if (tree / "setup.py").exists():
        _output(tree, sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    built.touch()
    return commit, tree


def _output(folder: Path, *command: str) -> bytes:
    done = subprocess.run(command, cwd=folder, capture_output=True)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    return done.stdout


class Worker:
    """A process that times cases with the fastrefine of one tree; for ``with``."""

    def __init__(self, tree: Path, cases: Path):
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.tree, command = tree, [sys.executable, str(WORKER), str(cases.resolve()), str(tree)]
        self.process = subprocess.Popen(
            command, env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        self.cases: list[str] = self._answer("cases")
        return self

    def __exit__(self, *unused: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def seconds(self, case: str) -> float:
        """Of one run."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return self._answer("seconds")

    def _answer(self, key: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended; its error stands above"}
        if key not in answer:
            raise Failed(f"{self.tree}: {answer.get('error', answer)}")
        return answer[key]


def compared(
    trees: Mapping[str, Path], cases: Path, starts: int, rounds: int, tell: Callable[[str], Any] = print
) -> list[Ratio]:
    """A ratio for each case that both sides have; ``trees``: of "base" and "head"."""
    seconds: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, list[float]] = {}
    for start in range(starts):
        order = SIDES if start % 2 == 0 else SIDES[::-1]
        with Worker(trees[order[0]], cases) as one, Worker(trees[order[1]], cases) as other:
            workers = dict(zip(order, (one, other), strict=True))
            for case in (c for c in one.cases if c in other.cases):
                of_round = []
                for turn in range(rounds):
                    now = {side: workers[side].seconds(case) for side in (order if turn % 2 == 0 else order[::-1])}
                    of_round.append(now["head"] / now["base"])
                    for side in SIDES:
                        seconds.setdefault(case, {side: [] for side in SIDES})[side].append(now[side])
                ratios.setdefault(case, []).append(statistics.median(of_round))
        tell(f"start {start + 1} of {starts}: " + ", ".join(f"{case} {found[-1]:.3f}" for case, found in ratios.items()))
    return [Ratio(case, tuple(found), seconds[case]) for case, found in ratios.items()]


def table(ratios: list[Ratio], threshold: float) -> str:
    """One line a case."""
    lines = [f"{'case':<20} {'base, s':>9} {'head, s':>9}   head / base (interval)"]
    for one in ratios:
        base, head = (statistics.median(one.seconds[side]) for side in SIDES)
        low, high = one.interval
        verdict = f"   slower by more than {threshold:.0%}" * one.slower(threshold)
        lines.append(f"{one.case:<20} {base:>9.4f} {head:>9.4f}   {one.median:.3f} ({low:.3f} to {high:.3f}){verdict}")
    return "\n".join(lines)


def as_pytest_benchmark(ratios: list[Ratio], side: str, commit: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The seconds of one side as pytest-benchmark writes them, for ``pytest-benchmark compare`` and others."""
    found = [
        timed(one.case, f"benchmarks/compare_cases.py::{one.case}", one.seconds[side], {"ratios": one.ratios}) for one in ratios
    ]
    return {"machine_info": dict(machine), "commit_info": {"id": commit}, "benchmarks": found, "version": "5.0.0"}


def timed(name: str, fullname: str, data: list[float], extra: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a file by pytest-benchmark; data: the seconds of each round, extra: further figures."""
    quartiles = statistics.quantiles(data, n=4) if len(data) > 1 else data * 3
    stats = {
        "min": min(data), "max": max(data), "mean": statistics.mean(data), "median": statistics.median(data),
        "stddev": statistics.stdev(data) if len(data) > 1 else 0.0, "rounds": len(data), "iterations": 1, "data": data,
        "q1": quartiles[0], "q3": quartiles[2], "iqr": quartiles[2] - quartiles[0], "total": sum(data),
        "ops": 1 / statistics.mean(data), "outliers": "0;0", "iqr_outliers": 0, "stddev_outliers": 0,
        "ld15iqr": min(data), "hd15iqr": max(data),
    }  # fmt: skip
    return {
        "name": name, "fullname": fullname, "group": None, "params": None, "param": None, "extra_info": dict(extra),
        "options": {"timer": "process_time"}, "stats": stats,
    }  # fmt: skip
