"""Whole networks on a GPU: all drivers give the same bits, and a few steps lie near float64 on the CPU, in every precision."""

import functools

import pytest
import torch

import fastrefine as fr
from benchmarks.workloads import WORKLOADS
from fastrefine.engine import while_graph
from fastrefine.models import SNGANDiscriminator, SNGANGenerator

DEVICE = "cuda"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
N, SLOTS, STEPS, FEW, CLASSES = 60, 16, 10, 3, 4
# largest difference from float64 after FEW steps, as a part of the largest value
TOLERANCE = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 2e-1}


@functools.cache
def networks(model):
    """(generator, discriminator, shape of a latent, cut, labels or None)."""
    if model != "conditional sngan":  # per-sample context that depends on a label travels with the slots
        workload = WORKLOADS[model]
        return *workload.pair(), workload.latent, workload.cuts["first"], None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        g, d = SNGANGenerator(features=16, num_classes=CLASSES), SNGANDiscriminator(features=16, num_classes=CLASSES)
    return g.eval(), d.eval(), 128, "blocks.0", torch.arange(N) % CLASSES


def refine(model, device, precision, **options):
    """The same samples by any device and driver; deterministic, or cuDNN may add the terms of a gradient in any order."""
    generator, discriminator, latent, at, labels = networks(model)
    dtype = torch.float64 if precision == "float64" else torch.float32
    # modulated convolutions without training hardly slope
    sampler = fr.Collaborative(300.0 if model == "stylegan16" else 0.1, control="fixed")
    pair = [network.to(device, dtype) for network in (generator, discriminator)]
    refiner = fr.Refiner(*pair, sampler, at=at, num_slots=SLOTS, precision=precision, **options)
    return refiner.refine(fr.Normal(latent).sample(torch.arange(N), 0, dtype), labels=labels)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("model", ["mlp2d", "dcgan16", "conditional sngan"])
def test_all_drivers_give_the_same_bits_and_again_the_same(model, precision):
    run = functools.partial(refine, model, DEVICE, precision, deterministic=True)
    threshold = float(run(driver="host", max_steps=STEPS // 2).logits.median())  # half of them reach it in half of the steps
    drivers = ["graph", "graph", *["loop"] * (while_graph.available() == "ok")]
    for stop in (None, threshold):
        wanted = run(driver="host", stop=stop, max_steps=STEPS)
        assert stop is None or 0 < wanted.steps.double().mean() < STEPS
        for driver in drivers:
            found = run(driver=driver, stop=stop, max_steps=STEPS)
            for name in ("images", "logits", "steps"):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), (driver, stop, name)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("model", ["mlp2d", "dcgan16", "conditional sngan", "stylegan16"])
def test_a_few_steps_lie_near_float64_on_the_cpu(model, precision):
    with fr.use_backend("reference"):
        wanted = refine(model, "cpu", "float64", max_steps=FEW)
    found = refine(model, DEVICE, precision, max_steps=FEW)
    for name, least in (("images", 1e-6), ("logits", 1.0)):
        a, b = getattr(found, name).double().cpu(), getattr(wanted, name)
        assert float((a - b).abs().max()) <= TOLERANCE[precision] * max(float(b.abs().max()), least), name
