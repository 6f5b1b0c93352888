"""Whether a result's logits may be read as a density ratio: real logits that travel with it, verdicts, the diagram."""

import builtins
import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import fastrefine as fr
from fastrefine.diagnosis.calibration import diagnosis_of
from tests.support.refiners import refiner
from tests.support.selection_laws import ALPHA, conditional, real_images, samples

CALLS = {
    "chains": lambda out, **k: fr.metropolis_hastings(out, 5, **k),
    "rejection": lambda out, **k: fr.rejection_sample(out, **k),
    "budget": lambda out, **k: fr.budgeted_rejection(out, 0.5, **k),
}
by_every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def result(scale=1.0, n=3_000, shares=(1, 1, 1), **options):
    """Samples of the conditional pair, one class after the other by ``shares``, with logits that are ``scale`` too large."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(shares) * (n // sum(shares)))
    real_labels = torch.arange(3_000) % 3
    one = conditional(scale, real=real_images(real_labels), real_labels=real_labels, **options)
    return one.sample(len(labels), labels=labels)


def told(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if issubclass(w.category, fr.FastrefineWarning) and "density ratio" in str(w.message)]


def test_results_carry_the_real_logits_of_their_run():
    real = torch.randn(50, 6)
    one = refiner(real=real)
    for out in (one.sample(20), one.refine(torch.randn(3, 4)), one.sample(0), *one.stream(30, chunk=7)):
        assert torch.allclose(out.real_logits, one.score(real).double()) and out.real_labels is None
    assert refiner().sample(5).real_logits is None
    y = torch.arange(3_000) % 3
    vectors = conditional(real=real_images(y), real_labels=y).sample(4, labels=1)
    assert torch.equal(vectors.real_labels, y) and vectors.real_logits.dtype == torch.float64


def test_real_logits_are_no_rows_of_the_samples():
    one = refiner(real=torch.randn(50, 6))
    out = one.sample(60)
    for part in (out.select(slice(0, 7)), out.select(out.logits > 0), fr.Result.concatenate([out, one.sample(9)])):
        assert torch.equal(part.real_logits, out.real_logits)
    out.real_logits.zero_()
    assert one.sample(1).real_logits.abs().min() > 0, "the caller's own"


def test_another_discriminator_has_its_own_real_logits():
    real, other = torch.randn(50, 6), torch.nn.Linear(6, 1)
    one = refiner(real=real).with_discriminator(other)
    assert torch.allclose(one.sample(3).real_logits, other(real)[:, 0].double(), atol=1e-5)


@by_every_call
def test_a_result_of_a_miscalibrated_discriminator_warns_once_and_can_be_refused_or_allowed(call):
    out = result(3.0)
    with pytest.warns(
        fr.FastrefineWarning, match="no density ratio.*z = .*ece = .*calibrate.*held-out.*untrusted='allow'"
    ) as seen:
        call(out)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.raises(fr.InputError, match="no density ratio of these samples"):
        call(out, untrusted="refuse")
    assert not told(lambda: call(out, untrusted="allow"))
    assert not told(lambda: call(out.logits)), "tensors are taken as calibrated"
    assert not told(lambda: call(dataclasses.replace(out, real_logits=None)))
    with pytest.raises(fr.InputError, match="untrusted"):
        call(out, untrusted="maybe")


@by_every_call
def test_a_result_of_the_optimal_discriminator_is_trusted_and_one_calibrated_becomes_so(call):
    out = result()
    assert not told(lambda: call(out, untrusted="refuse"))
    wrong = result(3.0)
    y = torch.arange(3_000) % 3
    held = conditional(3.0).score(real_images(y, seed=9), y)
    map_ = fr.calibrate(held, wrong.logits, method="platt")
    mended = dataclasses.replace(wrong, logits=map_(wrong), real_logits=map_(wrong.real_logits))
    assert not told(lambda: call(mended, untrusted="refuse"))


def test_a_critic_stays_an_error_whatever_is_allowed():
    out = dataclasses.replace(result(n=60), scale="critic")
    for call in CALLS.values():
        with pytest.raises(fr.InputError, match="critic"):
            call(out, untrusted="allow")


def test_real_images_weigh_as_the_classes_of_the_samples_do():
    # D of the classes is optimal, and the classes' logits differ by offsets that only matching weights cancel
    offsets = torch.tensor([0.0, 1.5, -1.5])
    out = result(shares=(8, 1, 1))
    assert diagnosis_of(out).trusted
    unlabelled = dataclasses.replace(out, real_labels=None)
    one_class = out.select(out.labels == 1)
    assert diagnosis_of(one_class).trusted and diagnosis_of(one_class).num_real == 1_000
    skewed = dataclasses.replace(
        out, logits=out.logits + offsets[out.labels], real_logits=out.real_logits + offsets[out.real_labels]
    )
    assert not diagnosis_of(skewed).trusted
    assert diagnosis_of(unlabelled).num_real == 3_000
    kept = out.real_labels < 2
    fewer = dataclasses.replace(out, real_logits=out.real_logits[kept], real_labels=out.real_labels[kept])
    assert diagnosis_of(fewer).num_fake == int((out.labels < 2).sum()) and diagnosis_of(fewer).trusted
    strange = dataclasses.replace(out, real_labels=out.real_labels + 7)
    assert diagnosis_of(strange) is None and not told(lambda: CALLS["chains"](strange))


def test_samples_whose_logit_is_not_finite_have_no_say():
    out = result(n=300)
    broken = dataclasses.replace(out, logits=out.logits.clone().index_fill(0, torch.tensor([0, 5]), math.nan))
    assert diagnosis_of(broken).num_fake == len(out) - 2
    assert diagnosis_of(dataclasses.replace(out, logits=torch.full_like(out.logits, math.nan))) is None


def test_unequal_numbers_weigh_the_same():
    even = fr.diagnose(*samples(20_000, 20_000))
    for n, m in ((2_000, 60_000), (60_000, 2_000)):
        found = fr.diagnose(*samples(n, m))
        assert abs(found.z) < stats.norm.isf(ALPHA / 2) and found.trusted
        assert found.ece < 0.05 and found.brier == pytest.approx(even.brier, abs=0.01)
        assert (found.num_real, found.num_fake, found.uncertainty) == (n, m, 0.25)
    real, fake = samples(500, 800)
    for name in ("brier", "ece", "mce", "reliability", "resolution"):
        one, twice = fr.diagnose(real, fake), fr.diagnose(torch.cat([real, real]), fake)
        assert getattr(one, name) == pytest.approx(getattr(twice, name)), name


def test_z_of_equal_numbers_is_the_published_one():
    real, fake = (torch.sigmoid(d) for d in samples(400, 400))
    p, y = torch.cat([real, fake]), torch.cat([torch.ones(400), torch.zeros(400)])
    wanted = float((y - p).sum() / (p * (1 - p)).sum().sqrt())
    assert fr.diagnose(real.logit(), fake.logit()).z == pytest.approx(wanted)


@pytest.mark.parametrize("numbers", [(60_000, 2_000), (2_000, 60_000)])
def test_z_allows_for_the_spread_of_either_side(numbers):
    # two kinds of images, one of which is half of the data and 0.5 % of what is generated
    kinds = torch.tensor([0.5 / 0.005, 0.5 / 0.995], dtype=torch.float64).log()
    real, fake = (kinds[(torch.arange(n) >= share * n).long()] for n, share in zip(numbers, (0.5, 0.02), strict=True))
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    generated = torch.tensor([0.005, 0.995], dtype=torch.float64)  # the shares that the logits claim
    spread = float(((1 - p) ** 2).mean()) / len(p) + float(torch.sigmoid(kinds) ** 2 @ generated) / len(q)
    wanted = float((1 - p).mean() - q.mean()) / math.sqrt(spread)
    assert fr.diagnose(real, fake).z == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("numbers", [(500, 500), (500, 20_000), (20_000, 500)])
def test_z_of_calibrated_logits_spreads_no_more_than_a_standard_normal(numbers):
    z = torch.tensor([fr.diagnose(*samples(*numbers, seed=2 * k)).z for k in range(60)])
    assert float((z**2).sum()) < stats.chi2.isf(ALPHA, 60) and abs(float(z.mean())) < stats.norm.isf(ALPHA / 2) / math.sqrt(60)


@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
@pytest.mark.parametrize(
    ("distort", "verdict"),
    [
        (lambda d: d, True), (lambda d: 1.15 * d, True), (lambda d: d + 0.08, True),
        (lambda d: 2 * d, False), (lambda d: d + 0.4, False),
    ],
    ids=["optimal", "nearly optimal", "small bias", "too sure", "biased"],
)  # fmt: skip
def test_the_verdict_does_not_change_with_the_number_of_images(distort, verdict, n):
    assert fr.diagnose(*(distort(d) for d in samples(n, n))).trusted is verdict


def test_chance_is_taken_off_the_calibration_error():
    found = [fr.diagnose(*samples(200, 200, seed=2 * k)) for k in range(30)]
    assert np.mean([x.ece for x in found]) > 0.03, "what chance alone gives"
    assert np.mean([x.calibration_error for x in found]) < 0.02
    many = fr.diagnose(*(2 * d for d in samples(50_000, 50_000)))
    few = [fr.diagnose(*(2 * d for d in samples(400, 400, seed=2 * k))).calibration_error for k in range(30)]
    assert np.mean(few) == pytest.approx(many.calibration_error, abs=0.015)
    assert many.calibration_error == pytest.approx(math.sqrt(many.reliability), rel=0.01)


def test_bins_hold_what_was_counted():
    found = fr.diagnose(torch.tensor([3.0, 2.9, -3.0]), torch.tensor([-3.0]), bins=4)
    p = torch.sigmoid(torch.tensor([3.0, 2.9])).double().mean()
    assert found.bin_real.tolist() == [1, 0, 0, 2] and found.bin_fake.tolist() == [1, 0, 0, 0]
    assert found.bin_share.tolist() == [0.25, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True), 1.0]
    assert found.bin_predicted[3] == pytest.approx(float(p)) and "bin_" not in repr(found)


def test_the_diagram_shows_the_bins(tmp_path):
    found = fr.diagnose(*(3 * d for d in samples(2_000, 2_000)))
    figure = fr.reliability_plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    above, below = figure.axes
    dots = above.collections[-1].get_offsets()
    known = found.bin_real + found.bin_fake > 0
    assert np.allclose(np.asarray(dots)[known], np.stack([found.bin_predicted, found.bin_share], 1)[known])
    steps = {patch.get_label(): patch.get_data().values for patch in below.patches}
    assert np.allclose(steps["real"], found.bin_real / 2_000) and np.allclose(steps["generated"], found.bin_fake / 2_000)


def test_the_diagram_of_a_calibration_shows_before_and_after_on_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    first, _ = figure.subplots(1, 2)
    found = fr.calibrate(*(3 * d for d in samples(2_000, 2_000)), method="platt")
    assert fr.reliability_plot(found, ax=first) is figure
    names = [text.get_text() for text in first.get_legend().get_texts()]
    assert names[0].startswith(f"before: ECE {found.before.ece:.3f}") and names[1].startswith("after platt: ECE")


def test_without_matplotlib_the_diagram_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(fr.InputError, match=r"pip install fastrefine\[plot\]"):
        fr.reliability_plot(fr.diagnose(torch.zeros(3), torch.zeros(3)))


def test_only_diagnoses_and_calibrations_are_drawn():
    with pytest.raises(fr.InputError, match="got Tensor"):
        fr.reliability_plot(torch.zeros(3))
