"""proposals=n: each sample starts from the best of n raw proposals, by its id alone."""

import numpy as np
import pytest
import torch
from torch import nn

import fastrefine as fr
from tests.support.commands import fastrefine, told

N, EACH, SEED = 30, 4, 5


def networks():
    torch.manual_seed(2)
    g = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6))
    return g, nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


G, D = networks()


def refiner(**options):
    own = {"at": "1", "max_steps": 3, "prior": fr.Normal(4), "num_slots": 8, "precision": "float64", "proposals": EACH}
    return fr.Refiner(G, D, fr.Collaborative(0.1), **{**own, **options})


def best():
    """(latents (N, 4), logits (N,)) of the best of each sample's proposals, one after the other."""
    z = fr.Normal(4).sample(torch.arange(N * EACH), SEED, torch.float64)
    with torch.no_grad():
        logits = D.double()(G.double()(z))[:, 0].view(N, EACH)
    G.float(), D.float()
    return z.view(N, EACH, 4)[torch.arange(N), logits.argmax(1)], logits.max(1).values


def test_each_sample_is_refined_from_the_best_of_its_own_proposals():
    latents, logits = best()
    out, plain = refiner().sample(N, seed=SEED), refiner(proposals=1)
    torch.testing.assert_close(out.initial_logits, logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.images, plain.refine(latents, seed=SEED).images, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=0)
    torch.testing.assert_close(out.initial_images, plain.replaced(max_steps=0).refine(latents).images, rtol=0, atol=1e-9)
    assert (plain.sample(N, seed=SEED).initial_logits - logits).abs().max() > 1e-3  # the check can fail


def test_it_is_an_option_of_each_call_too():
    out, plain = refiner().sample(N, seed=SEED), refiner(proposals=1)
    assert torch.equal(plain.sample(N, seed=SEED, proposals=EACH).images, out.images)
    given = fr.Normal(4).sample(torch.arange(N * EACH), SEED, torch.float64)
    assert torch.equal(plain.refine(given, seed=SEED, proposals=EACH).images, out.images)
    assert torch.equal(refiner().sample(N, seed=SEED, proposals=1).images, plain.sample(N, seed=SEED).images)


def test_samples_do_not_depend_on_chunks_or_the_range_of_ids():
    out = refiner(deterministic=True).sample(N, seed=SEED)
    parts = list(refiner(deterministic=True).stream(N - 7, first_id=7, seed=SEED, chunk=4))
    assert torch.equal(torch.cat([part.images for part in parts]), out.images[7:])
    other = refiner(num_slots=16).sample(N, seed=SEED)
    torch.testing.assert_close(other.images, out.images, rtol=0, atol=1e-9)


def test_the_report_counts_the_evaluations_of_proposals():
    out, plain = refiner().sample(N), refiner(proposals=1).sample(N)
    assert (plain.report["evaluations"], plain.report["proposal_evaluations"]) == (N * 4, 0)
    assert (out.report["evaluations"], out.report["proposal_evaluations"]) == (N * 4 + N * EACH, N * EACH)
    assert out.report["slot_efficiency"] == plain.report["slot_efficiency"]


class Cracked(nn.Module):
    """No finite logit where the first pixel is positive."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x):
        return torch.where(x[:, :1] > 0, torch.nan, self.d(x))


def test_a_proposal_without_a_finite_logit_is_taken_last():
    own = fr.Refiner(G, Cracked(D), fr.Collaborative(0.1), prior=fr.Normal(4), max_steps=0, num_slots=8)
    alone, chosen = own.sample(64), own.sample(64, proposals=8)
    assert alone.initial_logits.isnan().any() and not chosen.initial_logits.isnan().any()


def test_labels_are_of_the_sample_and_not_of_the_proposal():
    torch.manual_seed(0)
    table = torch.randn(3, 6)

    class Conditional(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, labels):
            made = self.module(x)
            return made + table[labels][:, : made.shape[1]]

    own = fr.Refiner(Conditional(G), Conditional(D), fr.Collaborative(0.1), prior=fr.Normal(4), max_steps=0, num_slots=8)
    labels = torch.arange(12) % 3
    out = own.sample(12, labels=labels, proposals=EACH)
    z = fr.Normal(4).sample(torch.arange(12 * EACH), 0)
    y = labels.repeat_interleave(EACH)
    wanted = Conditional(D)(Conditional(G)(z, y), y)[:, 0].view(12, EACH).max(1).values
    torch.testing.assert_close(out.initial_logits, wanted.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: refiner(proposals=0), "proposals is 0; wanted a whole number of at least 1"),
        (lambda: refiner(coupling="lockstep", group_size=4), "lockstep.*leave proposals out"),
        (lambda: refiner().refine(torch.randn(6, 4)), "got 6 latents; wanted a multiple of proposals=4"),
        (lambda: refiner().sample(1, first_id=2**30), "of 4 proposals each"),
    ],
)
def test_what_does_not_fit_is_refused(call, text):
    with pytest.raises(fr.InputError, match=text):
        call()


def test_the_command_line_starts_from_the_best_too(tmp_path):
    out = []
    for name, more in (("one", ()), ("best", ("--best-of", "4"))):
        options = "--pair", "digits", "--ids", "0-19", "--max-steps", 0, "--stop", "none", "--format", "npz"
        told(fastrefine("refine", *options, "--outdir", tmp_path / name, *more))
        (file,) = (tmp_path / name).glob("**/*.npz")
        out.append(np.load(file)["arr_0"])
    assert out[0].shape == out[1].shape and not np.array_equal(*out)
