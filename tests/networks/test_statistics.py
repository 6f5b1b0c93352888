"""Statistics that a network carries: BatchNorms that were never updated, spectral norms whose vectors were averaged."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import fastrefine as fr
from fastrefine.production.weights_file import load_weights

FIXED = fr.Collaborative(0.1, control="fixed")


def generator():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))


def judge(norm=lambda layer: layer):
    torch.manual_seed(1)
    return nn.Sequential(norm(nn.Linear(6, 8)), nn.LeakyReLU(0.2), norm(nn.Linear(8, 1)))


def latents(n=64, seed=2):
    return 3 + torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def told(g, d):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fr.Refiner(g, d, FIXED, max_steps=1).refine(latents(8))
    return [str(w.message) for w in seen if issubclass(w.category, fr.FastrefineWarning)]


def test_a_batch_norm_that_was_never_updated_is_doubted_until_it_is_recalibrated():
    g = generator()
    (text,) = told(g, judge())
    assert text.startswith("generator: BatchNorm '1' carries statistics that were never updated")
    before = {name: value.clone() for name, value in g.state_dict().items()}
    made = fr.recalibrate_batch_norm(g, latents(4096).split(256))
    assert all(torch.equal(value, before[name]) for name, value in g.state_dict().items())
    inputs = g[0](latents(4096)).detach()
    torch.testing.assert_close(made[1].running_mean, inputs.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[1].running_var, inputs.view(16, 256, 8).var(1).mean(0), atol=1e-4, rtol=1e-3)
    assert not made.training and made[1].momentum == 0.1
    assert told(made, judge()) == []


def test_a_batch_norm_that_was_updated_is_believed():
    g = generator()
    for rows in latents(4096).split(256):
        g(rows)
    assert told(g, judge()) == []


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
def test_averaged_vectors_of_spectral_norm_are_doubted(norm):
    d, g = judge(norm), nn.Linear(4, 6)
    assert told(g, d) == []
    with torch.no_grad():
        for name, vector in d.named_buffers():
            if name.endswith("_u"):
                vector.mul_(0.9)
    (text,) = told(g, d)
    assert text.startswith("discriminator: spectral norm '0' (and 1 more) has vectors whose length is not 1")


@pytest.mark.parametrize(
    ("old", "new"), [(spectral_norm, parametrizations.spectral_norm), (nn.utils.weight_norm, parametrizations.weight_norm)]
)
def test_weights_of_old_norms_fit_parametrizations_and_the_other_way_round(old, new):
    x = torch.randn(5, 6)
    for ours, theirs in ((judge(old), judge(new)), (judge(new), judge(old))):
        ours.train()
        ours(x)  # moves the vectors
        load_weights(theirs, ours.eval().state_dict(), "a file")
        torch.testing.assert_close(theirs.eval()(x), ours(x))


def test_recalibration_refuses_what_it_cannot_do():
    with pytest.raises(fr.InputError, match="has no BatchNorm"):
        fr.recalibrate_batch_norm(judge(), [latents()])
    with pytest.raises(fr.InputError, match="no batch"):
        fr.recalibrate_batch_norm(generator(), [])
