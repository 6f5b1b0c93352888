"""One small run with a driver, for compute-sanitizer: ``python -m benchmarks.gpu_small --driver graph [--census]``.

--census counts the nodes of the graphs that were captured on the way, by type; exit code 77 where it cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

import fastrefine as fr
from benchmarks.workloads import WORKLOADS

SKIPPED = 77  # exit code of a check that cannot be made here


def refine(device: str, driver: str, workload: str = "mlp2d") -> fr.Result:
    """64 samples, 8 slots, 5 steps."""
    known = WORKLOADS[workload]
    pair = tuple(network.to(device) for network in known.pair())
    refiner = fr.Refiner(
        *pair, fr.Collaborative(known.step_size), at=known.cuts["first"], max_steps=5, prior=fr.Normal(known.latent),
        num_slots=8, driver=driver,
    )  # fmt: skip
    return refiner.sample(64)


def census(workload: str) -> list[dict[str, int]]:
    """Node types and counts of each graph that a run with driver="graph" captures."""
    from fastrefine.engine import drivers, while_graph

    runtime: Any = drivers.CudaRuntime
    capture, graphs = runtime.capture, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        graphs.append(capture(*args, **kwargs))
        return graphs[-1]

    runtime.capture = recorded
    try:
        refine("cuda", "graph", workload)
    finally:
        runtime.capture = capture
    return [while_graph.census(graph) for graph in graphs]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_small", description=__doc__)
    parser.add_argument("--driver", default="host")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--census", action="store_true")
    given = parser.parse_args()
    if given.census:
        if not torch.cuda.is_available():
            print("no GPU, so nothing is captured")
            return SKIPPED
        try:
            print(json.dumps({name: census(name) for name in ("mlp2d", "dcgan64")}, indent=1))
        except (ImportError, AttributeError, fr.BackendError) as error:
            print(f"no census: {type(error).__name__}: {error}")
            return SKIPPED
        return 0
    result = refine(given.device, given.driver)
    assert bool((result.steps == 5).all()) and bool(result.images.isfinite().all())
    print(f"driver {result.report['driver']}, backend {result.report['backend']}: mean logit {result.logits.mean():.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
