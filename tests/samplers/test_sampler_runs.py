"""What every sampler promises of its runs: slots and order change nothing, snapshots, numbers in results, contained faults."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastrefine as fr
from tests.support.closed_forms import BACKENDS, serving
from tests.support.fault_networks import LATENT, discriminator, generator, told

STEPS = 8
SAMPLERS = {
    "collaborative": fr.Collaborative(0.1),
    "ddls": fr.DDLS((0.1, 0.05), (1.0, 0.5)),
    "mala": fr.MALA(0.5, adapt=4),
    "hmc": fr.HMC(0.5, 2, adapt=4, jitter=0.5),
    "dgflow": fr.DGflow(0.05, "JS"),
    "dot": fr.DOT(0.02),
    "dot, sgd": fr.DOT(0.02, "sgd"),
}
METROPOLIS = ("mala", "hmc")
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(name, g=None, d=None, **options):
    sampler = SAMPLERS[name] if isinstance(name, str) else name
    options = {"prior": fr.Normal(LATENT), "max_steps": STEPS, "num_slots": 4, "precision": "float64"} | options
    return fr.Refiner(generator() if g is None else g, d or discriminator(), sampler, **options)


@functools.cache
def prepared(name, **options):
    """As ``make``, one for all tests that ask for the same: the networks are prepared once."""
    return make(name, **options)


def numbers(result):
    """Everything that is returned of the samples."""
    return result.tensors()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


@every_backend
@every_sampler
def test_the_number_of_slots_changes_nothing(name, backend):
    with serving(backend):
        wanted = prepared(name, num_slots=7).sample(20, seed=3)
        for slots in (1, 64):
            found = prepared(name, num_slots=slots).sample(20, seed=3)
            for ours, theirs in zip(numbers(found), numbers(wanted), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@every_backend
@every_sampler
def test_first_id_and_chunks_change_no_bit(name, backend):
    with serving(backend):
        refiner = prepared(name, precision="float32")
        whole = refiner.sample(23, seed=3, snapshots=(2, 4))
        assert equal(refiner.sample(9, first_id=6, seed=3, snapshots=(2, 4)), whole.select(slice(6, 15)))
        parts = list(refiner.stream(23, seed=3, chunk=5, snapshots=(2, 4)))
        assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
        assert equal(fr.Result.concatenate(parts), whole)
        assert not equal(refiner.sample(23, seed=4, snapshots=(2, 4)), whole)


@every_sampler
def test_neighbours_change_no_bit(name):
    z = fr.Normal(LATENT).sample(torch.arange(9), 5)
    other = z.clone()
    other[:8] *= -1.5
    with serving("reference"):
        refiner = prepared(name, precision="float32")
        assert equal(refiner.refine(z, seed=2).select(slice(8, 9)), refiner.refine(other, seed=2).select(slice(8, 9)))


WAYS = {
    "plain": {},
    "stop": {"stop": 0.1},
    "best": {"keep": "best"},
    "stop, best": {"stop": fr.stopping.UniformStep(), "keep": "best"},
    "lock step": {"coupling": "lockstep"},
}


@pytest.mark.parametrize(("way", "backend"), [("plain", "cpu"), *((way, "reference") for way in WAYS)])
@every_sampler
@pytest.mark.filterwarnings("ignore::fastrefine.FastrefineWarning")
def test_snapshots_are_runs_of_fewer_steps(name, way, backend):
    times = (0, 2, 6, STEPS)
    stop = fr.stopping.Hazard(0.2) if way == "stop, best" else WAYS[way].get("stop")  # a last step that knows no max_steps
    options = WAYS[way] | ({"stop": stop} if stop is not None else {})
    with serving(backend):
        refiner = prepared(name).replaced(**options) if way in ("plain", "best") else make(name, **options)
        long = refiner.sample(10, seed=3, snapshots=times)
        for step in times:
            short, seen = refiner.replaced(max_steps=step).sample(10, seed=3), long.snapshots[step]
            assert torch.equal(seen.activations, short.activations) and torch.equal(seen.images, short.images)
            assert torch.equal(seen.logits, short.logits)
    assert not torch.equal(long.snapshots[0].activations, long.snapshots[STEPS].activations)


@every_backend
@pytest.mark.parametrize("sampler", [fr.MALA(1.5), fr.HMC(1.2, 2), fr.HMC(1.2, 4, logit_scale=2.0)], ids=repr)
def test_acceptance_is_the_counted_share_of_moves(sampler, backend):
    unit = sampler.traits.transition_steps
    times = range(0, 12 * unit + 1, unit)
    with serving(backend):
        out = prepared(sampler, max_steps=times[-1]).sample(30, snapshots=times)
    states = torch.stack([out.snapshots[step].activations for step in times])
    share = (states[1:] != states[:-1]).any(2).double().mean(0)
    torch.testing.assert_close(out.acceptance, share, rtol=0, atol=1e-12)
    assert 0.1 < share.mean() < 0.95
    assert (out.step_sizes == sampler.step_size).all()


@pytest.mark.parametrize("sampler", [fr.MALA(0.5), fr.HMC(0.5, 2)], ids=repr)
def test_acceptance_without_a_test_is_unknown(sampler):
    with serving("reference"):
        out = make(sampler, max_steps=0).sample(3)
    assert out.acceptance.isnan().all() and (out.steps == 0).all()


@every_sampler
def test_numbers_of_a_sampler_survive_select_concatenate_stream_and_no_samples(name):
    with serving("reference"):
        refiner = prepared(name)
        out = refiner.sample(6, snapshots=(2,))
        none = refiner.sample(0, snapshots=(2,))
        parts = list(refiner.stream(6, chunk=4, snapshots=(2,)))
    assert (out.acceptance is not None) == (name in METROPOLIS)
    assert (out.step_sizes is not None) == (name in (*METROPOLIS, "collaborative"))
    picked = out.select(torch.tensor([4, 1]))
    for field in ("acceptance", "step_sizes"):
        value = getattr(out, field)
        if value is None:
            assert getattr(picked, field) is None and getattr(none, field) is None
            continue
        assert value.shape == (6,) and torch.equal(getattr(picked, field), value[[4, 1]])
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), value)
        assert getattr(none, field).shape == (0,)
    assert torch.equal(picked.snapshots[2].images, out.snapshots[2].images[[4, 1]])
    assert len(none) == 0 and none.snapshots[2].activations.shape == (0, LATENT)
    joined = fr.Result.concatenate([none, out])
    assert len(joined) == 6 and torch.equal(joined.snapshots[2].logits, out.snapshots[2].logits)


@every_sampler
def test_reduced_precision_runs_and_keeps_its_state_in_float32(name):
    with serving("reference"):
        out = make(name, precision="bfloat16").sample(10)
        exact = prepared(name, precision="float32").sample(10)
    assert out.latents.dtype is torch.float32 and all(t.isfinite().all() for t in (out.images, out.latents, out.logits))
    assert (out.latents != out.latents.bfloat16()).any()
    assert (out.status == fr.Status.EXHAUSTED).all()
    assert (out.latents - exact.latents).abs().median() < 0.1


# Faults. Class 1 meets them, class 0 is the neighbour.

WALL = 0.15


class Faulty(nn.Module):
    """D(x, y), not finite for class 1 where x[0] is beyond the wall."""

    def __init__(self, kind):
        super().__init__()
        self.module, self.kind = discriminator(), kind

    def forward(self, x, y):
        logit, beyond = self.module(x), ((x[:, 0] > WALL) & (y == 1))[:, None]
        if self.kind == "clean":
            return logit
        if self.kind == "nan gradient":
            depth = (~beyond).to(x.dtype) * (1.0 + x[:, :1] ** 2)  # sqrt has no derivative at 0
            return logit + 0 * torch.sqrt(depth)
        return torch.where(beyond, float(self.kind), logit)


@functools.cache
def faulty(name, kind):
    sampler = replace(SAMPLERS[name], lipschitz=1.0) if name == "dot" else SAMPLERS[name]
    return make(sampler, d=Faulty(kind))


@functools.cache
def faulty_run(name, kind, backend):
    with serving(backend):
        return faulty(name, kind).sample(40, labels=torch.arange(40) % 2)


@every_backend
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "nan gradient"])
@pytest.mark.parametrize("name", ["ddls", "mala", "hmc", "dot"])
@pytest.mark.filterwarnings("ignore::fastrefine.FastrefineWarning")
def test_values_that_are_not_finite_are_contained(name, kind, backend):
    labels, clean, found = torch.arange(40) % 2, faulty_run(name, "clean", backend), faulty_run(name, kind, backend)
    assert equal(clean.select(labels == 0), found.select(labels == 0))
    met = found.select(labels == 1)
    started = generator()(fr.Normal(LATENT).sample(met.ids, 0)).detach()[:, 0] <= WALL
    assert 5 < started.sum() < 20, "some start beyond the wall, some do not"
    assert met.latents.isfinite().all() and met.images.isfinite().all()
    assert (met.status[~started] == fr.Status.NONFINITE).all() and (met.steps[~started] == 0).all()
    inner = met.select(started)
    assert inner.logits.isfinite().all()
    if name in METROPOLIS:  # a trial beyond the wall is rejected
        assert (inner.images[:, 0] <= WALL).all() and (inner.status == fr.Status.EXHAUSTED).all()
        assert not torch.equal(inner.latents, clean.select(labels == 1).select(started).latents)
    else:  # the sample ends at its last finite state
        hit = inner.status == fr.Status.NONFINITE
        assert (inner.steps[~hit] == STEPS).all() and (inner.steps[hit] > 0).all()


# Labels


class Conditional(nn.Module):
    """A module with a label."""

    def __init__(self, module, shift):
        super().__init__()
        self.module, self.shift = module, shift

    def forward(self, x, y):
        return self.module(x + self.shift * (1.0 + y.to(x.dtype))[:, None])


class Fixed(nn.Module):
    """A module of one label."""

    def __init__(self, module, label):
        super().__init__()
        self.module, self.label = module, label

    def forward(self, x):
        return self.module(x, torch.full((len(x),), self.label))


@every_sampler
def test_labels_travel_with_their_samples(name):
    g, d = Conditional(generator(), 0.4), Conditional(discriminator(), 0.7)
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1])
    sampler = replace(SAMPLERS[name], lipschitz=1.0) if name.startswith("dot") else SAMPLERS[name]
    with serving("reference"):
        found = make(sampler, g, d).sample(9, labels=labels)
        for label in (0, 2):
            alone = make(sampler, Fixed(g, label), Fixed(d, label)).sample(9)
            rows = labels == label
            torch.testing.assert_close(found.images[rows], alone.images[rows], rtol=0, atol=1e-10)
            torch.testing.assert_close(found.logits[rows], alone.logits[rows], rtol=0, atol=1e-10)
            assert not torch.allclose(found.images[~rows], alone.images[~rows])


# Exactness


@pytest.mark.parametrize("options", [{"stop": 0.0}, {"stop": fr.stopping.UniformStep()}, {"keep": "best"}], ids=str)
@every_sampler
def test_what_breaks_the_law_of_a_chain_is_told(name, options):
    with told() as texts:
        make(name, **options)
    exact = name in ("ddls", *METROPOLIS)
    assert any("not exact" in text for text in texts) == exact
    with told() as texts:
        make(name)
    assert not texts


@every_sampler
def test_networks_and_latents_of_the_caller_stay_as_they_were(name):
    g, d, z = generator(), discriminator(), fr.Normal(LATENT).sample(torch.arange(6), 0)
    before = [t.clone() for t in (*g.state_dict().values(), *d.state_dict().values(), z)]
    with serving("reference"):
        make(name, g, d).refine(z)
    assert all(torch.equal(a, b) for a, b in zip(before, (*g.state_dict().values(), *d.state_dict().values(), z), strict=True))
    assert all(p.grad is None for p in (*g.parameters(), *d.parameters()))


@pytest.mark.parametrize("prior", [fr.Uniform(LATENT), fr.TruncatedNormal(LATENT, bound=0.8)], ids=repr)
@pytest.mark.parametrize("sampler", [fr.DDLS(2.0), fr.MALA(0.5), fr.HMC(1.0, 2), fr.DOT(0.5, lipschitz=0.1)], ids=repr)
def test_a_bounded_prior_bounds_every_step(sampler, prior):
    _, low, high = prior.table()[:, 0].tolist()
    with serving("reference"):
        out = make(sampler, prior=prior).sample(40, snapshots=range(0, STEPS + 1, 2))
    for snapshot in out.snapshots.values():
        assert snapshot.activations.min() >= low and snapshot.activations.max() <= high
    assert not torch.equal(out.snapshots[0].activations, out.latents) and math.isfinite(float(out.logits.sum()))
