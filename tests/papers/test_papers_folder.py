"""The protocol on a folder of pictures: the recipe by the folder's look, the trainings, the claim in the quick run."""

import pytest
import torch
from PIL import Image

import fastrefine as fr
from benchmarks.papers import folder
from benchmarks.papers.cells import Cells
from benchmarks.papers.image_networks import LabelledTrainer, drawn, networks_of, prior_of
from benchmarks.papers.pictures import PictureFolder
from fastrefine.datasets import Images
from fastrefine.demo import gan

CLASSES = folder.QUICK_LABELLED


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("folder")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    folder.blobs(path, 3, 8)
    return path


def test_in_the_quick_run_shaped_refinement_lowers_the_distance_of_both_recipes(quick):
    assert [claim["holds"] for claim in quick[1]["claims"]] == [True, True]
    for claim in quick[1]["claims"]:
        assert claim["refine"] < 0.97 * claim["standard"]


def test_the_quick_run_leaves_its_record_and_a_picture_of_each_recipe(quick):
    outdir, record = quick
    names = ["standard", "refine, unshaped", "refine", "collaborative"]
    wanted = [(recipe.name, name) for recipe in (folder.QUICK, CLASSES) for name in names]
    assert [(row["recipe"], row["name"]) for row in record["rows"]] == wanted
    assert [row["samples"] for row in record["rows"]] == 2 * [100, 100, 100, 20]
    for recipe in (folder.QUICK, CLASSES):
        assert Image.open(outdir / f"{recipe.name}.png").size[0] > 16 * 48


def test_a_folder_is_run_by_the_recipe_that_it_looks_like(pictures, tmp_path):
    assert folder.chosen(pictures) is folder.IMAGENET128
    folder.blobs(tmp_path, 0, 2)
    assert folder.chosen(tmp_path) is folder.CELEBA64
    with pytest.raises(fr.InputError, match="class-conditional"):
        folder.Pictures(Cells(tmp_path / "cells", CLASSES), CLASSES, 0, tmp_path)


def test_the_published_recipes_fit_their_networks():
    celeba, imagenet = folder.CELEBA64, folder.IMAGENET128
    assert (celeba.size, celeba.step_size, celeba.max_steps, celeba.checkpoints) == (64, 0.1, 50, (66_000,))
    assert (imagenet.size, imagenet.step_size, imagenet.max_steps) == (128, 0.5, 16)
    g, d = networks_of(celeba, 0)
    z = prior_of(celeba).sample(torch.arange(1), 0)
    assert d(g(z)).shape == (1,) and g(z).shape == (1, 3, 64, 64)
    assert celeba.at in [layer.name for layer in fr.layers(g, z)]
    g, _ = networks_of(imagenet, 0, 1000)
    assert dict(g.named_modules())[imagenet.at] is not None and g.attention is not None


def test_without_classes_training_images_are_labelled_by_their_quarter_turns():
    x = torch.arange(8.0).view(1, 1, 2, 4).expand(5, 3, 2, 4)[..., :2].contiguous()
    found = folder.turned(Images(x, x[:2], torch.zeros(5), torch.zeros(2)))
    assert found.train_labels.tolist() == [0, 1, 2, 3, 0] and found.test_labels.tolist() == [0, 0]
    assert torch.equal(found.train[0], x[0]) and torch.equal(found.test, x[:2])
    assert torch.equal(torch.rot90(found.train[1], -1, (1, 2)), x[1]) and torch.equal(found.train[2], x[2].flip(1, 2))


def test_a_conditional_update_is_that_of_the_hinge_loss(pictures):
    data = PictureFolder(pictures, 8)

    def trainer():
        return LabelledTrainer(networks_of(CLASSES, 0, 3), data, 20, gan.normal(8), gan.Training(6, "sgd", (0.0, 0.0)), 0)

    ours, (g, d) = trainer(), networks_of(CLASSES, 0, 3)
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(20, (6,), generator=random)
    z = [torch.randn(6, 8, generator=random) for _ in range(2)]
    g.train(), d.train()
    labels = data.labels[rows]
    real, fake = d(data.images(rows), labels), d(g(z[0], labels).detach(), labels)
    ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()).backward()
    list(ours.advance(1))
    for (name, p), q in zip(d.named_parameters(), ours.discriminator.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.generator.parameters())


def test_training_draws_only_from_the_first_pictures(pictures):
    data = PictureFolder(pictures, 8)
    batch = drawn(data, 2)(50, torch.Generator().manual_seed(0))
    first = data.images(range(2))
    assert all(any(torch.equal(x, y) for y in first) for x in batch)
    assert {int((x == first[0]).all()) for x in batch} == {0, 1}


def test_the_proposals_of_a_chain_are_of_one_class(quick, pictures, tmp_path):
    found = folder.Pictures(Cells(tmp_path, CLASSES), CLASSES, 0, pictures)
    labels = found.labels.view(-1, CLASSES.chain_length)
    assert (labels == labels[:, :1]).all() and labels[:, 0].bincount().min() >= 6
    out = found.refiner(found.way("refine"), found.generator, found.own).sample(10, seed=0, labels=found.labels[:10])
    assert out.labels.tolist() == [0] * 5 + [1] * 5
