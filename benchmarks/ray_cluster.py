"""A run on a local Ray cluster of which one process is killed by -9 in the middle of its shards, against one process.

python -m benchmarks.ray_cluster [--output FILE.json]
"""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import ray
import torch

import fastrefine.ray
from benchmarks.machine import RESULTS, commit, write_json
from fastrefine.production import run_folder
from fastrefine.production.configuration import Configuration, Shard
from fastrefine.production.worker import Outcome, Worker

SETTINGS: dict[str, Any] = {"pair": "digits", "ids": "0-2399", "shard_size": 200, "max_steps": 60, "num_slots": 64}
RUN = Configuration(**SETTINGS)
RECORD = RESULTS / "ray-cpu.json"
WORKERS = 3  # processes at once, and tasks: each has 4 shards


def start() -> None:
    """A small cluster on this machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it lives as long as this process, and opens no port to others
    ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)


def sha256(run: Path) -> str:
    """Of the merged npz of a run. Raises InputError where a shard is not done."""
    merged = run.with_suffix(".npz")
    run_folder.merge(run, merged)
    return hashlib.sha256(merged.read_bytes()).hexdigest()


def process_of(task: str) -> int | None:
    """The process of this cluster that works on a task, by the title that Ray gives it."""
    rows = subprocess.run(["ps", "-axo", "pid=,ppid=,command="], capture_output=True, text=True, check=True).stdout
    parents: dict[int, int] = {}
    found = None
    for row in rows.splitlines():
        pid, parent, command = row.split(None, 2)
        parents[int(pid)] = int(parent)
        if command.strip() == f"ray::{task}":
            found = int(pid)
    above = found
    while above not in (None, os.getpid()):
        above = parents.get(above)
    return None if above is None else found  # another cluster's has other ancestors


class Kill(threading.Thread):
    """Kills by -9 the process of the second task when it has finished one of its shards, and tells what was finished then.

    done: its finished shards, with the times of their files. left: of its shards how many were not finished.
    """

    def __init__(self, outdir: Path):
        super().__init__(daemon=True)
        self.folder = run_folder.Folder(outdir, RUN, "")
        self.done: dict[Path, int] = {}
        self.left = 0

    def run(self) -> None:
        own: list[Shard] = self.folder.share(1, WORKERS)
        while True:
            time.sleep(0.02)
            finished = [shard for shard in own if self.folder.marker(shard).exists()]
            if len(finished) == len(own):
                return  # too late, and self.done is empty
            if finished and (process := process_of(f"fastrefine 2 of {WORKERS}")):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                kept = [self.folder.file(shard) for shard in own if self.folder.marker(shard).exists()]
                self.left = len(own) - len(kept)
                self.done = {path: path.stat().st_mtime_ns for path in kept}
                return


def refine(outdir: Path, **options: Any) -> Outcome:
    """The run on the cluster that is connected."""
    return fastrefine.ray.refine(RUN, outdir, tasks=WORKERS, progress=False, **options)


def killed(outdir: Path, **options: Any) -> tuple[Kill, Outcome | Exception]:
    """The run with a process killed: who killed it, and what came out or was raised."""
    kill = Kill(outdir)
    kill.start()
    try:
        outcome: Outcome | Exception = refine(outdir, **options)
    except fastrefine.ray.FastrefineError as error:
        outcome = error
    kill.join(60)
    return kill, outcome


def record(scratch: Path) -> dict[str, Any]:
    """What was done and found. Raises AssertionError where the cluster's run is not that of one process."""
    worker = Worker(RUN, device="cpu")
    one = worker.run(scratch / "one")
    began = time.perf_counter()
    kill, outcome = killed(scratch / "cluster")
    seconds = time.perf_counter() - began
    assert isinstance(outcome, Outcome), outcome
    found = {
        "configuration": SETTINGS,
        "shards": one.made, "images": outcome.images, "workers": WORKERS, "tasks": WORKERS,
        "killed": {
            "signal": "SIGKILL", "processes": 1, "its_finished_shards": len(kill.done), "its_unfinished_shards": kill.left,
            "finished_shards_made_again": sum(path.stat().st_mtime_ns != then for path, then in kill.done.items()),
        },
        "complete": run_folder.verify(scratch / "cluster").complete,
        "rows": worker.refiner.sample(RUN.num_slots).report["repeatable"],
        "sha256": {name: sha256(scratch / name) for name in ("one", "cluster")},
        "seconds": {"one process, prepared": round(one.seconds, 1), "cluster, preparation included": round(seconds, 1)},
        "ray": ray.__version__, "torch": torch.__version__, "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert kill.left and kill.done and found["complete"] and len(set(found["sha256"].values())) == 1, found
    return {**found, "hashes_equal": True}


@click.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RECORD, show_default=True)
def main(output: Path) -> None:
    """Write FILE.json."""
    torch.set_num_threads(1)
    start()
    with tempfile.TemporaryDirectory() as scratch:
        write_json(output, record(Path(scratch)))
    ray.shutdown()


if __name__ == "__main__":
    main()
