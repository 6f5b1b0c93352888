"""What was trained once is read from the cache; a cache that is broken, or cannot be written, costs time only."""

import pytest
import torch

from fastrefine.production import cache, evaluation


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastrefine"


@pytest.fixture
def trained(monkeypatch):
    """How often a classifier was trained."""
    seen, train = [], evaluation.train_classifier
    monkeypatch.setattr(evaluation, "train_classifier", lambda *a, **k: seen.append(1) or train(*a, **k))
    return seen


LABELS = torch.arange(40) % 2
IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def features(images=IMAGES, labels=LABELS, **settings):
    return evaluation.trained_features(images, labels, **{"steps": 3, **settings})


def test_the_same_classifier_is_trained_once(folder, trained):
    first, state = features(), torch.get_rng_state()
    again = features()
    assert len(trained) == 1 and again.name == first.name and torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first(IMAGES), again(IMAGES)))
    (file,) = folder.iterdir()
    assert file.suffix == ".safetensors" and first.name.split("-")[0] == file.name.split("-")[0] == "classifier"


@pytest.mark.parametrize("other", [
    {"images": IMAGES.flip(0)}, {"labels": 1 - LABELS}, {"steps": 4}, {"seed": 1}, {"images": IMAGES.view(40, 1, 4, 16)},
])  # fmt: skip
def test_other_images_or_settings_are_trained_anew(folder, trained, other):
    features()
    features(**other)
    assert len(trained) == 2 and len(list(folder.iterdir())) == 2


def test_another_recipe_is_trained_anew(folder, trained, monkeypatch):
    features()
    monkeypatch.setattr(evaluation, "RECIPE", evaluation.RECIPE + 1)
    features()
    assert len(trained) == 2


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_a_broken_file_is_replaced(folder, trained, content):
    first = features()
    (file,) = folder.iterdir()
    if content is None:  # of another network
        cache.save(torch.nn.Linear(2, 2), file.stem)
    else:
        file.write_bytes(content)
    again = features()
    assert len(trained) == 2 and all(map(torch.equal, first(IMAGES), again(IMAGES)))
    features()
    assert len(trained) == 2


def test_a_folder_that_cannot_be_made_costs_time_only(tmp_path, monkeypatch, trained):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    features()
    features()
    assert len(trained) == 2


def test_the_figures_tell_their_progress(monkeypatch):
    bars = []
    real_to = evaluation.ProgressBar.to

    def to(self, done):
        if self.name == "figures of the images":
            bars.append((done, self.total))
        real_to(self, done)

    monkeypatch.setattr(evaluation.ProgressBar, "to", to)
    pixels = evaluation.Features(lambda x: x.flatten(1), "pixels")
    evaluation.measure(IMAGES[:30], IMAGES[5:], pixels, resamples=4)
    total = 4 + evaluation.SUBSETS + 4  # two sets of one block, each read twice
    assert bars == [(i + 1, total) for i in range(total)]


def test_features_of_the_very_images_that_judge_are_told():
    learned = evaluation.replace(features(), learned_on="held-out")
    (said,) = evaluation.learned_on_them(learned, "held-out")
    assert "no --train was given" in said and "other labelled images as --train" in said
    assert evaluation.learned_on_them(learned, "others") == []
    assert evaluation.learned_on_them(evaluation.Features(lambda x: x, "given"), "held-out") == []
    (said,) = evaluation.learned_on_them(evaluation.replace(learned, learned_on="digits"), "digits")
    assert "held-out images as --real, digits:test" in said


def test_the_command_tells_on_what_the_features_were_learned(tmp_path, monkeypatch):
    import numpy as np

    from tests.support.commands import fastrefine, told

    monkeypatch.setattr(evaluation.trained_features, "__defaults__", (3, 0))
    pixels = ((IMAGES + 1) * 127.5).byte().numpy().transpose(0, 2, 3, 1)
    np.savez(tmp_path / "a.npz", pixels, LABELS.numpy())
    np.savez(tmp_path / "b.npz", pixels[::-1], LABELS.numpy())
    said = told(fastrefine("evaluate", tmp_path / "a.npz", "--real", tmp_path / "b.npz"))
    assert "warning: the features were learned from the images of --real itself" in said
    said = told(fastrefine("evaluate", tmp_path / "a.npz", "--real", tmp_path / "b.npz", "--train", tmp_path / "a.npz"))
    assert "learned from the images of --real" not in said
