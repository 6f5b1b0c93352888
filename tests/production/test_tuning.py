"""tune_sampler on a pair whose law is known: a step size that is far too small is found out, and nothing else is touched."""

import numpy as np
import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.production import tuning
from fastrefine.production.tuning import FACTORS, FIRST_SEED, allowed, settings
from tests.support.closed_forms import M, S, optimal

BUDGET = 20


def refiner(sampler, **options):
    return fr.Refiner(nn.Identity(), optimal(), sampler, prior=fr.Normal(2), max_steps=10, num_slots=64, **options)


def real():
    return M + S * torch.randn(500, 2, generator=torch.Generator().manual_seed(3))


def distance(found, seed):
    return fr.metrics.frechet_distance(found.sample(2000, seed=seed).images, real())


def test_a_step_size_that_is_too_small_is_found_and_holds_on_fresh_seeds():
    own = refiner(fr.DGflow(0.0005, gamma=0))
    tuned = fr.tune_sampler(own, real(), BUDGET, samples=60)
    before, after = distance(own, 5), distance(tuned.refiner, 5)
    assert after < 0.5 * before
    assert tuned.quality["after"] < tuned.quality["before"] and tuned.quality["before"] <= 1.2 * tuned.quality["raw"]
    assert tuned.sampler.step_size > own.sampler.step_size
    assert tuned.refiner.sampler is tuned.sampler and tuned.refiner.max_steps == tuned.max_steps
    assert tuned.refiner.sample(50).report["evaluations"] <= 50 * BUDGET
    assert own.sampler == fr.DGflow(0.0005, gamma=0) and own.max_steps == 10
    of_rounds = sum(trial["samples"] * BUDGET for trial in tuned.trials)
    assert of_rounds < tuned.evaluations <= of_rounds + 2 * 540 * BUDGET
    assert tuned.seconds > 0 and "trials" not in repr(tuned)


def test_the_best_third_goes_on_with_three_times_the_samples_and_another_seed(monkeypatch):
    seen, plain = [], fr.Refiner.sample
    monkeypatch.setattr(fr.Refiner, "sample", lambda own, n, **k: seen.append((n, k["seed"])) or plain(own, n, **k))
    fr.tune_sampler(refiner(fr.DGflow(0.01)), real(), 5, samples=50, seed=7)
    first = FIRST_SEED + 7
    assert seen == [(50, first)] * 7 + [(150, first + 1)] * 3 + [(150, first + 2)] * 2


def test_a_difference_that_is_small_beside_its_error_over_the_same_latents_is_no_gain(monkeypatch):
    own, seen = refiner(fr.DGflow(0.0005, gamma=0)), []

    def error(features, reference, *, paired):
        seen.append(tuple(len(x) for x in (features, paired)))
        return 100.0

    monkeypatch.setattr(tuning, "frechet_standard_error", error)
    tuned = fr.tune_sampler(own, real(), BUDGET, samples=60)
    assert tuned.sampler == own.sampler and seen == [(180, 180)]


def test_where_nothing_is_better_all_stays_as_it_was():
    own = refiner(fr.DGflow(0.01))
    with pytest.warns(fr.FastrefineWarning, match="no setting made images better than the generator's"):
        tuned = fr.tune_sampler(own, real(), BUDGET, samples=50, features=lambda x: 0 * x)
    assert tuned.sampler == own.sampler and tuned.max_steps == own.max_steps
    assert tuned.quality == {"raw": 0, "before": 0, "after": 0}


def test_labels_are_one_class_or_those_that_the_samples_take_in_turn():
    class Classes(nn.Module):
        def forward(self, z, labels):
            return z + labels[:, None]

    one = fr.Refiner(Classes(), optimal(), fr.Collaborative(0.1), at="output", prior=fr.Normal(2), max_steps=3, num_slots=64)
    seen, plain = [], fr.Refiner.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fr.Refiner, "sample", lambda own, n, **k: seen.append(k["labels"]) or plain(own, n, **k))
        fr.tune_sampler(one, real(), 3, samples=50, labels=torch.tensor([0, 1, 1]))
    assert {len(labels) for labels in seen} == {50, 150} and all(labels[:4].tolist() == [0, 1, 1, 0] for labels in seen)
    assert fr.tune_sampler(one, real(), 3, samples=50, labels=1).evaluations > 0
    for labels, text in (("balanced", "labels must be whole numbers"), ([0.5, 1.0], "labels must be whole numbers")):
        with pytest.raises(fr.InputError, match=text):
            fr.tune_sampler(one, real(), 3, samples=50, labels=labels)


def test_what_is_compared():
    sizes = {round(one.step_size / 0.1, 6) for one in settings(fr.MALA(0.1))}
    assert sizes == {round(factor, 6) for factor in FACTORS} and len(settings(fr.MALA(0.1))) == 21
    assert {one.noise_scale for one in settings(fr.DDLS(0.1))} == {1.0, 0.5, 0.25}
    assert max(one.step_size for one in settings(fr.PCN(1.0))) == 4  # 16 is beyond its largest
    assert settings(fr.Collaborative()) == [fr.Collaborative()]
    assert allowed(fr.MALA(0.1), 12) == [1, 2, 3, 4, 6, 9, 11]
    assert allowed(fr.HMC(0.1, leapfrog=5), 12) == [5, 10]


def test_features_are_components_of_the_real_images_and_a_picture_is_averaged():
    from fastrefine.production.tuning import _Components

    x = torch.randn(300, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    own = _Components(x)
    small = torch.nn.functional.adaptive_avg_pool2d(x.double(), 8).flatten(1)
    found = own(x)
    assert found.shape == (300, 32)
    largest = np.linalg.eigvalsh(np.cov(small.numpy().T))[::-1][:32]
    np.testing.assert_allclose(found.var(0).numpy(), largest, rtol=1e-8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"budget": 1}, "budget is 1; wanted a whole number of at least 2"),
        ({"real": torch.randn(20, 2)}, "real holds 20 images; wanted 100 or more"),
        ({"refiner": fr.Refiner(nn.Identity(), optimal(), fr.DGflow(0.1))}, "pass prior="),
        ({"refiner": refiner(fr.DDLS([0.1, 0.2]))}, "DDLS has a schedule"),
        ({"refiner": refiner(fr.HMC(0.1, leapfrog=10)), "budget": 5}, "one transition of HMC takes 11 evaluations"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    with pytest.raises(fr.InputError, match=text):
        fr.tune_sampler(**{"refiner": refiner(fr.DGflow(0.1)), "real": real(), **change})
