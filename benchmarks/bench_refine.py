"""The rows of a CPU under pytest-benchmark, for who compares its reports: ``pytest benchmarks --benchmark-json=FILE``.

Timing never asserts; that the results are equal is asserted before anything is timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.measure import Bench, Budget, Measurement
from benchmarks.rows import CPU, Row, cpu_rows


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    quick = request.config.getoption("--quick")
    scale = replace(CPU, slots=(64,), batches=(64,), compile=False, seconds=2.0, rival_seconds=1.0) if quick else CPU
    yield Bench(torch.device("cpu"), scale, Budget(float("inf")))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("row", cpu_rows(), ids=lambda row: row.label.replace(" ", "-"))
def bench_refine(bench: Bench, benchmark: Any, row: Row) -> None:
    """Ours in the statistics, each round after one of every rival; all else of the row in extra_info."""
    found = Measurement(bench, row)
    found.result = benchmark.pedantic(found.run, setup=found.race_rivals, rounds=bench.scale.rounds)
    if not benchmark.disabled:
        found.own_seconds = benchmark.stats.stats.data
        benchmark.extra_info.update(found.facts(), command="pytest benchmarks")
