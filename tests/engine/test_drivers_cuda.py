"""The drivers on a GPU: the same bits from all three, captures that serve again, streams and devices respected."""

import pytest
import torch

import fastrefine as fr
from fastrefine.engine import drivers, while_graph
from fastrefine.engine.proposals import Proposals
from tests.support.driver_runs import RUNS, Marks
from tests.support.refiners import conditional, convolutional_pair, pair, refiner, same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DRIVERS = ("graph", "loop")


def on_gpu(networks=None, **options):
    g, d = networks or pair()
    return refiner((g.cuda(), d.cuda()), **options)


def available(driver):
    if driver == "loop" and while_graph.available() != "ok":
        pytest.skip(while_graph.available())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_drivers_give_the_bits_of_the_host_loop(driver, run):
    available(driver)
    options, call = RUNS[run]
    wanted = on_gpu(driver="host", **options).sample(**call)
    found = on_gpu(driver=driver, **options).sample(**call)
    same(found, wanted)
    assert found.report["driver"] == driver and found.report["backend"] == "triton"
    assert found.report["evaluations"] == wanted.report["evaluations"]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_convolutions_in_every_precision(driver, precision):
    available(driver)
    # cuDNN's default choice for an input gradient may add in any order
    options = dict(prior=fr.Normal(8), at="2", precision=precision, deterministic=True)
    networks = convolutional_pair()
    same(on_gpu(networks, driver=driver, **options).sample(60), on_gpu(networks, driver="host", **options).sample(60))


@pytest.mark.parametrize("driver", DRIVERS)
def test_labels_and_contexts_follow_their_samples(driver):
    available(driver)
    labels = torch.arange(40) % 3
    options = dict(sampler=fr.Collaborative(0.1, control="fixed"), stop=None, deterministic=True)
    found = conditional(driver=driver, device="cuda", **options).sample(40, labels=labels)
    same(found, conditional(driver="host", device="cuda", **options).sample(40, labels=labels))
    wanted = conditional(device="cpu", **options).sample(40, labels=labels)
    torch.testing.assert_close(found.images, wanted.images, rtol=1e-3, atol=1e-3)


def test_tf32_is_prepared_as_float32_is():
    prepared = set()
    for precision in ("float32", "tf32"):
        one = on_gpu(convolutional_pair(), prior=fr.Normal(8), at="2", precision=precision)
        one.sample(8)
        prepared.add((one._networks.target.folded, one._networks.target.route, one._networks.target.channels_last))
    assert len(prepared) == 1 and "flat" in prepared.pop()


@pytest.mark.parametrize("way", ["recorded", "refused", "broken"])
def test_constants_that_are_sent_to_the_device_leave_torch_in_order(way, monkeypatch):
    """Recorded, they are kept; else the step is refused, and where that sees nothing the capture breaks without harm."""
    g, d = pair()
    networks = g, Marks(d)

    def refuse(*given):
        raise RuntimeError("not today")

    if way != "recorded":
        monkeypatch.setattr("fastrefine.networks.recording.record", refuse)
    wanted = on_gpu(networks, driver="host").sample(20)
    if way == "broken":
        monkeypatch.setattr(drivers, "_depends_on_values", lambda *given: False)
    found = on_gpu(networks).sample(20)
    assert found.report["driver"] == ("graph" if way == "recorded" else "host")
    same(found, wanted)
    monkeypatch.undo()
    assert on_gpu().sample(20).report["driver"] == "graph"
    torch.cuda.empty_cache()
    assert bool(torch.rand(1, device="cuda").isfinite())


def test_auto_replays_a_graph():
    assert on_gpu().sample(10).report["driver"] == "graph"


@pytest.mark.parametrize("driver", ["host", *DRIVERS])
@pytest.mark.parametrize("networks", [pair, convolutional_pair])
def test_float64_equals_the_cpu(driver, networks):
    available(driver)
    options = dict(precision="float64", sampler=fr.Collaborative(0.01, control="fixed"))
    if networks is convolutional_pair:
        options |= dict(prior=fr.Normal(8), at="2")
    found = on_gpu(networks(), driver=driver, **options).sample(40)
    wanted = refiner(networks(), **options).sample(40)
    torch.testing.assert_close(found.images, wanted.images, rtol=0, atol=1e-8)
    assert torch.equal(found.steps, wanted.steps)


def test_latents_have_the_bits_of_the_cpu():
    assert torch.equal(on_gpu(stop=None, max_steps=0).sample(40).latents, refiner(stop=None, max_steps=0).sample(40).latents)


@pytest.mark.parametrize("driver", DRIVERS)
def test_another_step_size_and_seed_need_no_new_capture(driver):
    available(driver)
    one = on_gpu(driver=driver, sampler=fr.DGflow(0.1, gamma=0.1))
    one.sample(40)
    machine = one._idle.machine
    recorded = dict(machine.captured)
    other = on_gpu(driver="host", sampler=fr.DGflow(0.02, gamma=0.3))
    one._networks.bound = other.sampler, one._networks.bound[1]
    same(one.sample(40, seed=9), other.sample(40, seed=9))
    assert one._idle.machine is machine and machine.captured == recorded


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_updated_discriminator_needs_no_new_capture(driver):
    available(driver)
    g, d = pair()
    one = on_gpu((g, d), driver=driver)
    one.sample(40)
    machine = one._idle.machine
    updated = pair()[1].cuda()
    with torch.no_grad():
        for p in updated.parameters():
            p.mul_(1.3)
    one._networks.refresh(updated)
    same(one.sample(40), on_gpu((g, updated), driver="host").sample(40))
    assert one._idle.machine is machine


@pytest.mark.parametrize("driver", ["host", *DRIVERS])
def test_work_goes_to_the_stream_of_the_caller(driver):
    available(driver)
    wanted = on_gpu(driver="host").sample(100)
    one, stream = on_gpu(driver=driver), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        parts = one.stream(100, chunk=10)
        held = [next(parts)]
    held += list(parts)  # continued under another stream
    same(fr.Result.concatenate(held), wanted)
    with torch.cuda.stream(torch.cuda.Stream()):
        same(one.sample(100), wanted)


@pytest.mark.parametrize("driver", ["host", *DRIVERS])
def test_results_stay_on_the_gpu_where_that_is_asked_for(driver):
    available(driver)
    wanted = on_gpu(driver="host").sample(100)
    found = on_gpu(driver=driver, output_device="cuda").sample(100)
    assert found.images.is_cuda and found.status.is_cuda
    torch.cuda.synchronize()
    assert torch.equal(found.images.cpu(), wanted.images)


def test_results_for_the_host_are_in_ordinary_memory():
    out = on_gpu().sample(100)
    assert not out.images.is_cuda and not out.images.is_pinned()


def test_two_streams_of_parts_do_not_mix():
    one = on_gpu(driver="graph")
    wanted = one.sample(100)
    streams = [one.stream(100, chunk=10) for _ in range(2)]
    parts = [[next(s) for s in streams] for _ in range(10)]
    for column in zip(*parts, strict=True):
        same(fr.Result.concatenate(list(column)), wanted)


def test_the_callers_generator_and_modes_are_untouched():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    on_gpu(driver="graph").sample(20)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_host_seldom_waits(driver):
    available(driver)
    out = on_gpu(driver=driver, stop=None, max_steps=50, num_slots=64).sample(64 * 40)
    assert out.report["host_syncs_per_step"] <= 1 / 32
    assert out.report["slot_efficiency"] >= 0.98


@pytest.mark.slow
def test_compiled_and_captured():
    options = dict(stop=None, max_steps=3)
    found, wanted = on_gpu(compile=True, **options).sample(32), on_gpu(**options).sample(32)
    torch.testing.assert_close(found.images, wanted.images, rtol=1e-4, atol=1e-4)


def test_shaping_on_the_gpu_captures_once():
    g, d = convolutional_pair()
    one = on_gpu((g, d), prior=fr.Normal(8), at="2", stop=None, max_steps=2)
    real = torch.rand(64, 3, 32, 32, device="cuda") * 2 - 1
    shaped = fr.shape_discriminator(one, real, iterations=3, batch_size=16, learning_rate=1e-4)
    assert all(p.is_cuda and bool(p.isfinite().all()) for p in shaped.parameters())


def test_memory_is_given_back():
    """A run that is over keeps no more than its machine."""
    one = on_gpu(driver="graph")
    one.sample(200)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(3):
        one.sample(200, seed=seed)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_admitting_proposals_never_waits(monkeypatch):
    """Latents on the GPU are read without a look at the host, and those of the prior are sent to it."""
    one = on_gpu(driver="graph")
    latents = one.sample(200).latents.cuda()
    block = Proposals.block

    def strict(self, index):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return block(self, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Proposals, "block", strict)
    same(one.refine(latents), one.sample(200))
