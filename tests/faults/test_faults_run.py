"""FAULTS 18, 22, 28 and 29: how many samples, with how much memory, by which backend, of which layout and size."""

import logging

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine import ops
from fastrefine.networks.target import Target
from fastrefine.ops import registry, slots
from fastrefine.samplers import Evaluation
from tests.support.fault_networks import (
    FIELDS,
    IMAGE,
    LATENT,
    Calls,
    Returning,
    discriminator,
    generator,
    refiner,
    same,
    same_result,
    seeded,
)

S = 4


def conv_pair():
    with seeded(12):
        g = nn.Sequential(
            nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        nn.init.normal_(g[2].running_mean, 0, 0.1), g[2].running_var.fill_(0.1)
        d = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 1, 4), nn.Flatten(0))
    return g.eval(), d


@pytest.mark.parametrize("at", ["input", "2", "3", "output"])
def test_no_steps_give_the_generators_own_images_bit_for_bit(at):
    """FAULTS 18: G(z) applied in blocks of num_slots ids."""
    g, d = conv_pair()
    r = refiner(g, d, at=at, max_steps=0)
    for n in (1, 3, 4, 7, 13):
        out = r.sample(n, first_id=2)
        ids = torch.arange(0, (2 + n + S - 1) // S * S)
        with torch.no_grad():
            blocks = [g(fr.Normal(LATENT).sample(block, 0)) for block in ids.split(S)]
        assert len(out) == n and torch.equal(out.images, torch.cat(blocks)[2 : 2 + n])
        assert torch.equal(out.latents, fr.Normal(LATENT).sample(out.ids, 0)) and (out.steps == 0).all()
        assert torch.equal(out.logits, out.initial_logits) and (out.status == fr.Status.EXHAUSTED).all()


def test_no_steps_leave_given_images_bit_for_bit():
    """FAULTS 18"""
    x = torch.randn(7, IMAGE)
    out = fr.Refiner(None, discriminator(), fr.Collaborative(0.1), at="output", max_steps=0, num_slots=S).refine(x)
    assert torch.equal(out.images, x)


@pytest.mark.parametrize("at", ["input", "2", "output"])
def test_no_samples_give_an_empty_result_of_the_right_shapes(at):
    """FAULTS 18"""
    g, d = conv_pair()
    r = refiner(g, d, at=at)
    one = r.sample(1)
    for none in (r.sample(0), r.refine(torch.zeros(0, LATENT)), *r.stream(0)):
        assert len(none) == 0
        for name in FIELDS:
            empty, filled = getattr(none, name), getattr(one, name)
            assert empty.shape == (0, *filled.shape[1:]) and empty.dtype == filled.dtype, name
        assert none.report.keys() <= one.report.keys() and none.scale == one.scale
    assert r.score(torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_no_samples_with_labels():
    """FAULTS 18"""
    g, d = conv_pair()

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.embed = g, nn.Embedding(3, LATENT)

        def forward(self, z, y):
            return self.g(z + self.embed(y))

    r = refiner(Labelled(), d)
    assert len(r.sample(0, labels=[])) == 0 and len(r.sample(0, labels=1)) == 0 and len(r.sample(2, labels=[2, 0])) == 2


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_exactly_n_samples_come_in_order_for_any_number_of_slots(slots):
    """FAULTS 18"""
    r = refiner(num_slots=slots, stop=0.0)
    for n in (1, 2, 5, 11):
        whole = r.sample(n, first_id=3)
        assert len(whole) == n and torch.equal(whole.ids, torch.arange(3, 3 + n)) and (whole.status >= 0).all()
        for chunk in (1, 2, 7, 100):
            parts = list(r.stream(n, first_id=3, chunk=chunk))
            assert [len(part) for part in parts] == [min(chunk, n - k) for k in range(0, n, chunk)]
            assert same_result(fr.Result.concatenate(parts), whole)
        assert torch.equal(r.refine(whole.latents, first_id=3).ids, whole.ids)


@pytest.fixture
def memory(monkeypatch):
    """Evaluations of more than ``limit`` slots are out of memory, from the ``after``-th evaluation on."""
    state = {"limit": 10**9, "after": 0, "calls": 0}
    evaluate = Target.evaluate

    def limited(self, a, context, view=None):
        state["calls"] += 1
        if len(a) > state["limit"] and state["calls"] > state["after"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(self, a, context, view)

    monkeypatch.setattr(Target, "evaluate", limited)
    return state


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize(("limit", "used", "times"), [(4, 4, 1), (3, 2, 2)])
def test_out_of_memory_goes_on_with_fewer_slots(memory, caplog, limit, used, times, after):
    """FAULTS 22"""
    memory |= {"limit": limit, "after": after}
    r = refiner(num_slots=8)
    with caplog.at_level(logging.INFO, "fastrefine"):
        out = r.sample(21)
    records = [record for record in caplog.records if "out of memory" in record.getMessage()]
    said = [record.getMessage() for record in records]
    assert [record.levelno for record in records].count(logging.WARNING) == 1, "a warning once"
    assert len(said) == times and f"going on with {used} slots" in said[-1] and "changes the bits" in said[-1]
    assert out.report["num_slots"] == used and r.num_slots == 8
    assert len(out) == 21 and torch.equal(out.ids, torch.arange(21)) and (out.status >= 0).all()
    memory["limit"] = 10**9
    assert torch.allclose(out.images, r.sample(21).images, atol=1e-5), "the same samples, but for rounding"
    assert r.sample(2).report["num_slots"] == 8


def test_out_of_memory_in_a_network_is_the_same(caplog):
    """FAULTS 22: an exception of the network itself, while blocks are rendered."""

    class Large(nn.Module):
        def forward(self, x):
            if len(x) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    g = generator().append(Large())
    with caplog.at_level(logging.WARNING, "fastrefine"):
        out = refiner(g, num_slots=8).sample(11)
    assert len(out) == 11 and out.report["num_slots"] == 4 and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": True}, r"out of memory with 8 slots; pass a smaller num_slots \(deterministic=True never"),
        ({"coupling": "lockstep"}, r"out of memory with 8 slots; pass a smaller num_slots \(coupling='lockstep' never"),
    ],
)
def test_where_the_number_of_slots_decides_the_result_out_of_memory_is_an_error_with_advice(memory, options, message):
    """FAULTS 22"""
    memory["limit"] = 4
    with pytest.raises(fr.FastrefineError, match=message):
        refiner(num_slots=8, **options).sample(21)


def test_out_of_memory_with_one_slot_ends(memory):
    """FAULTS 22"""
    memory["limit"] = 0
    with pytest.raises(fr.FastrefineError, match="out of memory with 1 slots"):
        refiner(num_slots=2).sample(3)


def loads(monkeypatch, answer):
    def load(backend):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(registry, "_load", load)


@pytest.mark.parametrize("sampler", [fr.Collaborative(0.1), fr.Collaborative(0.1, optimizer="adam"), fr.DGflow(0.1)])
def test_without_triton_and_extension_the_reference_gives_the_same(monkeypatch, sampler):
    """FAULTS 28"""
    usual = refiner(sampler=sampler, precision="float64").sample(9)
    loads(monkeypatch, "fastrefine._native is not built")
    out = refiner(sampler=sampler, precision="float64").sample(9)
    assert out.report["backend"] == "reference"
    assert torch.allclose(out.images, usual.images, atol=1e-9) and torch.equal(out.steps, usual.steps)
    states = registry.available()
    assert states.pop("reference") == "ok" and set(states.values()) == {"fastrefine._native is not built"}


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch, backend):
    """FAULTS 28"""
    loads(monkeypatch, "it is not installed")
    message = f"backend '{backend}' is not available: it is not installed"
    with pytest.raises(fr.BackendError, match=message), fr.use_backend(backend):
        pass
    monkeypatch.setenv("FASTREFINE_BACKEND", backend)
    with pytest.raises(fr.BackendError, match="not available"):
        refiner().sample(2)


def test_an_extension_that_fails_to_load_is_an_error_with_its_cause(monkeypatch):
    """FAULTS 28"""
    loads(monkeypatch, fr.BackendError("fastrefine._native exists but does not load: undefined symbol"))
    with pytest.raises(fr.BackendError, match="exists but does not load: undefined symbol"):
        refiner().sample(2)
    assert "undefined symbol" in registry.available()["cpu"]
    with fr.use_backend("reference"):
        assert len(refiner().sample(2)) == 2


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "reversed twice": lambda x: x.flip(0).contiguous().flip(0),
    "sliced": lambda x: torch.cat([x, x, x])[len(x) : 2 * len(x)],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("slots", [3, 8])
def test_images_of_any_memory_layout_are_refined_alike(slots):
    """FAULTS 29"""
    _, d = conv_pair()
    x = torch.linspace(-1, 1, 7 * 192).sin().view(7, 3, 8, 8)
    r = fr.Refiner(None, d, fr.Collaborative(0.5), at="output", max_steps=3, num_slots=slots)
    expected, logits = r.refine(x), r.score(x)
    for layout, change in LAYOUTS.items():
        given = change(x)
        out = r.refine(given)
        assert torch.equal(given, x) and same_result(out, expected) and same(r.score(given), logits), layout
        assert out.images.is_contiguous()


@pytest.mark.parametrize("at", ["input", "2"])
def test_expanded_latents_and_labels_are_refined_like_copies(at):
    """FAULTS 29"""
    g, d = conv_pair()
    z = torch.linspace(-1, 1, LATENT).expand(7, LATENT)
    r = refiner(g, d, at=at)
    out = r.refine(z)
    assert same_result(out, r.refine(z.clone())) and torch.equal(z, torch.linspace(-1, 1, LATENT).expand(7, LATENT))
    assert torch.allclose(out.images, out.images[:1].expand_as(out.images), atol=1e-6)


class Fold(nn.Module):
    """(N, 24) -> (N, *shape), by a view that is not contiguous."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        x = x.reshape(len(x), *self.shape)
        return x.transpose(1, -1) if len(self.shape) > 1 else x


@pytest.mark.parametrize(
    ("shape", "precision"),
    [
        ((24,), "float32"), ((4, 6), "float32"), ((2, 3, 4), "float32"), ((2, 3, 2, 2), "float32"),
        ((2, 3, 2, 1, 2), "float32"), ((2, 3, 4), "bfloat16"),
    ],
)  # fmt: skip
def test_activations_of_one_to_five_dimensions(shape, precision):
    """FAULTS 29"""
    with seeded(13):
        g = nn.Sequential(nn.Linear(LATENT, 24), Fold(shape), nn.Tanh(), nn.Flatten(), nn.Linear(24, IMAGE))
    options = {"precision": precision, "sampler": fr.Collaborative(0.5)}
    out = refiner(g, at="1", **options).sample(7)
    turned = shape if len(shape) == 1 else (shape[-1], *shape[1:-1], shape[0])
    assert out.activations.shape == (7, *turned) and (out.logits > out.initial_logits).all()
    flat = nn.Sequential(*g[:2], nn.Flatten(1), nn.Unflatten(1, turned), *g[2:])
    assert torch.allclose(refiner(flat, at="2", **options).sample(7).images, out.images)


def test_latents_without_any_dimension_of_their_own():
    """FAULTS 29: one number for each sample."""

    class Curve(nn.Module):
        def forward(self, t):
            return torch.stack([t, t.sin(), t.cos()], 1)

    t = torch.linspace(-1, 1, 7)
    out = refiner(Curve(), sampler=fr.Collaborative(0.3)).refine(t)
    assert out.activations.shape == out.latents.shape == (7,) and (out.logits > out.initial_logits).all()
    assert same_result(out.select(slice(0, 7)), refiner(Curve(), sampler=fr.Collaborative(0.3)).refine(t.clone()))


def test_networks_may_return_views_that_are_not_contiguous():
    """FAULTS 29"""
    sideways = Returning(lambda out: torch.stack([out, -out], -1)[..., 0])
    with seeded(14):
        inner = nn.Linear(LATENT, 2 * IMAGE)

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            return self.inner(z)[:, ::2]

    half = nn.Linear(LATENT, IMAGE)
    half.weight.data, half.bias.data = inner.weight.data[::2].clone(), inner.bias.data[::2].clone()
    out = refiner(Sliced(), sideways).sample(7)
    assert torch.allclose(out.images, refiner(half).sample(7).images, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_rows_beyond_two_to_the_31_elements_are_addressed(backend):
    """FAULTS 29: one proposal through pool and output windows whose last rows lie there (memory is only reserved)."""
    if registry.available()[backend] != "ok":
        pytest.skip(f"{backend}: {registry.available()[backend]}")
    features, rows, dtype = 2**16, 2**15 + 2, torch.float32
    rule = slots.Rule(fr.Collaborative(0.1, control="fixed"), seed=0)
    own = slots.allocate(2, features, 2, 2, rule, dtype, torch.device("cpu"))[0]
    pool, outputs = slots.allocate(2, 1, rows, rows, rule, dtype, torch.device("cpu"))[1:]
    try:
        pool.activation = torch.empty(rows, features)
        outputs.activation = torch.empty(rows + 1, features)
    except RuntimeError:
        pytest.skip("this machine does not reserve 17 GB of address space")
    ids = torch.tensor([rows - 2, rows - 1])
    assert int(ids[0]) * features >= 2**31
    proposals = torch.arange(2.0 * features).view(2, features)
    pool.activation[ids] = proposals
    pool.threshold[ids] = torch.inf
    pool.counters[slots.NEXT], pool.counters[slots.END] = int(ids[0]), int(ids[1]) + 1
    ops.refine_step(own, None, pool, outputs, rule, backend=backend)
    assert torch.equal(own.activation, proposals) and torch.equal(own.sample_id, ids) and torch.equal(own.source, ids)
    last = Evaluation(torch.ones(2), torch.zeros(2), None)
    ops.refine_step(own, last, pool, outputs, rule, backend=backend)
    assert torch.equal(outputs.activation[ids], proposals)
    assert (outputs.status[ids] == slots.EXHAUSTED).all() and (outputs.status[:-3] == slots.PENDING).all()


def test_nothing_is_evaluated_more_often_than_steps_ask_for():
    """FAULTS 18: counted at the prefix, which is cached: one call for each block."""
    encode = Calls(generator()[:2])
    split = fr.Split(encode, generator()[2:])
    r = refiner(split)
    r.sample(4)
    before = encode.calls[0]
    r.sample(12)
    assert encode.calls[0] - before == 3


@pytest.mark.parametrize(
    ("threshold", "message"), [(-100.0, "40 of 40 proposals were at the stop threshold"), (100.0, "none of 40")]
)
def test_a_run_that_did_nothing_useful_says_so(threshold, message):
    """It warns, whichever way it did nothing."""
    one = refiner(stop=threshold, max_steps=3)
    with pytest.warns(fr.FastrefineWarning, match=message):
        one.sample(40)
