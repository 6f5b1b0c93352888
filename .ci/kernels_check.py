"""Compile every kernel for GPUs without one: ``python .ci/kernels_check.py 80 90``; the last line counts them.

Triton's by ``fastrefine.kernels.aot``, those in CUDA by nvcc; which of the two is not installed is skipped, and said.
Ends with an error at the first that fails.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def triton_kernels(architectures: list[str]) -> dict[str, int] | None:
    """Architecture -> how many compiled, as the ahead-of-time compiler says; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastrefine.kernels.aot", *architectures]
    compiler = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(compiler.stdout, end="", flush=True)
    if compiler.returncode:
        raise SystemExit(f"kernels-check: {' '.join(command[1:])} failed")
    counts = {found: int(count) for found, count in re.findall(r"sm_(\d+): (\d+) kernels", compiler.stdout)}
    if not all(counts.get(name) for name in architectures):
        raise SystemExit(f"kernels-check: no kernels for one of {', '.join(architectures)}, or no count of them")
    return counts


def cuda_sources(architectures: list[str]) -> int | None:
    """How many files of csrc/ compiled, for each architecture; None without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            for source in sources:
                target = Path(folder, f"{source.stem}.cubin")
                command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", str(source), "-o", str(target)]
                if subprocess.run(command).returncode:
                    raise SystemExit(f"kernels-check: csrc/{source.name} does not compile for sm_{architecture}")
                print(f"sm_{architecture} csrc/{source.name}: {target.stat().st_size} bytes")
    return len(sources)


def main(architectures: list[str]) -> None:
    """Compile all, print a line for each and one of counts."""
    kernels = triton_kernels(architectures)
    sources = cuda_sources(architectures)
    cuda = "CUDA sources skipped (nvcc is not on PATH)"
    if sources is not None:
        cuda = f"{sources} CUDA source{'' if sources == 1 else 's'}"
    parts = []
    for name in architectures:
        triton = "Triton kernels skipped (triton is not installed)" if kernels is None else f"{kernels[name]} Triton kernels"
        parts.append(f"sm_{name}: {triton}, {cuda}")
    print("kernels-check: " + "; ".join(parts))


if __name__ == "__main__":
    main(sys.argv[1:] or ["80", "90"])
