"""``python -m benchmarks.threads``: what a second thread gives, on a CPU whose cores are idle.

The same samples are refined with one thread of torch and with two, in turn; figures are medians of wall time. Where an
evaluation is small, the engine uses one of the two threads (``torch_state.threads_for``), so that it is never slower.
"""

from __future__ import annotations

import datetime
import os
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch

import fastrefine as fr
from benchmarks.machine import RESULTS, facts, write_json
from benchmarks.workloads import WORKLOADS
from benchmarks.zoo import ratio

KIND = "fastrefine threads"
ROWS = (("mlp2d", 256, 100), ("dcgan32", 64, 5), ("dcgan64", 64, 5), ("sngan32", 16, 5))  # workload, samples, steps
THREADS = (1, 2)


def row(name: str, n: int, steps: int, rounds: int) -> dict[str, Any]:
    """One workload at its first cut, all samples in slots at once."""
    workload, before = WORKLOADS[name], torch.get_num_threads()
    at, z = workload.cuts["first"], torch.randn(n, workload.latent, generator=torch.Generator().manual_seed(0))
    refiner = fr.Refiner(
        *workload.pair(), fr.Collaborative(workload.step_size, control="fixed"), at=at, max_steps=steps, num_slots=n
    )
    seconds: dict[int, list[float]] = {count: [] for count in THREADS}
    used = {}
    try:
        for turn in range(rounds + 1):
            for count in THREADS:
                torch.set_num_threads(count)
                began = time.perf_counter()
                used[count] = refiner.refine(z).report["threads"]
                if turn:  # the first one prepares
                    seconds[count].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return {
        "workload": name, "at": at, "n": n, "K": steps, "used": used[2], "ratio": ratio(seconds[1], seconds[2]),
        "seconds": seconds,
    }  # fmt: skip


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "threads-cpu.json")
def main(rounds: int, output: Path) -> None:
    """How many times as fast two threads are as one, a line for each row as it comes."""
    record: dict[str, Any] = {
        "kind": KIND, "machine": facts(torch.device("cpu")), "load": os.getloadavg()[0],
        "command": "python -m benchmarks.threads",
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": [],
    }  # fmt: skip
    for name, n, steps in ROWS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = row(name, n, steps, rounds)
        record["rows"].append(found)
        click.echo(f"{name:<10} {n:>5} samples  two threads {found['ratio']:.2f}x one  ({found['used']} used)")
    write_json(output, record)


if __name__ == "__main__":
    main()
