"""What waits for the device is refused before a capture, a capture that breaks leaves torch usable, constants stay constant."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastrefine.engine import drivers
from fastrefine.errors import BackendError
from tests.support.driver_runs import Marks
from tests.support.refiners import pair, refiner, same


def assign(index, value):
    x = torch.ones(3, 2)
    x[index] = value


REFUSED = {
    "to another device": lambda: torch.ones(3).to("meta"),
    # how torch.tensor([1.0, 2.0], device="cuda") ends, after the copy that no dispatcher sees
    "a tensor made there": lambda: torch.ops.aten.lift_fresh(torch.ones(2, device="meta")),
    "into another device": lambda: torch.empty(3, device="meta").copy_(torch.ones(3)),
    "masked rows": lambda: assign(torch.tensor([True, False, True]), torch.zeros(1, 2)),
    "masked rows, bytes": lambda: torch.ones(3).index_put((torch.tensor([1, 0, 1], dtype=torch.uint8),), torch.zeros(2)),
    "unsafely": lambda: torch.ops.aten._index_put_impl_(torch.ones(3), [torch.ones(3) > 0], torch.zeros(3), False, True),
}
ALLOWED = {
    "a filled mask": lambda: assign(torch.tensor([True, False, True]), 0.5),
    "a row": lambda: assign(torch.tensor([0, 2]), torch.zeros(1, 2)),
    "another dtype": lambda: torch.ones(3).to("cpu", torch.float64),
    "a tensor of the host": lambda: torch.tensor([1.0, 2.0]),
    "a copy": lambda: torch.empty(3).copy_(torch.ones(3)),
    "a masked fill": lambda: torch.ones(3).masked_fill(torch.ones(3) > 0, 2.0),
}


@pytest.mark.parametrize("step", REFUSED)
def test_what_waits_for_the_device_is_seen_before_a_capture(step):
    with drivers.NoHostReads(), pytest.raises(RuntimeError, match="reads values of the device on the host"):
        REFUSED[step]()


@pytest.mark.parametrize("step", ALLOWED)
def test_what_stays_on_the_device_is_captured(step):
    with drivers.NoHostReads():
        ALLOWED[step]()


class Broken:
    """A capture whose step fails: its end then says no more than that."""

    def __init__(self, keep_graph):
        assert keep_graph
        self.log = []

    def capture_begin(self, pool, capture_error_mode):
        self.log.append(("begin", pool))

    def capture_end(self):
        self.log.append(("end",))
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nand advice")


def test_a_broken_capture_gives_its_memory_back_and_tells_the_first_error(monkeypatch, caplog):
    """Else torch believes that a capture is under way for the rest of the process."""
    log, stream = [], SimpleNamespace(device_index=3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for name in ("Stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: stream)
    monkeypatch.setattr(drivers, "_on", lambda given: contextlib.nullcontext())
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: log.append((name, *given)), raising=False)
    calls = []

    def step():
        calls.append(1)
        if len(calls) % 5 == 0:  # the capture, after three warm-ups and a look
            raise RuntimeError("operation not permitted when stream is capturing")

    class Driver(drivers.GraphReplay):
        def prepare(self, machine, forward):
            self.runtime.capture(step)

    driver = Driver(drivers.CudaRuntime(torch.device("cuda", 3)))
    machine = SimpleNamespace(target=SimpleNamespace(refused={}), captured={}, rule=SimpleNamespace(sampler=None))
    assert drivers.prepare(driver, machine, False, True).name == "host"
    assert log == [("_cuda_endAllocateToPool", 3, (0, 7)), ("_cuda_releasePool", 3, (0, 7))]
    assert "Python: operation not permitted when stream is capturing" in caplog.text
    with pytest.raises(BackendError, match="operation not permitted"):
        drivers.prepare(driver, machine, False, False)
    assert len(calls) == 5


def test_a_driver_that_is_refused_leaves_the_others(runtime, monkeypatch):
    def absent(graph, machine):
        raise BackendError("not built")

    monkeypatch.setattr(runtime, "loop", absent)
    one = refiner(driver="loop")
    with pytest.raises(BackendError, match="driver='loop' cannot repeat this step: not built"):
        one.sample(10)
    one = one.replaced(driver="graph")
    assert one.sample(10).report["driver"] == "graph"


def test_a_sampler_whose_step_is_refused_leaves_those_that_share_the_networks():
    class Driver(drivers.GraphReplay):
        def prepare(self, machine, forward):
            if machine.rule.sampler == "reads":
                raise BackendError("reads values")

    driver, target = Driver(None), SimpleNamespace(refused={})
    found = [
        drivers.prepare(driver, SimpleNamespace(target=target, captured={}, rule=SimpleNamespace(sampler=sampler)), False, True)
        for sampler in ("reads", 1, "reads")
    ]
    assert [one.name for one in found] == ["host", "graph", "host"]


@pytest.mark.parametrize("wrap", [lambda d: d, Marks], ids=["plain", "with coordinates"])
def test_an_updated_discriminator_needs_no_new_capture(runtime, wrap):
    g, d = pair()
    one = refiner((g, wrap(d)), driver="graph")
    one.sample(40)
    updated = wrap(pair()[1])
    with torch.no_grad():
        for p in updated.parameters():
            p.mul_(1.3)
    one._networks.refresh(updated)
    same(one.sample(40), refiner((g, updated), driver="host").sample(40))
    assert len(runtime.graphs) == 1
