"""Steps by the curvature along the last move, and a first step that is found when it is left out."""

import torch
from torch import nn

import fastrefine as fr
from fastrefine.samplers.collaborative import FIRST_GAIN


class Valley(nn.Module):
    """A logit that is a concave quadratic of widths from 1 to 10: with loss="wasserstein" its negative is descended."""

    def __init__(self, dim=4):
        super().__init__()
        self.register_buffer("curvature", torch.logspace(-1, 1, dim, dtype=torch.float64))

    def forward(self, x):
        return -0.5 * (self.curvature.to(x) * x.square()).sum(1)


def refiner(sampler, **options):
    given = {"max_steps": 12, "prior": fr.Normal(4), "discriminator_output": "critic", "precision": "float64"} | options
    return fr.Refiner(nn.Identity(), Valley(), sampler, **given)


def test_it_comes_nearer_to_the_top_than_backtracking_in_as_many_evaluations():
    gaps = {}
    for control in ("backtracking", "barzilai_borwein"):
        for size in (1e-3, 1.0):
            out = refiner(fr.Collaborative(size, loss="wasserstein", control=control)).sample(200)
            gaps[control, size] = -float(out.logits.median())
            assert (out.logits >= out.initial_logits).all()
    assert gaps["barzilai_borwein", 1e-3] < 0.1 * gaps["backtracking", 1e-3]
    assert gaps["barzilai_borwein", 1.0] < 0.5 * gaps["backtracking", 1.0]


def test_in_one_dimension_the_second_step_is_newtons():
    """s's / s'y is one over the curvature: the third evaluation is at the top."""
    one = fr.Refiner(
        nn.Identity(), Valley(1), fr.Collaborative(2.0, loss="wasserstein", control="barzilai_borwein"), max_steps=2,
        prior=fr.Normal(1), discriminator_output="critic", precision="float64",
    )  # fmt: skip
    out = one.sample(20)
    torch.testing.assert_close(out.logits, torch.zeros(20, dtype=torch.float64), atol=1e-20, rtol=0)
    torch.testing.assert_close(out.step_sizes, torch.full((20,), 10.0, dtype=torch.float64))  # curvature .1


def test_a_first_step_that_is_left_out_follows_from_proposals_of_the_prior_alone():
    one = refiner(fr.Collaborative(loss="wasserstein"))
    one.sample(3, seed=5)
    found = one._networks.bound[0]
    assert found.control == "barzilai_borwein" and one.sampler.step_size is None
    other = refiner(fr.Collaborative(loss="wasserstein"))
    other.refine(100 * torch.randn(7, 4, dtype=torch.float64))
    assert other._networks.bound[0].step_size == found.step_size
    z = fr.Normal(4).sample(torch.arange(4, 8), 0, torch.float64, fr.noise.Stream.PROBE)
    slope = (Valley().curvature * z).square().sum(1)
    torch.testing.assert_close(found.step_size, float(FIRST_GAIN / slope.median()))
