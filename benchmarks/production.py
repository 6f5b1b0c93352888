"""What the commands of production promise, at full size: one set of bytes by any way, bounded memory, the writer's cost.

python -m benchmarks.production --outdir SCRATCH --output FILE.json [--n 50000] [--images 1000000] [--only PART]
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

import fastrefine as fr
from benchmarks.machine import commit, write_json
from fastrefine.models import dcgan_discriminator, dcgan_generator
from fastrefine.production import run_folder
from fastrefine.production.configuration import Configuration
from fastrefine.production.worker import HELD, Worker

REFINE = ("-m", "fastrefine", "refine", "--pair", "digits", "--real", "digits", "--stop", "median")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0")
CUT_AFTER = 0.3  # of the shards


def ways(outdir: Path, n: int) -> dict[str, Any]:
    """sha256 of the merged npz of ``n`` digits, made by each way; raises AssertionError where two differ."""

    def start(name: str, *more: str, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        command = [sys.executable, *launcher, *REFINE, "--ids", f"0-{n - 1}", "--outdir", str(outdir / name), *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def finished(process: subprocess.Popen[bytes]) -> None:
        if process.wait():
            raise RuntimeError(f"{process.args} ended with {process.returncode}")

    def cut(process: subprocess.Popen[bytes], name: str, signals: int) -> int:
        wanted = CUT_AFTER * -(-n // 1000)
        while len(list((outdir / name).glob("*.done.json"))) < wanted and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signals)
        process.wait()
        return len(list((outdir / name).glob("*.done.json")))

    def killed(name: str) -> dict[str, Any]:
        left = cut(start(name, launcher=TORCHRUN), name, signal.SIGKILL)
        finished(start(name, launcher=TORCHRUN))
        return {"shards_before": left}

    def interrupted(name: str) -> dict[str, Any]:
        first = start(name)
        left = cut(first, name, signal.SIGINT)
        assert first.returncode == 130, first.returncode
        finished(start(name, launcher=TORCHRUN))
        return {"shards_before": left}

    def array(name: str) -> dict[str, Any]:
        for job in range(3):
            finished(start(name, "--shard-id", str(job), "--num-shards", "3"))
        return {}

    makers: dict[str, Callable[[str], dict[str, Any]]] = {
        "one process": lambda name: finished(start(name)) or {},
        "torchrun, 2 workers": lambda name: finished(start(name, launcher=TORCHRUN)) or {},
        "2 workers killed by -9, started again": killed,
        "one process stopped by Ctrl-C, gone on with by 2 workers": interrupted,
        "3 array jobs": array,
    }
    found: dict[str, Any] = {}
    for name, make in makers.items():
        began = time.perf_counter()
        told = make(name)
        assert run_folder.verify(outdir / name).complete
        merged = outdir / "merged.npz"
        run_folder.merge(outdir / name, merged)
        with merged.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = {"sha256": digest, "seconds": time.perf_counter() - began, **told}
        print(name, found[name], flush=True)
    assert len({row["sha256"] for row in found.values()}) == 1, found
    return found


def memory(outdir: Path, images: int) -> dict[str, Any]:
    """Largest resident size, in MB, of the command for ``images`` digits of 8x8 and for fewer, and of merging them."""
    found: dict[str, Any] = {}
    for n in (images // 100, images // 10, images):
        path = str(outdir / f"memory-{n}")
        refine = [*REFINE, "--max-steps", "2", "--shard-size", "10000", "--ids", f"0-{n - 1}", "--outdir", path]
        for name, arguments in (
            ("refine", refine), ("verify", ["-m", "fastrefine", "verify", path]),
            ("merge", ["-m", "fastrefine", "merge", path, "--output", f"{path}.npz"]),
        ):  # fmt: skip
            began = time.perf_counter()
            child = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
            _, status, usage = os.wait4(child, 0)
            assert status == 0, (name, status)
            found.setdefault(str(n), {})[name] = {
                "peak_mb": usage.ru_maxrss / 1024, "seconds": time.perf_counter() - began
            }  # fmt: skip
        print(n, found[str(n)], flush=True)
    return found


def writing(outdir: Path) -> dict[str, Any]:
    """Images/s of a run with its files / those of the engine alone, the same samples, in turn; the median of three rounds."""
    pair = fr.save_pair(
        outdir / "dcgan", dcgan_generator(32, 100, 32), dcgan_discriminator(32, 32), prior=fr.Uniform(100), at="2",
        code=("fastrefine.models:dcgan_generator", "fastrefine.models:dcgan_discriminator"),
        arguments=({"size": 32, "latent": 100, "features": 32}, {"size": 32, "features": 32}),
    )  # fmt: skip
    digits = Configuration(pair="digits", real="digits", stop="median", ids="0-19999")
    dcgan = Configuration(pair=str(pair), max_steps=10, num_slots=128, ids="0-2999")
    found: dict[str, Any] = {}
    for name, base, kinds in (("digits, 1x8x8", digits, ("npz",)), ("DCGAN, 3x32x32", dcgan, ("npz", "wds", "png"))):
        for kind in kinds:
            worker = Worker(replace(base, format=kind))
            count = sum(shard.count for shard in run_folder.shards(base))
            worker.refiner.sample(worker.configuration.num_slots)
            rates, ratios = [], []
            for turn in range(3):
                began = time.perf_counter()
                for _ in worker.refiner.stream(count, chunk=HELD):
                    pass
                alone = time.perf_counter() - began
                seconds = worker.run(outdir / f"{name}-{kind}-{turn}").seconds
                rates.append(count / seconds)
                ratios.append(alone / seconds)
            found[f"{name}, {kind}"] = {"ratio": statistics.median(ratios), "ratios": ratios, "images_per_second": rates}
            print(name, kind, found[f"{name}, {kind}"], flush=True)
    return found


@click.command()
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), help="For the runs (default: a temporary one).")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--n", default=50_000, show_default=True, help="Images of each way.")
@click.option("--images", default=1_000_000, show_default=True, help="Of the run whose memory is measured.")
@click.option("--only", type=click.Choice(("ways", "memory", "writing")), multiple=True)
def main(outdir: Path | None, output: Path, n: int, images: int, only: tuple[str, ...]) -> None:
    """Measure, and write FILE.json; a part that is not asked for stays as the file has it."""
    record = json.loads(output.read_text()) if output.exists() else {}
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ways": lambda path: ways(path, n), "memory": lambda path: memory(path, images), "writing": writing
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=outdir) as scratch:
        for name in only or parts:
            record[name] = {
                **parts[name](Path(scratch)), "commit": commit(), "torch": torch.__version__,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
            }  # fmt: skip
            write_json(output, record)


if __name__ == "__main__":
    main()
