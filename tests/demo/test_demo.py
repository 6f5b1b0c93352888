"""The demo: its rows, its picture, and the weights it starts from."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastrefine.demo import recipes
from fastrefine.demo import run as demo
from fastrefine.production.bench import Bench


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """A small run of the demo: few iterations of shaping, few samples."""
    outdir = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    small = dict(shaping_iterations=30, shaping_rate=3e-4, classifier_steps=200, chain_length=2,
                 distil=dict(pairs=1000, iterations=300))  # fmt: skip
    patch.setattr(demo, "DIGITS", replace(recipes.DIGITS, **small))
    patch.setattr(demo, "Bench", functools.partial(Bench, seconds=0.1))
    state = torch.random.get_rng_state()
    try:
        demo.run(outdir, samples=500)
    finally:
        patch.undo()
    assert torch.equal(state, torch.random.get_rng_state()) and torch.get_num_threads() == 1
    return outdir, json.loads((outdir / "metrics.json").read_text())


def test_the_demo_writes_its_rows(metrics):
    _, found = metrics
    assert [row["name"] for row in found["rows"]] == [
        "generator",
        "refined",
        "shaped",
        "shaped+mh",
        "distilled",
        "distilled+steps",
    ]
    for row in found["rows"]:
        for key in (
            "frechet_distance",
            "classifier_score",
            "mean_steps",
            "evaluations",
            "images_per_second",
            "ratio_b0",
            "ratio_b0_best",
        ):
            assert row[key] >= 0
    assert found["classifier_accuracy"] > 0.9 and found["samples"] == 500
    assert [row["evaluations"] == 0 for row in found["rows"]] == [True, False, False, False, True, False]
    assert found["b0_best_rows"]["frechet_distance"] < found["rows"][0]["frechet_distance"]


def test_a_little_distilling_already_lowers_the_distance(metrics):
    distance = {row["name"]: row["frechet_distance"] for row in metrics[1]["rows"]}
    assert max(distance["distilled"], distance["distilled+steps"]) < 0.9 * distance["generator"], distance


def test_a_little_shaping_already_lowers_the_distance_and_raises_the_score(metrics):
    rows = {row["name"]: row for row in metrics[1]["rows"]}
    assert rows["shaped"]["frechet_distance"] < 0.6 * rows["generator"]["frechet_distance"]
    assert rows["shaped"]["classifier_score"] > rows["generator"]["classifier_score"]


def test_the_picture_shows_its_rows_and_the_difference_has_both_signs(metrics):
    image = Image.open(metrics[0] / "comparison.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert image.width > 1000
    assert any(r > 200 and g < 80 for r, g, b in colours) and any(b > 200 and g < 80 for r, g, b in colours)


def test_the_embedded_weights_are_small_and_reproduced_by_training():
    weights = demo._networks(recipes.DIGITS, recipes.DIGITS.load(None), 0, recipes.DIGITS.early_steps, False)
    trained = demo._networks(recipes.DIGITS, recipes.DIGITS.load(None), 0, recipes.DIGITS.early_steps, True)
    z = torch.randn(200, recipes.DIGITS.latent, generator=torch.Generator().manual_seed(0))
    # training is chaotic: on another machine the weights differ by more than rounding, the images by little
    assert (weights[0](z) - trained[0](z)).abs().mean() < 0.2
