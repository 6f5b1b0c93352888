"""Evaluation: its figures on sets whose answer is known, what it warns of, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastrefine import evaluation, pictures
from fastrefine.errors import InputError
from fastrefine.metrics import frechet_distance

pytest.importorskip("torchmetrics")


class Colours(nn.Module):
    """Features: the mean of each channel; logits: by which channel is brightest."""

    def forward(self, images):
        features = images.mean((2, 3))
        return features, 20 * features


FEATURES = evaluation.Features(Colours(), "colours")


def images(n, seed, shift=0.0):
    random = torch.Generator().manual_seed(seed)
    return (0.2 * torch.randn(n, 3, 1, 1, generator=random) + shift).expand(n, 3, 2, 2).contiguous()


def test_figures_of_a_set_against_itself_are_those_of_perfect_images():
    x = images(300, 0)
    found = evaluation.measure(x, x, FEATURES)
    assert found["frechet_inception_distance"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["f_score"]) == (1, 1, 1)
    assert (found["num_samples"], found["features"]) == (300, "colours")


def test_the_distance_is_the_frechet_distance_of_the_features():
    x, y = images(300, 0), images(400, 1, 0.3)
    found = evaluation.measure(x, y, FEATURES)["frechet_inception_distance"]
    assert found == pytest.approx(frechet_distance(x.mean((2, 3)), y.mean((2, 3))), rel=1e-5)
    assert found == pytest.approx(3 * 0.3**2, rel=0.2)


def test_precision_and_recall_tell_apart_what_is_false_from_what_is_missing():
    both = torch.cat([images(200, 0), images(200, 1, 5.0)])
    half = evaluation.measure(images(200, 2), both, FEATURES)
    assert half["precision"] > 0.9 and 0.4 < half["recall"] < 0.6
    more = evaluation.measure(both, images(200, 2), FEATURES)
    assert 0.4 < more["precision"] < 0.6 and more["recall"] > 0.9


def test_features_without_logits_give_no_score():
    plain = evaluation.Features(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "plain")
    found = evaluation.measure(images(50, 0), images(50, 1), plain)
    assert "inception_score_mean" not in found and "frechet_inception_distance" in found


def figures(n, distance, score):
    return {"num_samples": n, "frechet_inception_distance": distance, "inception_score_mean": score}


def test_few_images_and_a_score_that_parts_from_the_distance_are_told():
    assert evaluation.warnings_of(figures(10_000, 5.0, 8.0), figures(10_000, 6.0, 7.0)) == []
    assert "900 images" in evaluation.warnings_of(figures(900, 5.0, 8.0), None)[0]
    (told,) = evaluation.warnings_of(figures(10_000, 7.0, 8.0), figures(10_000, 6.0, 7.0))
    assert "part ways" in told and "over-refined" in told


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="wanted one size"):
        evaluation.measure(images(5, 0), torch.zeros(5, 3, 4, 4), FEATURES)
    with pytest.raises(InputError, match="at least 2"):
        evaluation.measure(images(1, 0), images(5, 0), FEATURES)
    with pytest.raises(InputError, match="wanted package.module:callable"):
        evaluation.given_features("nosuchmodule:network")


def test_the_default_classifier_learns_its_classes_and_repeats_its_bits():
    labels = torch.arange(200) % 2
    x = torch.where(labels.view(-1, 1, 1, 1) > 0, 0.5, -0.5) + 0.1 * torch.randn(
        200, 1, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    state = torch.get_rng_state()
    one, other = (evaluation.trained_features(x, labels, steps=20) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    features, probabilities = one(x)
    assert float((probabilities.argmax(1) == labels).double().mean()) > 0.95
    assert torch.equal(features, other(x)[0]) and one.name == other.name


# --- images from files


def test_images_come_from_every_kind_of_file_alike(tmp_path):
    from PIL import Image
    from safetensors.numpy import save_file

    pixels = np.random.RandomState(0).randint(0, 256, (5, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=np.array([0, 1, 0, 1, 0]))
    np.save(tmp_path / "a.npy", pixels)
    save_file({"images": pixels}, tmp_path / "a.safetensors")
    for row, label in enumerate([0, 1, 0, 1, 0]):
        (tmp_path / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[row]).save(tmp_path / "folder" / str(label) / f"{row}.png")
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    for name in ("a.npz", "a.npy", "a.safetensors"):
        torch.testing.assert_close(pictures.load_images(tmp_path / name), expected)
    found, labels = pictures.load_labelled(tmp_path / "folder")
    torch.testing.assert_close(found, expected[[0, 2, 4, 1, 3]])
    assert labels.tolist() == [0, 0, 0, 1, 1] and pictures.load_labelled(tmp_path / "a.npz")[1].tolist() == [0, 1, 0, 1, 0]
    assert pictures.load_labelled(tmp_path / "a.npy")[1] is None


def test_what_holds_no_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.npz").write_bytes(b"no zip")
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.save(tmp_path / "range.npy", np.full((3, 4, 4, 3), 200.0))
    for name, reason in (("empty", "no pictures"), ("a.npz", "cannot be read"), ("flat.npy", r"shape \(3, 4\)"),
                         ("range.npy", "wanted uint8, or floats"), ("absent", "not there")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            pictures.load_images(tmp_path / name)


def test_the_command_prints_torch_fidelitys_names(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (60, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    arguments = ["evaluate", str(tmp_path / "a.npz"), "--real", "digits", "--limit", "60", "--features",
                 "tests.test_evaluation:grey", "--json"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "fastrefine", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = {"frechet_inception_distance", "kernel_inception_distance_mean", "kernel_inception_distance_std", "precision"}
    assert names <= set(found) and found["num_samples"] == 60 and found["features"] == "tests.test_evaluation:grey"
    assert "60 images" in done.stderr


def grey():
    """Features of the command's test."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
