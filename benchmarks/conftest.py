"""Options of ``pytest benchmarks``, and what is recorded of the machine. Times are CPU times of the process: see pytest.ini."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.machine import commit, facts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="batches of 64 only, no torch.compile")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    known = facts(torch.device("cpu"))
    machine_info |= {"cpu_model": known["cpu"], **{key: known[key] for key in ("torch", "threads", "matrix_units")}}


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info["id"] = commit().rstrip("+")  # pytest-benchmark looks in the folder it was started in
