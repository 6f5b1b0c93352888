"""The baselines compute what the engine computes, or their times could not be compared; and the bound is a bound."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastrefine as fr
from benchmarks.baselines import CompiledLoop, ExpertLoop, PeersLoop, bake, fold
from benchmarks.measure import greedy_bound
from benchmarks.workloads import WORKLOADS, halves
from fastrefine.models import (
    SAGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    dcgan_discriminator,
    dcgan_generator,
)

CUTS = {"input": "input", "first": "2", "middle": "5", "output": "output"}
STEP, K, N, SLOTS = 0.1, 4, 7, 3


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    g, d = dcgan_generator(16, 6, 4).double().train(), dcgan_discriminator(16, 4).double().train()
    for network in (g, d):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for _ in range(3):
            d(g(torch.randn(32, 6, dtype=torch.float64)))
    return g.eval(), d.eval()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def refine(pair, latents, at, stop=None, step=STEP):
    sampler = fr.Collaborative(step, control="fixed")
    refiner = fr.Refiner(*pair, sampler, at=at, max_steps=K, stop=stop, num_slots=SLOTS, precision="float64")
    return refiner.refine(latents)


def assert_same(found, wanted):
    torch.testing.assert_close(found.images, wanted.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-8)
    assert torch.equal(found.steps.long(), wanted.steps.long())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", [PeersLoop, ExpertLoop])
def test_baseline_equals_the_engine_at_every_cut(pair, latents, cut, kind):
    wanted = refine(pair, latents, CUTS[cut])
    assert_same(kind(*pair, CUTS[cut], STEP, K, batch=3)(latents), wanted)
    assert (wanted.logits - wanted.initial_logits).abs().max() > 1e-2  # something was refined


def test_expert_stops_each_sample_where_the_engine_does(pair, latents):
    expert = ExpertLoop(*pair, CUTS["first"], STEP, K, batch=3)
    rule = fr.stopping.UniformStep()
    assert_same(expert(latents, last_step=rule.draw(torch.arange(N), 0, K)[1]), refine(pair, latents, CUTS["first"], rule))
    plain = refine(pair, latents, CUTS["first"])
    threshold = float(torch.cat([plain.initial_logits, plain.logits]).quantile(0.5))  # between two of them: no ties
    stopped = refine(pair, latents, CUTS["first"], threshold)
    assert 0 < stopped.steps.sum() < N * K
    assert_same(expert(latents, threshold=threshold), stopped)


def test_compiled_loop_equals_the_expert_whose_results_it_may_not_overwrite():
    generator, discriminator = WORKLOADS["mlp2d"].pair()
    given = (generator, discriminator, WORKLOADS["mlp2d"].cuts["first"], STEP, K, 4)
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    # eager: what is tested are its form of the gradient and its copies; reduce-overhead itself needs a GPU
    compiled = CompiledLoop(*given)
    with torch.compiler.set_stance("force_eager"):
        found = compiled(z)
        threshold = float(found.logits.median())
        stopped = compiled(z, threshold=threshold)
    assert_same(found, ExpertLoop(*given)(z))
    assert_same(stopped, ExpertLoop(*given)(z, threshold=threshold))
    assert 0 < stopped.steps.sum() < len(z) * K


def test_bake_keeps_the_function_and_the_original():
    discriminator = SNGANDiscriminator(features=4).eval()
    baked, x = bake(copy.deepcopy(discriminator)), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(baked(x), discriminator(x), rtol=0, atol=0)
    assert not any(parametrize.is_parametrized(m) for m in baked.modules())
    assert any(parametrize.is_parametrized(m) for m in discriminator.modules())


def test_baselines_leave_the_pair_as_it_was(pair, latents):
    before = {k: v.clone() for m in pair for k, v in m.state_dict().items()}
    ExpertLoop(*pair, CUTS["first"], STEP, 1, batch=3)(latents)
    assert all(torch.equal(v, before[k]) for m in pair[1:] for k, v in m.state_dict().items())
    assert all(p.requires_grad for m in pair for p in m.parameters())


@pytest.mark.parametrize("at", ["layers.1", "layers.3"])
@pytest.mark.parametrize("kind", [PeersLoop, ExpertLoop])
def test_baseline_carries_what_modulated_convolutions_need(kind, at):
    torch.manual_seed(0)
    pair = StyleGAN2Generator(16, 6, 8, 4, 8, 2).double().eval(), StyleGAN2Discriminator(16, 4, 8, 0).double().eval()
    z = torch.randn(N, 6, dtype=torch.float64)
    wanted = refine(pair, z, at, step=1e3)  # an untrained discriminator hardly slopes
    assert_same(kind(*pair, at, 1e3, K, batch=3)(z), wanted)
    assert (wanted.logits - wanted.initial_logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dcgan16", "mlp2d", "stylegan16"])
def test_halves_make_a_whole(name):
    generator, _ = WORKLOADS[name].pair()
    z = torch.randn(3, WORKLOADS[name].latent)
    for at in WORKLOADS[name].cuts.values():
        prefix, tail = halves(generator, at)
        a = prefix(z)
        torch.testing.assert_close(tail(*a) if isinstance(a, tuple) else tail(a), generator(z), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sngan32", "sagan128"])
def test_halves_of_a_residual_generator_make_a_whole(name):
    small = {"sngan32": lambda: SNGANGenerator(features=4), "sagan128": lambda: SAGANGenerator(32, 128, 2, 0)}
    generator = small[name]().eval()
    z = torch.randn(3, 128)
    for at in WORKLOADS[name].cuts.values():
        prefix, tail = halves(generator, at)
        torch.testing.assert_close(tail(prefix(z)), generator(z), rtol=0, atol=0)


def test_fold_keeps_the_function():
    generator, discriminator = WORKLOADS["dcgan16"].pair(torch.float64)
    z = torch.randn(2, 32, dtype=torch.float64)
    images = generator(z)
    logits = discriminator(images)
    folded = fold(generator), fold(discriminator)
    assert not any(isinstance(m, nn.BatchNorm2d) for f in folded for m in f.modules())
    torch.testing.assert_close(folded[0](z), images)
    torch.testing.assert_close(folded[1](images), logits)


def test_greedy_bound_of_a_schedule_worked_by_hand():
    # two slots, evaluations 3 1 2 1: the first slot takes 3, the second 1 then 2, whoever is free at time 3 the last 1
    assert greedy_bound(torch.tensor([2, 0, 1, 0]), 2) == 7 / (2 * 4)
    assert greedy_bound(torch.tensor([4, 4]), 2) == 1
    assert greedy_bound(torch.tensor([0]), 4) == 1 / 4


def test_engine_reaches_the_greedy_bound(pair, latents):
    result = refine(pair, latents, CUTS["output"], fr.stopping.UniformStep())
    assert result.report["slot_efficiency"] == pytest.approx(greedy_bound(result.steps, SLOTS))
