"""Shaping that keeps the D whose refined samples come nearest to held-out images."""

import warnings

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.training import shape
from tests.training.test_shaping import REAL, equal, refiner


def shaped(iterations=12, rate=0.05, seed=3, real=REAL, one=None, **options):
    """(discriminator, what the callback was told) with a check every two iterations."""
    told = []
    options = {"keep": "best", "check_every": 2, "callback": told.append, **options}
    d = fr.shape_discriminator(one or refiner(), real, iterations, 16, rate, seed=seed, **options)
    return d, told


def checks(told):
    """Iterations done -> distance."""
    return {one["iteration"] + 1: one["held_out_distance"] for one in told if "held_out_distance" in one}


def test_the_best_of_the_checks_is_returned_as_a_shorter_run_leaves_it():
    d, told = shaped()
    found = checks(told)
    assert sorted(found) == [2, 4, 6, 8, 10, 12] and len(told) == 12
    best = min(found, key=found.get)
    assert best < 12, "the rate is so high that the end is worse"
    assert equal(d, shaped(best)[0])
    assert found[best] < found[12]


def test_patience_ends_the_run():
    found = checks(shaped()[1])
    best = min(found, key=found.get)
    d, told = shaped(patience=1)
    seen = list(checks(told).values())
    first_rise = next(i for i, (a, b) in enumerate(zip(seen, [*seen[1:], 0], strict=True)) if b > a)
    assert len(seen) == first_rise + 2
    assert len(told) < 12 or best >= 10
    assert equal(d, shaped(2 * (first_rise + 1))[0])


def test_nearer_samples_have_the_lower_distance():
    """The distance is of the samples that the refiner makes with the D of that check."""
    one = refiner(max_steps=30, sampler=fr.Collaborative(0.5))
    d, told = shaped(40, 5e-3, one=one, check_every=10)
    found = checks(told)
    away = {
        name: float((one.with_discriminator(by).sample(300, seed=9).images - REAL.mean(0)).norm(dim=1).mean())
        for name, by in (("given", one.discriminator), ("best", d))
    }
    assert away["best"] < 0.6 * away["given"]
    assert min(found.values()) < found[10]


def test_where_nothing_is_better_the_given_discriminator_comes_back_with_a_warning():
    one = refiner()
    with pytest.warns(fr.FastrefineWarning, match="no check was better than D as it was given"):
        d, _ = shaped(2, 1e-9, one=one, features=lambda x: torch.zeros(len(x), 1))
    assert equal(d, one.discriminator) and d is not one.discriminator
    with warnings.catch_warnings():
        warnings.simplefilter("error", fr.FastrefineWarning)
        fr.shape_discriminator(one, REAL, 0, 16, 0.01, keep="best")


def test_images_that_are_held_out_are_in_no_batch(monkeypatch):
    seen, held = [], []
    update, of = shape.Trainer.update, shape._Examination.__init__
    monkeypatch.setattr(shape.Trainer, "update", lambda own, x, *rest: seen.append(x) or update(own, x, *rest))
    keep = lambda own, r, s, h, *rest: held.append(h[0]) or of(own, r, s, h, *rest)  # noqa: E731
    monkeypatch.setattr(shape._Examination, "__init__", keep)
    shaped(30, check_every=30)
    rows = {tuple(row) for row in held[0].tolist()}
    assert len(rows) == 40
    assert not rows & {tuple(row) for x in seen for row in x.tolist()}


def test_given_latents_are_held_out_too_and_labels_go_with_their_images():
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    _, told = shaped(4, one=refiner(prior=None), latents=z)
    assert len(checks(told)) == 2

    class Conditional(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.layer = nn.Linear(2, out)

        def forward(self, x, y):
            return self.layer(x) + y[:, None].float()

    torch.manual_seed(0)
    one = refiner((Conditional(2), Conditional(1)))
    assert len(checks(shaped(4, one=one, real_labels=torch.arange(400) % 3)[1])) == 2


def test_the_energy_distance_is_that_of_its_formula():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert shape.energy_distance(x, y) == pytest.approx(2 * (1 + 5 + 1 + 3) / 4 - 2 - 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(keep="first"), "keep is 'first'; wanted one of 'last', 'best'"),
        (dict(patience=2), 'patience and features are of keep="best"'),
        (dict(features=torch.flatten), 'patience and features are of keep="best"'),
        (dict(keep="best", patience=0), "patience is 0"),
        (dict(check_every=0), "check_every is 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, told):
    with pytest.raises(fr.InputError, match=told):
        fr.shape_discriminator(refiner(), REAL, 1, 16, 0.01, **options)


def test_one_image_cannot_be_compared_with():
    with pytest.raises(fr.InputError, match="wanted four or more"):
        shaped(real=REAL[:3])


def test_tuning_has_no_refined_samples_to_compare():
    with pytest.raises(fr.InputError, match="with max_steps=0, as in tuning, they do not depend on D"):
        fr.tune_discriminator(refiner(), REAL, 1, 16, 0.01, keep="best")


def test_large_pictures_are_compared_by_small_ones():
    x = torch.rand(3, 3, 16, 32)
    assert shape._small(x).shape == (3, 3, 8, 8)
    assert shape._small(x[..., :8, :8]) is not x and torch.equal(shape._small(x[..., :8, :8]), x[..., :8, :8])
