"""The translation experiment: the true map, its figures on known images, the training, the claims in the quick run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.papers import translation
from benchmarks.papers.cells import Cells, checkpoints
from fastrefine.datasets import load_digits


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("translation")


def rows_of(record):
    return {row["name"]: row for row in record["rows"]}


# --- the whole


def test_in_the_quick_run_refinement_brings_the_translation_nearer_to_the_target_domain(quick):
    rows = rows_of(quick[1])
    before, after = rows["translated"], rows["refine, shaped"]
    assert after["score"] > before["score"] + 0.03
    assert after["frechet_distance"] < 0.95 * before["frechet_distance"]
    assert after["identity"] >= before["identity"]


def test_in_the_quick_run_refinement_at_a_feature_map_changes_the_object_and_not_its_background(quick):
    rows = rows_of(quick[1])
    assert rows["translated"]["object_change"] == rows["translated"]["background_change"] == 0
    after = rows["refine, shaped"]
    assert 0 < after["background_change"] < 0.5 * after["object_change"]


def test_the_quick_run_leaves_its_record_and_a_picture(quick):
    folder, record = quick
    assert record["experiment"] == "translation" and record["reduced"]
    assert len(record["rows"]) == 4 and len(record["claims"]) == 8
    assert Image.open(folder / "translation-40.png").size[0] > 16 * 48


def test_the_row_as_it_is_descends_the_loss_that_its_discriminator_was_trained_on(quick):
    row = rows_of(quick[1])["refine, D as it is"]
    assert row["logit_before"] < row["logit_after"] <= 1.2  # least squares aims at 1
    assert row["logit_after"] == pytest.approx(row["score"], abs=1e-4)


# --- the domains


def test_the_true_map_is_monotone_in_ink_and_leaves_black_black():
    x = torch.linspace(-1, 1, 50).view(1, 1, 1, 50).expand(1, 3, 1, 50)
    y = translation.glowing(x)[0, :, 0]
    assert (y[:, 0] == -1).all() and y.min() >= -1 and y.max() <= 1
    assert (y.diff(dim=1) >= 0).all()
    assert (y[0] >= y[1]).all() and (y[1] >= y[2]).all() and (y[0] > y[2]).any()


def test_the_domains_are_unpaired_and_their_test_images_are_pairs():
    source, target = translation.domains(load_digits(), 16)
    assert source.train.shape == (700, 3, 16, 16) and target.test.shape == (397, 3, 16, 16)
    assert torch.equal(target.test, translation.glowing(source.test))
    assert not torch.equal(target.train, translation.glowing(source.train))
    assert torch.equal(source.train[:, 0], source.train[:, 2]) and not torch.equal(target.train[:, 0], target.train[:, 2])


def test_figures_tell_the_object_from_its_background():
    source = torch.full((1, 3, 2, 2), -1.0)
    source[:, :, 0, 0] = 1.0  # a quarter has ink
    truth = translation.glowing(source)
    assert max(translation.figures(source, truth, truth).values()) < 1e-6
    worse = truth.clone()
    worse[:, :, 0, 0] -= 0.4
    worse[:, :, 1, 1] += 0.6
    found = translation.figures(source, truth, worse)
    assert found["colour_error"] == pytest.approx(0.2) == found["object_change"]
    assert found["background_error"] == pytest.approx(0.1) == found["background_change"]
    assert found["palette_error"] > 0.05
    other = translation.figures(source, truth, translation.glowing(-0.5 * source))  # another ink's colour, but of the palette
    assert other["palette_error"] < 0.01 < other["colour_error"]
    found = translation.figures(source, worse, worse)
    assert found["colour_error"] == pytest.approx(0.2) and found["object_change"] == 0


# --- training


@pytest.fixture
def trainer():
    source, target = translation.domains(load_digits(), 16)
    recipe = replace(translation.QUICK, training=replace(translation.QUICK.training, batch_size=4))
    return lambda: translation.CycleTrainer(translation.networks_of(recipe, 0), source.train, target.train, recipe, 0)


def test_one_update_is_that_of_the_published_losses(trainer):
    ours = trainer()
    (to, back), (d_source, d_target) = trainer().generator, trainer().discriminator
    random = torch.Generator().manual_seed(0)
    b, a = ours.real(4, random), ours.latents(4, random)
    mean = lambda x: x.square().mean()  # noqa: E731
    forth, there = to(a), back(b)
    cycle = (back(forth) - a).abs().mean() + (to(there) - b).abs().mean()
    identity = (to(b) - b).abs().mean() + (back(a) - a).abs().mean()
    (mean(d_target(forth) - 1) + mean(d_source(there) - 1) + 10 * cycle + 5 * identity).backward()
    wanted = to.decoder[4].weight.grad.clone()
    fakes = forth.detach(), there.detach()
    for d in (d_source, d_target):
        d.zero_grad()
    (0.5 * (mean(d_target(b) - 1) + mean(d_target(fakes[0])) + mean(d_source(a) - 1) + mean(d_source(fakes[1])))).backward()
    list(ours.advance(1))
    torch.testing.assert_close(ours.generator[0].decoder[4].weight.grad, wanted)
    torch.testing.assert_close(ours.discriminator[1][0].weight.grad, d_target[0].weight.grad)
    torch.testing.assert_close(ours.discriminator[0][0].weight.grad, d_source[0].weight.grad)


def test_training_is_taken_up_again_with_the_same_bits(trainer, tmp_path):
    whole = checkpoints(Cells(tmp_path / "a", translation.QUICK), "cyclegan", trainer, (3,))[3]
    cells = Cells(tmp_path / "b", translation.QUICK)
    checkpoints(cells, "cyclegan", trainer, (1,))
    again = checkpoints(cells, "cyclegan", trainer, (3,))[3]
    for one, other in zip(whole, again, strict=True):
        assert all(np.array_equal(p.detach(), q.detach()) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert len(whole[0]) == len(whole[1]) == 2
