"""Every driver against [CS] Alg. 1, one sample at a time in plain Python (tests/support/algorithm_1.py)."""

import pytest
import torch

import fastrefine as fr
from tests.support.algorithm_1 import SAMPLERS, K, Mixed, oracle
from tests.support.stand_in import KINDS


@pytest.mark.parametrize("name", SAMPLERS)
def test_drivers_equal_algorithm_1_sample_by_sample(runtime, name):
    n = 30
    g, d, real, threshold, images, logits, steps = oracle(name, "1", n)
    one = fr.Refiner(
        g, d, SAMPLERS[name], at="1", max_steps=K, stop=Mixed(threshold), prior=fr.Normal(4), real=real, num_slots=7,
        precision="float64",
    )  # fmt: skip
    for driver in ("host", *KINDS):
        out = one.replaced(driver=driver).sample(n, seed=5)
        assert out.report["driver"] == driver and torch.equal(out.steps.long(), steps)
        torch.testing.assert_close(out.images, images, rtol=0, atol=1e-8)
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-8)
