"""The device loop on a GPU: it ends where the counters say, equals replays bit for bit, and keeps its memory."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from benchmarks.profiling import census
from fastrefine.engine import while_graph
from fastrefine.errors import BackendError
from fastrefine.ops import slots

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if (reason := while_graph.available()) != "ok":
    pytest.skip(f"no device loop here: {reason}", allow_module_level=True)
pytestmark = pytest.mark.cuda

LIVE, WAITING = 40, 100


class Step:
    """A step of a few kernels: a vector moves, through memory of the capture's own pool, and the counters count."""

    def __init__(self) -> None:
        self.x = torch.empty(100_003, device="cuda")
        self.counters = torch.empty(8, dtype=torch.int64, device="cuda")
        self.live, self.next = self.counters[slots.LIVE], self.counters[slots.NEXT]
        self.reset()

    def reset(self) -> None:
        self.x.copy_(torch.linspace(-3, 3, len(self.x)))
        self.counters.copy_(torch.tensor([0, WAITING, LIVE, 0, 0, 0, 0, 0]))

    def __call__(self) -> None:
        moved = torch.sin(self.x) * 1.01
        self.x.add_(moved)
        self.live.sub_(1)
        self.next.add_(1)

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = capture(self)
        self.reset()
        return graph

    def loop(self) -> while_graph.WhileGraph:
        return while_graph.WhileGraph(self.capture(), self.counters)

    def state(self) -> tuple[Tensor, list[int]]:
        return self.x.clone(), self.counters.tolist()


def capture(step) -> torch.cuda.CUDAGraph:
    """Warmed up on the stream that captures; the caller restores what the warm-up moved."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def replayed(steps: int) -> tuple[Tensor, list[int]]:
    """State after that many replays by the host."""
    step = Step()
    graph = step.capture()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return step.state()


def assert_state(step: Step, steps: int) -> None:
    x, counters = step.state()
    expected_x, expected_counters = replayed(steps)
    assert counters == expected_counters
    assert torch.equal(x, expected_x)


@pytest.mark.parametrize(
    ("cap", "low", "steps"), [(1000, 0, LIVE), (1, 0, 1), (7, 0, 7), (1000, WAITING - 9, 10), (1000, WAITING + 1, 0)]
)
def test_the_loop_ends_where_it_should_and_equals_replays(cap, low, steps):
    step = Step()
    loop = step.loop()
    loop.launch(cap, low)
    assert loop.control[0].item() == steps
    assert_state(step, steps)


def test_cap_and_low_change_from_launch_to_launch():
    step = Step()
    loop = step.loop()
    done = []
    for cap, low in ((5, 0), (3, 0), (3, WAITING - 9), (100, 0), (100, 0)):
        loop.launch(cap, low)
        done.append(loop.control[0].clone())  # queued behind the launch, read at the end: nothing waits in between
    assert [int(d) for d in done] == [5, 3, 2, LIVE - 10, 0]
    assert_state(step, LIVE)


def test_a_launch_goes_to_the_current_stream():
    step = Step()
    loop = step.loop()
    loop.launch(1, WAITING + 1)  # no step, but all kernels are loaded: loading may wait for the GPU
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        loop.launch(1000)
    assert not stream.query()
    stream.synchronize()
    assert loop.control[0].item() == LIVE
    assert_state(step, LIVE)


def test_census_of_a_step_with_networks_holds_only_what_a_body_may():
    network = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(16, 32, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3), torch.nn.Flatten(),
        torch.nn.LazyLinear(1),
    ).cuda()  # fmt: skip
    x = torch.randn(8, 16, 8, 8, device="cuda")
    out = torch.empty(8, 1, device="cuda")
    counters = torch.tensor([0, 0, 2, 0, 0, 0, 0, 0], device="cuda")

    def step() -> None:
        out.copy_(network(x))
        counters[slots.LIVE].sub_(1)

    graph = capture(step)
    found = census(graph)
    assert found["kernel"] >= 4 and set(found) <= {"kernel", "memcpy", "memset", "empty", "child graph"}
    graph.replay()
    expected = out.clone()
    out.zero_()
    counters[slots.LIVE] = 2
    loop = while_graph.WhileGraph(graph, counters)
    loop.launch(10)
    assert loop.control[0].item() == 2
    torch.testing.assert_close(out, expected)  # not bit for bit: a convolution may add in any order


def test_a_step_with_an_event_is_refused():
    step = Step()
    event = torch.cuda.Event(external=True)

    def recorded() -> None:
        step()
        event.record()

    with pytest.raises(BackendError, match="may not: 1 x event record"):
        while_graph.WhileGraph(capture(recorded), step.counters)


def test_the_memory_of_the_capture_lives_until_close():
    step = Step()
    graph = step.capture()
    alive = weakref.ref(graph)
    loop = while_graph.WhileGraph(graph, step.counters)
    del graph
    gc.collect()
    torch.cuda.empty_cache()
    junk = [torch.full((100_003,), float("nan"), device="cuda") for _ in range(64)]
    loop.launch(1000)
    assert_state(step, LIVE)
    assert alive() is not None and all(bool(t.isnan().all()) for t in junk)  # and it wrote nowhere else
    loop.launch(1000)
    loop.close()
    gc.collect()
    assert alive() is None
