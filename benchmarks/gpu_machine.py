"""The machine a GPU command runs on: its facts, its measured peaks, and how a run on it is timed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import cpu_model
from fastrefine.networks import torch_state

ROOT = Path(__file__).parent.parent
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arithmetic(precision: str) -> Any:
    """TF32 on or off as the engine has it for this precision, so that both sides have the same."""
    return torch_state.arithmetic(precision, False)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds from an idle device to an idle device, what ``run`` returned)."""
    synchronize(device)
    started = time.perf_counter()
    value = run()
    synchronize(device)
    return time.perf_counter() - started, value


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def write_json(path: Path, value: Any) -> None:
    """As a whole or not at all: who writes after each part may be ended at any time."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


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
    found: dict[str, Any] = {
        "gpu": device_name(device) if device.type == "cuda" else f"none: a stand-in on {cpu_model()}",
        "commit": known_commit or commit(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_mb": properties.total_memory // 2**20, "multiprocessors": properties.multi_processor_count}
        found |= {"driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def matmul_peak(precision: str, device: torch.device, size: int) -> dict[str, Any]:
    """FLOP/s of a size^3 matrix product of random numbers at a precision: median of single products."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(DTYPES[precision]) for _ in range(2))
    with arithmetic(precision):
        seconds = [timed(lambda: a @ b, device)[0] for _ in range(13)][3:]
    return {"flops_per_second": 2 * size**3 / sorted(seconds)[len(seconds) // 2], "size": size}


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes read plus written per second by a copy on the device."""
    source = torch.empty(megabytes * 2**18, device=device).normal_()
    target = torch.empty_like(source)
    seconds = sorted(timed(lambda: target.copy_(source), device)[0] for _ in range(12))[5]
    return 2 * source.numel() * 4 / seconds
