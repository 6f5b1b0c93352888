"""Options of the benchmarks, and what is recorded of the machine. Times are CPU times of the process: see pytest.ini."""

from __future__ import annotations

import pydoc
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import Race, cpu_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="batches of 64 and 256 only, fewer images, no torch.compile")
    parser.addoption(
        "--batches", default="64,256,1024", help="batch sizes to choose from, with torch.compile (default 64,256,1024)"
    )
    parser.addoption("--threads", type=int, default=1, help="threads of torch, ours and the baselines' (default 1)")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any, quick: bool) -> Race:
    given = request.config.getoption("--batches")
    batches = (64, 256) if quick else tuple(int(size) for size in given.split(","))
    command = "pytest benchmarks" + " --quick" * quick + f" --batches {given}" * (not quick)
    timer = pydoc.locate(request.config.getoption("benchmark_timer"))
    assert callable(timer)
    return Race(benchmark, timer, batches, command)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    flags = machine_info.get("cpu", {}).get("flags", [])
    machine_info["cpu_model"] = cpu_model()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = config.getoption("--threads")
    machine_info["matrix_units"] = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile") if f in flags]


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    if commit_info.get("id") == "unversioned":  # pytest-benchmark looks in the folder it was started in
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=config.rootpath, capture_output=True, text=True, check=False)
        commit_info["id"] = found.stdout.strip() or "unversioned"
