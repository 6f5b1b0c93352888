"""Every driver gives what the host loop gives, bit for bit; captures are few; the host seldom waits."""

import gc
import weakref

import pytest
import torch

import fastrefine as fr
from fastrefine import ops
from fastrefine.engine import drivers
from fastrefine.engine.machine import Machine
from fastrefine.engine.transfer import Transfer
from fastrefine.errors import BackendError
from tests.support.driver_runs import RUNS
from tests.support.refiners import conditional, convolutional_pair, greedy_slot_steps, pair, refiner, same
from tests.support.stand_in import KINDS, Runtime
from tests.support.step_machine import device_of

# Every run meets both drivers and both backends, which meet each other.
MET = [(run, driver, ("reference", "cpu")[(r + k) % 2]) for r, run in enumerate(RUNS) for k, driver in enumerate(KINDS)]


@pytest.mark.parametrize(("run", "driver", "backend"), MET)
def test_drivers_give_the_bits_of_the_host_loop(runtime, driver, backend, run):
    options, call = RUNS[run]
    device_of(backend)  # skips where it is absent
    one = refiner(**options)
    with fr.use_backend(backend):
        wanted = one.replaced(driver="host").sample(**call)
        found = one.replaced(driver=driver).sample(**call)
    same(found, wanted)
    assert found.report["driver"] == driver and found.report["evaluations"] == wanted.report["evaluations"]
    assert any(graph.replays for graph in runtime.graphs)


@pytest.mark.parametrize("driver", KINDS)
def test_convolutions_labels_and_contexts_too(runtime, driver):
    labels = torch.arange(20) % 3
    for one, given in (
        (conditional(), dict(labels=labels)),
        (refiner(convolutional_pair(), prior=fr.Normal(8), at="2"), {}),
    ):
        found, wanted = (one.replaced(driver=name).sample(20, **given) for name in (driver, "host"))
        same(found, wanted)
        assert found.report["driver"] == driver


@pytest.mark.parametrize("driver", KINDS)
def test_without_a_flat_step_plain_autograd_is_captured(runtime, driver, monkeypatch):

    def refuse(*args):
        raise RuntimeError("not today")

    monkeypatch.setattr("fastrefine.networks.recording.record", refuse)
    with fr.use_backend("reference"):
        wanted = refiner(driver="host", stop=None).sample(30)
        found = refiner(driver=driver, stop=None).sample(30)
    assert found.report["route"] == "autograd"
    same(found, wanted)


class Fragile(torch.nn.Module):
    """NaN for images whose first value is above ``limit``."""

    def __init__(self, d, limit):
        super().__init__()
        self.d, self.limit = d, limit

    def forward(self, x):
        return torch.where(x[:, :1] > self.limit, torch.nan, self.d(x))


@pytest.mark.parametrize("driver", KINDS)
def test_nonfinite_samples_leave_early_and_disturb_nobody(runtime, driver):
    """They break the common rhythm from which forward-only steps are predicted."""

    g, d = pair()
    with pytest.warns(fr.FastrefineWarning, match="non-finite"):
        wanted = refiner((g, Fragile(d, 0.2)), driver="host", stop=None).sample(200)
    with pytest.warns(fr.FastrefineWarning, match="non-finite"):
        found = refiner((g, Fragile(d, 0.2)), driver=driver, stop=None).sample(200)
    bad = (wanted.status == fr.Status.NONFINITE).double().mean()
    assert 0.01 < bad < 0.9
    for name in ("images", "logits"):
        a, b = (getattr(out, name).nan_to_num(7.0) for out in (found, wanted))
        assert torch.equal(a, b), name
    assert torch.equal(found.steps, wanted.steps) and torch.equal(found.status, wanted.status)


def test_last_evaluations_are_predicted_and_need_no_gradient(runtime):
    out = refiner(driver="graph", stop=None, max_steps=9).sample(8 * 40)
    step, forward = runtime.graphs
    assert forward.replays == 40 and step.replays == 40 * 9
    assert out.report["slot_efficiency"] == 1.0


@pytest.mark.parametrize("driver", KINDS)
@pytest.mark.parametrize("stop", [fr.stopping.UniformStep(), fr.stopping.Hazard(0.3), None], ids=repr)
def test_slots_stay_full_and_the_host_seldom_reads(runtime, driver, stop):
    out = refiner(driver=driver, stop=stop, max_steps=20, num_slots=16).sample(16 * 60)
    evaluations = (out.steps + 1).tolist()
    bound = sum(evaluations) / greedy_slot_steps(evaluations, 16)
    assert out.report["slot_efficiency"] >= 0.97 * bound
    assert out.report["host_syncs_per_step"] <= 1 / 16


def test_a_second_run_captures_nothing(runtime):
    one = refiner(driver="graph")
    first = one.sample(40)
    assert len(runtime.graphs) == 1
    same(one.sample(40), first)
    assert len(runtime.graphs) == 1
    same(one.sample(7, first_id=9), first.select(slice(9, 16)))
    assert len(runtime.graphs) == 1


def test_runs_that_overlap_have_machines_of_their_own(runtime):
    one = refiner(driver="graph")
    wanted = one.sample(100)
    streams = [one.stream(100, chunk=10) for _ in range(2)]
    parts = [[next(s) for s in streams] for _ in range(10)]
    for column in zip(*parts, strict=True):
        same(fr.Result.concatenate(list(column)), wanted)
    assert len(runtime.graphs) == 2


def test_a_stream_that_is_closed_leaves_a_machine_that_serves(runtime):
    one = refiner(driver="graph")
    wanted = one.sample(100)
    stream = one.stream(100, chunk=10)
    next(stream)
    stream.close()
    same(one.sample(100), wanted)
    assert len(runtime.graphs) == 1


def test_a_run_that_failed_leaves_no_machine_behind(runtime):
    one = refiner(driver="graph")
    one.sample(20)

    def fail(progress):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        one.replaced(callback=fail).sample(20)
    one.sample(20)
    assert len(runtime.graphs) == 2


def test_an_idle_machine_is_dropped_before_a_larger_one_is_made(runtime):
    one = refiner(driver="graph")
    one.sample(20)
    small = one._idle.machine
    one.sample(600)
    assert one._idle.machine not in (None, small)


def test_a_refiner_leaves_nothing_behind(runtime):
    """Its tensors are gone with the last reference, not with the next garbage collection."""
    one = refiner(driver="graph")
    one.sample(20)
    gone = weakref.ref(one._idle.machine)
    runtime.graphs.clear()  # their tapes know the machine, as a capture does not
    gc.collect()
    gc.disable()
    try:
        del one
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::fastrefine.FastrefineWarning")
def test_a_prediction_counts_what_forward_only_steps_in_flight_did_not_do(runtime, monkeypatch):
    """A full window, one step at a time, slots out of rhythm: once every step was forward only, and nobody ever moved."""
    monkeypatch.setattr("fastrefine.engine.pacing.WINDOW_SHARE", 2**40)
    monkeypatch.setattr("fastrefine.engine.pacing.POOL_SHARE", 2**21)
    monkeypatch.setattr("fastrefine.engine.pacing.FIRST_CHUNK", 1)
    monkeypatch.setattr(drivers.GraphReplay, "chunk", 5)
    original, launches = drivers.GraphReplay.launch, []

    def launch(self, machine, schedule, low):
        launches.append(schedule)
        assert len(launches) < 1000, "the run does not end"
        original(self, machine, schedule, low)

    monkeypatch.setattr(drivers.GraphReplay, "launch", launch)
    g, d = pair()
    options = dict(stop=None, max_steps=1)
    for limit in (-0.1, 0.0, 0.1):
        found, wanted = (
            refiner((g, Fragile(d, limit)), driver=name, **options).sample(200, first_id=1) for name in ("graph", "host")
        )
        assert torch.equal(found.steps, wanted.steps) and torch.equal(found.status, wanted.status)
        launches.clear()


class LateTransfer(Transfer):
    """Copies beside the work that follows may happen at any time until they are waited for."""

    def __init__(self, tensors, device, *side, copy=True):
        self.late = list(tensors) if side else [t.clone() for t in tensors]
        self.blocked = False

    ready = True

    def wait(self):
        return [t.clone() for t in self.late]


@pytest.mark.parametrize("driver", KINDS)
def test_results_on_their_way_are_not_overwritten(runtime, monkeypatch, driver):
    monkeypatch.setattr("fastrefine.engine.run.Transfer", LateTransfer)
    monkeypatch.setattr("fastrefine.engine.pacing.WINDOW_SHARE", 2**40)  # few rows, so that they serve again at once
    monkeypatch.setattr(drivers.GraphReplay, "chunk", 3)
    options = dict(stop=fr.stopping.Hazard(0.4), max_steps=5, num_slots=4)
    same(refiner(driver=driver, **options).sample(200), refiner(driver="host", **options).sample(200))


class Attends(torch.nn.Module):
    """Attention has a dropout, and with it the mark of an operation that draws; in eval mode it draws nothing."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x):
        tokens = x.view(len(x), 1, 3, 2)
        return self.d(torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).reshape(len(x), 6))


def test_attention_is_captured(runtime):
    g, d = pair()
    networks = g, Attends(d)
    same(refiner(networks, driver="graph").sample(20), refiner(networks, driver="host").sample(20))
    assert len(runtime.graphs) == 1


class Reads(torch.nn.Module):
    """A discriminator whose own autograd function reads a value on the host."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x):
        return self.d(x) * (1.0 if float(x.abs().max()) < 1e9 else 2.0)


def test_a_step_that_cannot_be_captured_is_refused_with_the_reason_or_launched_from_python(runtime, monkeypatch, caplog):
    g, d = pair()
    with pytest.raises(BackendError, match=r"driver='graph' cannot repeat this step: .*host.*use driver='host'"):
        refiner((g, Reads(d)), driver="graph").sample(10)
    monkeypatch.setitem(KINDS, "auto", drivers.GraphReplay)
    out = refiner((g, Reads(d)), driver="auto").sample(10)
    assert out.report["driver"] == "host"
    assert "launched from Python" in caplog.text
    same(out, refiner((g, Reads(d)), driver="host").sample(10))


def test_a_step_that_cannot_be_captured_is_tried_once(runtime, monkeypatch):
    monkeypatch.setitem(KINDS, "auto", drivers.GraphReplay)
    g, d = pair()
    one = refiner((g, Reads(d)), driver="auto")
    for _ in range(3):
        one.sample(10)
    assert runtime.attempts == 1


@pytest.mark.parametrize("driver", KINDS)
def test_without_a_gpu_the_device_drivers_say_so(driver):
    with pytest.raises(fr.InputError, match="needs a CUDA device"):
        refiner(driver=driver).sample(1)


@pytest.mark.parametrize("driver", KINDS)
def test_a_late_reading_never_takes_old_rows_for_new_ones(runtime, monkeypatch, driver):
    """A tiny window: rows are reused while readings that show their former samples complete are still unread, and a slow
    sample keeps all others waiting."""
    monkeypatch.setattr("fastrefine.engine.pacing.MEMORY", 1)
    monkeypatch.setattr(drivers.GraphReplay, "chunk", 3)

    class OneSlow(fr.stopping.Hazard):
        def draw(self, ids, seed, max_steps, labels=None):
            threshold, last = super().draw(ids, seed, max_steps, labels)
            return threshold, torch.where(ids == 5, max_steps, last)

    options = dict(stop=OneSlow(0.5), max_steps=60, num_slots=4)
    same(refiner(driver=driver, **options).sample(300), refiner(driver="host", **options).sample(300))


def test_compiled_steps_agree(runtime):
    """torch.compile rounds otherwise: a single step is compared."""
    pytest.importorskip("torch._inductor")
    options = dict(stop=None, max_steps=1)
    try:
        found = refiner(compile=True, driver="graph", **options).sample(16)
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip(f"no compiler for torch.compile: {error}")
        raise
    wanted = refiner(driver="host", **options).sample(16)
    torch.testing.assert_close(found.images, wanted.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("networks", ["layers", "convolutions"])
def test_the_networks_view_changes_no_bit(networks, precision):
    """Triton's step hands the networks their dtype and channel order; without it the step converts the activation."""
    if ops.available()["triton"] != "ok" or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    options = dict(num_slots=4, max_steps=3, precision=precision, sampler=fr.DGflow(0.05, gamma=0.1))
    if networks == "convolutions":
        options |= dict(networks=convolutional_pair(), prior=fr.Normal(8), at="2")
    outs = []
    for backend in ("triton", "reference"):
        with fr.use_backend(backend):
            outs.append(refiner(**options).sample(11))
    for name in ("images", "logits", "activations"):  # the interpreter's noise differs by ulps
        torch.testing.assert_close(getattr(outs[0], name), getattr(outs[1], name), rtol=2e-3, atol=2e-5)
    assert torch.equal(outs[0].steps, outs[1].steps)


def test_the_view_is_what_the_networks_read(monkeypatch):
    seen = {}
    original = Machine.__init__

    def spy(self, *args):
        original(self, *args)
        seen["view"] = self.slots.view, self.slots.view_channels

    monkeypatch.setattr(Machine, "__init__", spy)
    with fr.use_backend("triton"):
        refiner(convolutional_pair(), prior=fr.Normal(8), at="2", num_slots=4, max_steps=1, precision="bfloat16").sample(4)
    assert seen["view"][0].dtype == torch.bfloat16 and seen["view"][1] == 16 and seen["view"][0].any()


def test_the_stand_in_refuses_what_cuda_refuses():
    runtime = Runtime()
    x = torch.ones(3)
    for step in (lambda: float(x.sum()), lambda: x.nonzero(), lambda: torch.rand(3), lambda: x[x > 0], lambda: x.equal(x)):
        with pytest.raises(RuntimeError, match="reads values|draws from"):
            runtime.capture(step)
