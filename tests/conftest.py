"""One thread, and the Triton interpreter where there is no GPU: both before anything imports triton."""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit runs
os.environ.pop("FASTREFINE_BACKEND", None)


@pytest.fixture
def runtime(monkeypatch):
    """The CPU stand-in for CUDA's graphs, for refiners made with driver="graph" or "loop" while the test runs."""
    from fastrefine.engine import drivers
    from tests.support.stand_in import KINDS, Runtime

    stand_in = Runtime()
    original = drivers.choose

    def choose(name, device):
        return KINDS[name](stand_in) if name in KINDS else original(name, device)

    monkeypatch.setattr(drivers, "choose", choose)
    return stand_in
