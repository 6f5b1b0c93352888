"""The device loop against a fake CUDA runtime: which calls, what is refused, who cleans up, when the loop ends."""

import sys
from typing import ClassVar

import numpy as np
import pytest
import torch

import fastrefine.cli.doctor as doctor
from fastrefine.engine import while_graph
from fastrefine.errors import BackendError
from fastrefine.ops import slots
from tests.support import fake_cudart
from tests.support.fake_cudart import EMPTY, HOST, KERNEL, MEMCPY, MEMSET, FakeRuntime


@pytest.fixture(autouse=True)
def _built(monkeypatch):
    """FASTREFINE_BUILD=none switches the extension off; these tests bring their own."""
    monkeypatch.delenv("FASTREFINE_BUILD", raising=False)


@pytest.fixture(scope="session")
def built(shared_folder) -> FakeRuntime:
    return fake_cudart.load(shared_folder / "fake_cudart")


@pytest.fixture
def fake(built):
    built.reset()
    yield built
    assert built.faults() == []


class Run:
    """A run on the fake: each step admits one id and now and then frees a slot."""

    def __init__(self, fake: FakeRuntime, *, live: int = 100, waiting: int = 1000, kernels: int = 1) -> None:
        self.counters, self.control = np.zeros(8, np.int64), np.zeros(3, np.int64)
        self.counters[slots.LIVE], self.counters[slots.END] = live, waiting
        self.steps = 0
        self.fake = fake
        fake.reset(step=self.step)
        at = fake.graph(*[KERNEL] * kernels), self.counters.ctypes.data, self.control.ctypes.data
        self.loop = fake.module.WhileGraph(*at, device=0, stream=5)

    def step(self) -> None:
        self.steps += 1
        if self.counters[slots.LIVE] > 0:
            self.counters[slots.LIVE] -= 1
        if self.counters[slots.NEXT] < self.counters[slots.END]:
            self.counters[slots.NEXT] += 1

    def launch(self, cap: int, low: int = 0) -> int:
        """Steps done, which control must report."""
        before = self.steps
        self.control[1:] = cap, low
        self.loop.launch(5)
        assert self.control.tolist() == [self.steps - before, cap, low]
        return self.steps - before


def test_one_step_per_turn_is_built_in_this_order(fake):
    fake.module.WhileGraph(fake.graph(KERNEL), 8, 16, device=1, stream=5)
    assert [line for line in fake.calls() if "Get" not in line] == [
        "cudaSetDevice 1",
        "cudaGraphCreate 0",
        "cudaGraphConditionalHandleCreate top 0 1",
        "cudaGraphAddKernelNode top [] threads=1 handle=100 begins",
        "cudaGraphAddNode top [setter2] while handle=100",
        "cudaGraphAddChildGraphNode body [] step",
        "cudaGraphAddKernelNode body [child4] threads=1 handle=100 ends a step",
        "cudaGraphInstantiateWithFlags top 0",
        "cudaGraphUpload stream=5",
        "cudaSetDevice 0",
        "cudaGraphExecDestroy",  # nobody kept it
        "cudaGraphDestroy",
    ]


def test_census_counts_child_graphs(fake):
    inner = fake.graph(KERNEL, MEMSET)
    middle = fake.graph(KERNEL, MEMCPY, EMPTY, children=(inner, inner))
    graph = fake.graph(KERNEL, children=(middle,))
    expected = {"kernel": 4, "memset": 2, "memcpy": 1, "empty": 1, "child graph": 3}
    assert fake.module.census(graph) == expected
    fake.module.WhileGraph(graph, 8, 16, device=0, stream=0).destroy()  # all of it is allowed


FORBIDDEN = {
    HOST: "host function",
    6: "event wait",
    7: "event record",
    8: "semaphore signal",
    9: "semaphore wait",
    10: "memory allocation",
    11: "memory free",
    12: "type 12",
    13: "conditional",
}


@pytest.mark.parametrize("kind", FORBIDDEN, ids=FORBIDDEN.get)
def test_nodes_that_a_body_may_not_hold_are_refused_by_name(fake, kind):
    nested = fake.graph(KERNEL, children=(fake.graph(KERNEL, kind, kind),))
    for graph, times in ((fake.graph(kind), 1), (nested, 2)):
        with pytest.raises(ValueError, match=f"a WHILE body may not: {times} x {FORBIDDEN[kind]}$"):
            fake.module.WhileGraph(graph, 8, 16, device=0, stream=0)
    assert fake.alive() == 0 and not [line for line in fake.calls() if "Create" in line]


def test_all_refused_nodes_are_named_at_once(fake):
    with pytest.raises(ValueError, match="1 x event record, 2 x host function$"):
        fake.module.WhileGraph(fake.graph(HOST, KERNEL, 7, HOST), 8, 16, device=0, stream=0)


def test_cooperative_kernels_need_a_newer_driver(fake):
    graph = fake.graph(KERNEL, cooperative=True)
    fake.reset(driver=12050)
    assert fake.module.census(graph) == {"cooperative kernel": 1}
    for driver in (12060, 13000):
        fake.reset(driver=driver)
        assert fake.module.census(graph) == {"kernel": 1}


def test_an_empty_step_and_null_handles_are_refused(fake):
    for arguments, reason in (
        ((fake.graph(), 8, 16), "is empty"),
        ((0, 8, 16), "null"),
        ((fake.graph(KERNEL), 0, 16), "null"),
        ((fake.graph(KERNEL), 8, 0), "null"),
    ):
        with pytest.raises(ValueError, match=reason):
            fake.module.WhileGraph(*arguments, device=0, stream=0)


@pytest.mark.parametrize(
    ("driver", "reason"), [(0, "no CUDA driver"), (12030, "driver is for CUDA 12.3, WHILE nodes need 12.4"), (12040, "")]
)
def test_an_old_driver_is_refused_with_the_reason(fake, driver, reason):
    fake.reset(driver=driver)
    found = fake.module.unavailable()
    if reason:
        assert reason in found
        with pytest.raises(RuntimeError, match=reason):
            fake.module.WhileGraph(fake.graph(KERNEL), 8, 16, device=0, stream=0)
    else:  # of the same major version as the headers, or refused for that
        assert found == "" or "was built with" in found


def test_every_error_of_cuda_is_named_and_leaves_nothing_behind(fake):
    graph = fake.graph(KERNEL, children=(fake.graph(KERNEL),))

    def create(call: int) -> object:
        fake.calls()
        fake.fail_at(call)
        return fake.module.WhileGraph(graph, 8, 16, device=1, stream=5)

    create(0)
    expected = [line.split()[0] for line in fake.calls()]
    expected = expected[: expected.index("cudaGraphUpload") + 1]
    assert len(expected) > 15 and fake.alive() == 0
    for number, name in enumerate(expected, 1):
        with pytest.raises(RuntimeError, match=f"^cudaErrorInvalidValue in {name}.*invalid argument$"):
            create(number)
        assert fake.alive() == 0 and fake.device() == 0 and fake.faults() == [], name
        made = "cudaGraphCreate 0" in (calls := fake.calls()) and name != "cudaGraphCreate"
        assert calls.count("cudaGraphDestroy") == made
        assert calls.count("cudaGraphExecDestroy") == (name == "cudaGraphUpload")


def test_destroying_twice_does_nothing_and_a_launch_then_is_an_error(fake):
    loop = fake.module.WhileGraph(fake.graph(KERNEL), 8, 16, device=0, stream=0)
    assert fake.alive() == 2
    loop.destroy()
    loop.destroy()
    assert fake.alive() == 0
    with pytest.raises(ValueError, match="was destroyed"):
        loop.launch(0)
    del loop


def test_a_failed_launch_says_so_and_the_next_one_runs(fake):
    run = Run(fake, live=3)
    fake.fail_at(3)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue in cudaGraphLaunch"):
        run.launch(cap=10)
    fake.fail_at(0)
    assert run.launch(cap=10) == 3


def test_the_loop_ends_when_no_slot_is_live(fake):
    run = Run(fake, live=7)
    assert run.launch(cap=100) == 7
    assert run.launch(cap=100) == 0  # and does not begin again


@pytest.mark.parametrize("cap", [1, 2, 9])
def test_the_loop_ends_at_the_cap_and_goes_on_with_the_next_launch(fake, cap):
    run = Run(fake, live=30)
    assert [run.launch(cap), run.launch(cap), run.launch(100)] == [cap, cap, 30 - 2 * cap]


def test_the_loop_ends_when_fewer_than_low_ids_wait(fake):
    run = Run(fake, waiting=20)
    assert run.launch(cap=100, low=8) == 13  # 7 wait
    assert run.launch(cap=100, low=8) == 0
    run.counters[slots.END] += 10
    assert run.launch(cap=100, low=8) == 10
    assert run.launch(cap=100, low=0) == 77  # the pool runs dry, the slots run out


def test_every_kernel_of_the_step_runs_before_the_look(fake):
    run = Run(fake, live=7, kernels=4)
    run.control[1:] = 100, 0
    run.loop.launch(5)
    assert (run.steps, run.control[0]) == (8, 2)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


class Captured:
    def __init__(self, raw: int) -> None:
        self.raw = raw

    def raw_cuda_graph(self) -> int:
        return self.raw


class Stream:
    cuda_stream = 77


class Event:
    log: ClassVar[list[str]] = []

    def record(self, stream: Stream) -> None:
        self.log.append(f"record {stream.cuda_stream}")

    def synchronize(self) -> None:
        self.log.append("synchronize")


@pytest.fixture
def owner(fake, monkeypatch):
    """WhileGraph of Python on the fake, with its counters."""
    monkeypatch.setattr(while_graph, "_load", lambda: fake.module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    counters = torch.zeros(8, dtype=torch.int64).as_subclass(OnGpu)
    counters[slots.LIVE], counters[slots.END] = 6, 100

    def step() -> None:
        counters[slots.LIVE] -= 1

    fake.reset(step=step)
    return while_graph.WhileGraph(Captured(fake.graph(KERNEL)), counters)


def test_the_owner_launches_with_cap_and_low_of_each_launch(owner, fake):
    owner.launch(cap=2)
    assert owner.control.tolist() == [2, 2, 0]
    owner.launch(cap=3, low=200)
    assert owner.control.tolist() == [0, 3, 200]
    owner.launch(cap=3, low=100)
    assert owner.control.tolist() == [3, 3, 100]
    assert "cudaGraphLaunch stream=77" in fake.calls() and Event.log == ["record 77"] * 3
    for cap, low in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="cap >= 1 and low >= 0"):
            owner.launch(cap, low)


def test_the_owner_waits_before_it_lets_go(owner, fake):
    owner.launch(cap=2)
    owner.close()
    assert fake.alive() == 0 and owner.graph is None
    owner.close()
    assert Event.log == ["record 77", "synchronize"]
    with pytest.raises(ValueError, match="was closed"):
        owner.launch(1)


def test_the_owner_refuses_what_it_cannot_use(owner, fake):
    with pytest.raises(BackendError, match="device loop: the captured step holds.*host function"):
        while_graph.WhileGraph(Captured(fake.graph(HOST)), owner.counters)
    for counters in (torch.zeros(8, dtype=torch.int64), torch.zeros(8).as_subclass(OnGpu), owner.counters[::2]):
        with pytest.raises(ValueError, match="wanted contiguous int64 on a GPU"):
            while_graph.WhileGraph(Captured(fake.graph(KERNEL)), counters)
    with pytest.raises(ValueError, match="3 or more, got 2"):
        while_graph.WhileGraph(Captured(fake.graph(KERNEL)), owner.counters[:2])


def test_absence_is_one_line_and_asking_then_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrefine._device_loop", None)
    assert "fastrefine._device_loop is not built" in while_graph.available()
    monkeypatch.setenv("FASTREFINE_BUILD", "none")
    assert while_graph.available() == "FASTREFINE_BUILD=none" == doctor.report()["device loop"]
    with pytest.raises(BackendError, match="FASTREFINE_BUILD=none"):
        while_graph.WhileGraph(Captured(1), torch.zeros(8, dtype=torch.int64).as_subclass(OnGpu))


def test_a_broken_extension_is_told_with_its_cause(monkeypatch):
    def load(name: str) -> None:
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(while_graph.importlib, "import_module", load)
    assert (
        while_graph.available()
        == "fastrefine._device_loop exists but does not load: libfoo.so.1: cannot open shared object file"
    )


def test_old_drivers_are_told_by_available(fake, monkeypatch):
    fake.reset(driver=12020)
    monkeypatch.setitem(sys.modules, "fastrefine._device_loop", fake.module)
    assert while_graph.available() == "the driver is for CUDA 12.2, WHILE nodes need 12.4"
