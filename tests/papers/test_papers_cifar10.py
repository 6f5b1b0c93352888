"""The CIFAR-10 experiment: its trainings, its claims on known rows, PNG folders, and that the quick run shows the claim."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastrefine as fr
from benchmarks.papers import cifar10, image_networks
from benchmarks.papers.image_networks import PictureClassifier
from benchmarks.papers.run import Run
from fastrefine import pictures
from fastrefine.demo import gan
from fastrefine.demo.gan import build
from fastrefine.demo.judge import train_classifier

TINY = cifar10.QUICK.but(
    checkpoints=(2,), classifier_steps=2, shaping_iterations=1, shaping_batch=8, max_steps=2, samples=40, reference=40,
    num_slots=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("cifar10")


def row_of(record, name, discriminator):
    (found,) = [row for row in record["rows"] if (row["name"], row.get("discriminator")) == (name, discriminator)]
    return found


# --- the whole


def test_in_the_quick_run_shaped_refinement_beats_the_generator_drs_and_mh(quick):
    ours = row_of(quick[1], "refine", "shaped")
    for name in ("standard", "DRS", "MH"):
        other = row_of(quick[1], name, "own")
        assert ours["frechet_distance"] < 0.8 * other["frechet_distance"]
        assert ours["classifier_score"] > other["classifier_score"]
    assert [claim["holds"] for claim in quick[1]["claims"] if claim["claim"].startswith("refine (shaped)")] == [True] * 3


def test_the_quick_run_leaves_its_record_a_colour_picture_and_the_networks_that_were_not_run(quick):
    folder, record = quick
    assert record["reduced"] and 0.8 < record["classifier_accuracy"]["0"] <= 1
    left_out = [row for row in record["rows"] if row.get("status") == "not run"]
    assert [row["name"] for row in left_out] == ["DCGAN", "SNGAN"]
    pixels = np.asarray(Image.open(folder / "cifar10.png").convert("RGB")).astype(int)
    assert (np.abs(pixels[..., 0] - pixels[..., 2]) > 12).mean() > 0.02
    assert {row["case"] for row in record["comparison"]} >= {"[CS] DCGAN: refine (shaped)", "[CS] DCGAN: collaborative"}


def test_samples_of_a_row_are_exported_as_png_of_the_same_pixels(quick):
    run = Run(cifar10, "cifar10", quick[0], seeds=(0,), quick=True)
    folder = cifar10.export(run, "refine", "own", 5)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert files == [f"000000/00000{i}.png" for i in range(5)]
    kept = pictures.levels(cifar10.Discriminators(run, 0).images({"discriminator": "own"}, "refine")[:5])
    assert np.array_equal(np.stack([np.asarray(Image.open(folder / file)) for file in files]), kept)
    with pytest.raises(fr.InputError, match="selects"):
        cifar10.export(run, "MH", "own", 5)


def test_the_sngan_recipe_trains_and_refines(tmp_path):
    small = TINY.but(
        network="sngan", latent=8, features=(8, 8), training=cifar10.SNGAN.training, at="blocks.0",
        rows=(("tuned", ("DGflow",)),), dgflow=(1.0, 0.0, 5),  # without noise
    )  # fmt: skip
    run = Run(cifar10, "cifar10", tmp_path, seeds=(0,), recipe=small)
    (flow,) = cifar10.rows(run, 0)
    assert flow["mean_steps"] == 5 and flow["logit_after"] > flow["logit_before"]
    assert [row["name"] for row in run.left_out] == ["DCGAN", "SNGAN"]


@pytest.mark.parametrize("recipe", [cifar10.FULL, cifar10.DCGAN], ids=["reduced", "published"])
def test_the_layer_of_the_recipe_is_the_generators_first_feature_map(recipe):
    g, _ = image_networks.networks_of(recipe, 0)
    found = {layer.name: layer for layer in fr.layers(g, image_networks.prior_of(recipe).sample(torch.arange(2), 0))}
    assert found[recipe.at].shape[-2:] == (4, 4)


# --- claims


def test_a_claim_fails_where_either_figure_is_worse():
    def rows(distance, score):
        made = [("standard", "own", 40.0, 5.0), ("DRS", "own", 41.0, 4.9), ("refine", "shaped", distance, score),
                ("collaborative", "shaped", distance, score)]  # fmt: skip
        return [
            {
                "seed": 0,
                "name": n,
                "discriminator": d,
                "frechet_distance": x,
                "classifier_score": s,
                "frechet_distance_9": x + 1,
            }
            for n, d, x, s in made
        ]

    def verdicts(*figures):
        return [claim["holds"] for claim in cifar10.claims(rows(*figures))]

    assert verdicts(30.0, 6.0) == [True, True, True]
    assert verdicts(30.0, 4.95) == [False, True, True]
    assert verdicts(40.5, 6.0) == [False, True, False]
    ratios = {row["case"]: row["ours"] for row in cifar10.comparison(rows(30.0, 6.0)) if row["metric"].startswith("distance")}
    assert ratios["[CS] DCGAN: refine (shaped)"] == pytest.approx(30 / 40)
    assert ratios["[CS] DCGAN: collaborative"] == pytest.approx(30 / 41)  # against as many raw samples


# --- networks and files


def test_the_classifier_trains_in_bfloat16_and_judges_in_float32():
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)).sign() * 0.5
    y = (x[:, 0, 0, 0] > 0).long()
    x[:, 0] += y[:, None, None]
    net = build(lambda: PictureClassifier(16, 4, 8, 2), 0)
    seen = []
    net.features[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    train_classifier(net, x, y, steps=30, batch_size=32, noise=0.0)
    assert set(seen) == {torch.bfloat16}
    assert float((net(x).argmax(1) == y).float().mean()) > 0.9 and seen[-1] == torch.float32


def test_bfloat16_training_stays_near_float32_training_and_leaves_float32_weights():
    recipe, trained = replace(cifar10.QUICK, size=16), []  # large enough that there are layers between the outer ones
    real = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for bfloat16 in (False, True):
        training = replace(recipe.training, bfloat16=bfloat16, rates=(2e-4, 2e-4))
        trainer = gan.Trainer(*image_networks.networks_of(recipe, 0), gan.images_of(real), gan.uniform(16), training, 0)
        assert list(trainer.advance(3)) == [1, 2, 3]
        trained.append(trainer.discriminator[0].weight.detach())
    start = image_networks.networks_of(recipe, 0)[1][0].weight.detach()
    assert trained[1].dtype == torch.float32
    assert not torch.equal(*trained)
    assert (trained[0] - trained[1]).norm() < 0.5 * (trained[0] - start).norm()
