"""The machine that a benchmark runs on: its facts, its measured peaks, how a run on it is timed, where its results lie."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrefine.networks import torch_state

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MATRIX_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def arithmetic(precision: str) -> Any:
    """TF32 on or off as the engine has it for this precision, so that both sides have the same."""
    return torch_state.arithmetic(precision, False)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, what ``run`` returned): from an idle GPU to an idle GPU by its own clock.

    On a CPU with one thread the time of this process, which other work cannot lengthen; with more the time of day.
    """
    if device.type != "cuda":
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = now()
        value = run()
        return now() - began, value
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    first.record()
    value = run()
    synchronize(device)  # every stream of the device: some work is on other streams than the current one
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, value


def matmul_peak(precision: str, device: torch.device, size: int) -> float:
    """FLOP/s of a size^3 matrix product of random numbers at a precision: median of single products."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(DTYPES[precision]) for _ in range(2))
    with arithmetic(precision):
        seconds = sorted(timed(lambda: a @ b, device)[0] for _ in range(13))
    return 2 * size**3 / seconds[6]


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes read plus written per second by a copy on the device."""
    source = torch.empty(megabytes * 2**18, device=device).normal_()
    target = torch.empty_like(source)
    seconds = sorted(timed(lambda: target.copy_(source), device)[0] for _ in range(12))[5]
    return 2 * source.numel() * 4 / seconds


def cpu_flags() -> tuple[str, set[str]]:
    """(the processor's name, its features), as the system tells them."""
    info = Path("/proc/cpuinfo")
    told = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)$", info.read_text() if info.exists() else "", re.M))
    return told.get("model name") or platform.processor() or platform.machine(), set(told.get("flags", "").split())


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_flags()[0]


def said(*command: str) -> str:
    """What a program printed, or "" where it is absent or failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """The commit, with "+" where files differ from it; "unknown" outside a repository."""
    found = said("git", "rev-parse", "HEAD")
    return found + "+" * bool(found and said("git", "status", "--porcelain", "--untracked-files=no")) or "unknown"


def facts(device: torch.device, known_commit: str | None = None) -> dict[str, Any]:
    """Hardware and versions, as they stand beside every result."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    name, flags = cpu_flags()
    found: dict[str, Any] = {
        "device": device_name(device), "kind": device.type, "cpu": name, "cores": os.cpu_count(),
        "matrix_units": [unit for unit in MATRIX_UNITS if unit in flags], "commit": known_commit or commit(),
        "torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda or "none",
        "python": platform.python_version(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_mb": properties.total_memory // 2**20, "multiprocessors": properties.multi_processor_count}
        found |= {"driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def write_json(path: Path, value: Any) -> None:
    """As a whole or not at all: who writes after each part may be ended at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def folder(device: torch.device) -> Path:
    """Where the results of this machine lie: benchmarks/results/<its name>."""
    return RESULTS / re.sub("[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


if __name__ == "__main__":  # for the Makefile
    here = folder(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"{here}\n")
