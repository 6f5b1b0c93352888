"""FAULTS 1, 2, 3, 14: numbers that are not finite, explode or do not move."""

import functools
import math

import pytest
import torch
from torch import nn

import fastrefine as fr
from tests.support.fault_networks import IMAGE, LATENT, Calls, discriminator, generator, plain_loop, refiner, same_result, told

N = 10  # more than two fillings of the four slots


class Poisoned(nn.Module):
    """Turns bad for images whose first pixel exceeds ``limit``: in its logit, or in its gradient alone."""

    def __init__(self, limit, where="logit", value=math.nan):
        super().__init__()
        self.module, self.where, self.value = discriminator(), where, value
        self.register_buffer("limit", torch.tensor(float(limit)))

    def forward(self, x):
        bad, logit = x[:, :1] > self.limit, self.module(x)
        if self.where == "logit":
            return torch.where(bad, self.value, logit)
        root = torch.sqrt(torch.where(bad, 0 * x[:, :1], 1.0))  # its slope at 0 is infinite
        return logit + (root - root.detach())


@functools.cache
def limit_met_by_one_proposal():
    """A limit that exactly one proposal exceeds, and its id."""
    pixel = refiner(max_steps=0).sample(N).images[:, 0]
    return float(pixel.sort().values[-2:].mean()), int(pixel.argmax())


@functools.cache
def limit_met_on_the_way(sampler):
    """A limit that no proposal exceeds and exactly one sample meets during its steps, before the last, and its id."""
    r = refiner(sampler=sampler)
    path = [r.replaced(max_steps=k).sample(N).images[:, 0] for k in range(5)]
    starts, peak = path[0], torch.stack(path[1:]).amax(0)
    bad = int(peak.argmax())
    others = torch.cat([starts, peak[torch.arange(N) != bad]]).max()
    assert peak[bad] > others, "the pair of this test must lift some pixel above all proposals'"
    return float((peak[bad] + others) / 2), bad


@pytest.mark.parametrize(("where", "value"), [("logit", math.nan), ("logit", math.inf), ("gradient", math.nan)])
def test_a_proposal_that_is_not_finite_retires_at_once_and_neighbours_do_not_notice(where, value):
    """FAULTS 1"""
    limit, bad = limit_met_by_one_proposal()
    with told() as warned:
        out = refiner(d=Poisoned(limit, where, value)).sample(N)
    benign = refiner(d=Poisoned(math.inf, where, value)).sample(N)
    others = torch.arange(N) != bad
    assert same_result(out, benign, others)
    assert out.status[bad] == fr.Status.NONFINITE and out.steps[bad] == 0
    assert torch.equal(out.activations[bad], out.latents[bad]) and out.images[bad].isfinite().all()
    assert (out.status[others] != fr.Status.NONFINITE).all()
    assert [text for text in warned if f"1 of {N} samples" in text]


@pytest.mark.parametrize("where", ["logit", "gradient"])
@pytest.mark.parametrize("sampler", [fr.Collaborative(2.0, control="fixed"), fr.Collaborative(0.3, optimizer="adam")])
def test_a_sample_that_turns_bad_later_keeps_its_last_finite_state(where, sampler):
    """FAULTS 1"""
    limit, bad = limit_met_on_the_way(sampler)
    with told():
        out = refiner(d=Poisoned(limit, where), sampler=sampler).sample(N)
    benign = refiner(d=Poisoned(math.inf, where), sampler=sampler).sample(N)
    others = (torch.arange(N) != bad) & (out.status != fr.Status.NONFINITE)  # some may turn bad at the very last
    assert others.sum() >= N // 2 and same_result(out, benign, others)
    assert out.status[bad] == fr.Status.NONFINITE and 0 < out.steps[bad] < 5
    assert out.logits[bad].isfinite() and out.images[bad].isfinite().all() and out.images[bad, 0] <= limit
    before = refiner(d=Poisoned(math.inf, where), sampler=sampler, max_steps=int(out.steps[bad]) - 1).sample(N)
    assert torch.equal(out.activations[bad], before.activations[bad])


def test_with_keep_best_a_bad_sample_returns_its_best_finite_point():
    """FAULTS 1"""
    sampler = fr.Collaborative(2.0, control="fixed")
    limit, bad = limit_met_on_the_way(sampler)
    with told():
        out = refiner(d=Poisoned(limit), sampler=sampler, keep="best").sample(N)
    assert out.status[bad] == fr.Status.NONFINITE
    assert out.logits.isfinite().all() and (out.logits >= out.initial_logits).all()


def test_under_backtracking_a_trial_that_is_not_finite_is_rejected():
    """FAULTS 1"""
    sampler = fr.Collaborative(4.0)
    starts = refiner(max_steps=0).sample(N).images[:, 0]
    limit = float(starts.max()) + 1e-3
    benign = refiner(d=Poisoned(math.inf), sampler=sampler).sample(N)
    out = refiner(d=Poisoned(limit), sampler=sampler).sample(N)
    met = benign.images[:, 0] > limit
    assert met.any(), "the pair of this test must meet the limit"
    assert (out.status == fr.Status.EXHAUSTED).all() and (out.images[:, 0] <= limit).all()
    assert (out.logits >= out.initial_logits).all() and out.images.isfinite().all()
    untouched = (out.images == benign.images).all(1)
    assert same_result(out, benign, untouched) and untouched.any()


@pytest.mark.parametrize("control", ["fixed", "backtracking"])
def test_every_sample_bad_from_the_start_still_ends(control):
    """FAULTS 1"""
    with told() as warned:
        out = refiner(d=Poisoned(-math.inf), sampler=fr.Collaborative(0.1, control=control)).sample(N)
    assert (out.status == fr.Status.NONFINITE).all() and out.logits.isnan().all() and out.images.isfinite().all()
    assert [text for text in warned if f"{N} of {N}" in text]


def test_nonfinite_samples_raise_where_that_was_asked_for():
    """FAULTS 1"""
    limit, bad = limit_met_by_one_proposal()
    with pytest.raises(fr.NonFiniteError, match=rf"1 samples, first ids \[{bad}\]"):
        refiner(d=Poisoned(limit), on_nonfinite="error").sample(N)
    refiner(on_nonfinite="error").sample(N)


def test_bad_samples_in_the_probe_batch_change_nothing_for_the_others():
    """FAULTS 1: folding and tracing are decided on a few latents, some of which may be bad."""
    g = nn.Sequential(nn.Linear(LATENT, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, IMAGE))
    g[1].running_mean.uniform_(-1, 1)
    z = refiner(max_steps=0).sample(N).latents
    start = refiner(g, max_steps=0).refine(z).images[:, 0]
    limit = float(start[:4].sort().values[-2:].mean())
    bad = start > limit
    with told():
        out = refiner(g, Poisoned(limit, value=math.inf), sampler=fr.Collaborative(1e-4)).refine(z)
    benign = refiner(g, Poisoned(math.inf), sampler=fr.Collaborative(1e-4)).refine(z)
    assert bad[:4].any() and not bad.all()
    assert torch.equal(out.status == fr.Status.NONFINITE, bad)
    assert same_result(out, benign, ~bad) and out.report["route"] == benign.report["route"] == "flat"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_given_latents_must_be_finite(value):
    """FAULTS 2"""
    g, z = Calls(generator()), torch.zeros(9, LATENT)
    z[3, 1] = z[7, 0] = value
    with pytest.raises(ValueError, match=r"latents holds non-finite values in 2 of 9 rows, first at \[3, 7\]"):
        refiner(g).refine(z)
    assert g.calls == [0]


def test_latents_beyond_the_range_of_the_state_count_as_not_finite():
    """FAULTS 2"""
    z = torch.zeros(3, LATENT, dtype=torch.float64)
    z[1, 0] = 1e200
    with pytest.raises(ValueError, match=r"latents .*1 of 3 rows, first at \[1\]"):
        refiner().refine(z)
    refiner(precision="float64", max_steps=0).refine(z)


def test_given_images_and_real_images_must_be_finite():
    """FAULTS 2"""
    x = torch.zeros(5, IMAGE)
    x[2] = math.nan
    with pytest.raises(ValueError, match=r"images holds non-finite values in 1 of 5 rows, first at \[2\]"):
        refiner().score(x)
    with pytest.raises(ValueError, match="real holds non-finite"):
        refiner(real=x)
    with pytest.raises(ValueError, match="non-finite"):
        fr.Refiner(None, discriminator(), fr.Collaborative(0.1), at="output").refine(x)


def test_label_vectors_must_be_finite():
    """FAULTS 2"""
    y = torch.zeros(3, 2)
    y[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"labels holds non-finite values in 1 of 3 rows, first at \[1\]"):
        refiner().sample(3, labels=y)


def test_logits_above_all_real_ones_are_warned_of():
    """FAULTS 3"""
    torch.manual_seed(0)
    linear = nn.Linear(IMAGE, 1)
    real = refiner(max_steps=0).sample(20).images * 0.1
    with told() as warned:
        refiner(d=linear, sampler=fr.Collaborative(5.0, loss="wasserstein"), real=real, max_steps=20).sample(N)
    assert [text for text in warned if "passed the highest real logit" in text]
    with told() as warned:
        refiner(d=linear, real=real * 100, max_steps=1).sample(N)
    assert not [text for text in warned if "passed the highest real logit" in text]


def test_steps_that_mostly_lower_the_logit_are_warned_of():
    """FAULTS 3"""

    class Valley(nn.Module):
        def forward(self, x):
            return -50 * x.square().sum(1)

    options = {"at": "output", "max_steps": 8}
    with told() as warned:
        sampler = fr.Collaborative(0.021, loss="wasserstein", control="fixed")
        out = refiner(d=Valley(), sampler=sampler, **options).sample(N)
    assert [text for text in warned if "of the updates lowered the logit" in text]
    assert (out.logit_falls > 4).all()
    with told() as warned:
        refiner(d=Valley(), sampler=fr.Collaborative(0.021, loss="wasserstein"), **options).sample(N)
    assert not warned, "step control rejects such steps"


def test_gradients_are_clipped_per_sample():
    """FAULTS 3"""
    z = refiner(max_steps=0).sample(N).latents
    out = refiner(sampler=fr.Collaborative(1.0, control="fixed"), max_steps=1, max_grad_norm=1e-3).refine(z)
    free = refiner(sampler=fr.Collaborative(1.0, control="fixed"), max_steps=1).refine(z)
    norms = torch.linalg.vector_norm(free.activations - z, dim=1)
    expected = z + (free.activations - z) * (1e-3 / norms).clamp(max=1)[:, None]
    assert (norms > 1e-3).any() and torch.allclose(out.activations, expected, atol=1e-6)


@pytest.mark.parametrize("sampler", [fr.Collaborative(0.1), fr.Collaborative(0.1, control="fixed"), fr.DGflow(0.1, gamma=0.0)])
def test_zero_gradients_are_told_and_marked(sampler):
    """FAULTS 14"""
    d = discriminator()
    nn.init.zeros_(d[2].weight)
    with told() as warned:
        out = refiner(d=d, sampler=sampler).sample(N)
    assert (out.status == fr.Status.STALLED).all() and torch.equal(out.activations, out.latents)
    assert [text for text in warned if f"0 of {N} samples moved" in text]


def test_a_saturated_discriminator_stalls_some_samples_only():
    """FAULTS 14"""

    class Hinged(nn.Module):
        def forward(self, x):
            return torch.relu(x[:, 0])

    with told() as warned:
        out = refiner(d=Hinged(), at="output", prior=fr.Normal(LATENT)).sample(2 * N)
    stuck = out.initial_logits == 0
    assert 0 < stuck.sum() < 2 * N and torch.equal(out.status == fr.Status.STALLED, stuck)
    assert not [text for text in warned if "samples moved" in text]


SAMPLERS = [
    fr.Collaborative(1e30), fr.Collaborative(1e30, control="fixed"), fr.Collaborative(1e38, optimizer="adam"),
    fr.Collaborative(1e30, loss="least_squares", control="fixed"), fr.DGflow(1e30), fr.DGflow(1e38, "JS", gamma=1.0),
]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize(("at", "keep"), [("input", "last"), ("0", "best"), ("output", "last")])
def test_no_number_that_is_not_finite_goes_unsaid(sampler, at, keep):
    """FAULTS 1: with absurd step sizes every sample is finite throughout, or said to be NONFINITE."""
    g = generator()[:3]  # without its tanh
    with told() as warned:
        out = refiner(g, sampler=sampler, at=at, keep=keep, max_steps=4).sample(N)
    finite = out.images.isfinite().all(1) & out.logits.isfinite() & out.activations.flatten(1).isfinite().all(1)
    assert finite.all()
    bad = out.status == fr.Status.NONFINITE
    assert bool([text for text in warned if "non-finite" in text]) == bool(bad.any())


def test_an_image_that_is_not_finite_behind_a_finite_logit_is_told():
    """FAULTS 1: the discriminator looks at one pixel, the other is NaN."""

    class Blind(nn.Module):
        def forward(self, x):
            return x[:, 0]

    class Half(nn.Module):
        def forward(self, z):
            return torch.stack([z[:, 0], torch.log(z[:, 1])], 1)

    with told() as warned:
        out = refiner(Half(), Blind()).sample(N)
    bad = int((~out.images.isfinite()).any(1).sum())
    assert bad and [text for text in warned if f"{bad} of {N} images hold non-finite values" in text]


def test_plain_loop_of_these_tests_is_what_the_engine_computes():
    """The helper that other fault tests compare with."""
    out = refiner(precision="float64").sample(N)
    _, images = plain_loop(generator().double(), discriminator().double(), out_latents(), 5, 0.1)
    assert torch.allclose(out.images, images, atol=1e-12)


def out_latents():
    return refiner(precision="float64", max_steps=0).sample(N).latents


@pytest.mark.parametrize("sampler", [fr.DGflow(3e38, gamma=0.0), fr.Collaborative(1e38, optimizer="momentum", momentum=1.0)])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_activation_that_overflows_behind_a_finite_logit_is_not_taken(sampler, keep):
    """FAULTS 1: a squashing discriminator gives an infinite image a finite logit and a gradient of zero."""

    class Squashed(nn.Module):
        def forward(self, x):
            return 10 * torch.tanh(x).sum(1)

    with told() as warned:
        out = refiner(d=Squashed(), sampler=sampler, at="output", keep=keep).sample(N)
    bad = int((out.status == fr.Status.NONFINITE).sum())
    assert out.images.isfinite().all() and bad
    assert [text for text in warned if f"{bad} of {N} samples" in text]
