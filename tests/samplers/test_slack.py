"""Backtracking in reduced precision: a trial may be worse by the rounding error of the loss."""

import pytest

import fastrefine as fr
from tests.support.refiners import pair, refiner


def test_a_trial_may_be_worse_by_the_rounding_error_of_the_loss():
    """Small improvements drown in rounding; strict backtracking would halve the steps of good samples."""
    networks, options = pair(width=64), dict(stop=None, max_steps=20)
    told = {}
    for precision in ("float32", "bfloat16"):
        one = refiner(networks, precision=precision, sampler=fr.Collaborative(0.1), **options)
        one.sample(8)
        told[precision] = one._networks.bound[0].slack
    assert told["float32"] == 0 and 0 < told["bfloat16"] < 0.1
    strict = refiner(networks, precision="bfloat16", sampler=fr.Collaborative(0.1, slack=0.0), **options).sample(64)
    lenient = refiner(networks, precision="bfloat16", sampler=fr.Collaborative(0.1), **options).sample(64)
    exact = refiner(networks, sampler=fr.Collaborative(0.1), **options).sample(64)
    assert lenient.logit_falls.sum() < strict.logit_falls.sum()
    distance = [(out.activations - exact.activations).norm(dim=1).mean() for out in (lenient, strict)]
    assert distance[0] < distance[1]


def test_the_callers_own_slack_is_kept():
    one = refiner(precision="bfloat16", sampler=fr.Collaborative(0.1, slack=0.25))
    one.sample(4)
    assert one._networks.bound[0].slack == 0.25
    with pytest.raises(fr.InputError, match="slack"):
        fr.Collaborative(0.1, slack=-1.0)
