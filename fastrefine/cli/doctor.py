"""What `fastrefine doctor` prints."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from fastrefine import __version__, ops
from fastrefine.engine import while_graph


def report() -> dict[str, str]:
    """Name -> value: versions, devices, and for each backend "ok" or the reason why it is absent or broken."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    avx512, amx = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    facts = {
        "fastrefine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "cpu bfloat16": "AMX" if amx else "AVX-512" if avx512 else "emulated",
        "gpus": ", ".join(devices) or "none",
    }
    facts |= {f"backend {name}": state for name, state in ops.available().items()}
    facts["device loop"] = while_graph.available()
    for device in ("cpu", *(["cuda"] if devices else [])):
        facts[f"used on {device}"] = ops.choose(torch.device(device), "sgd")
    return facts
