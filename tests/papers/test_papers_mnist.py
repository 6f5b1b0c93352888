"""The MNIST experiment: networks, training, the claims' verdicts on known rows, and a quick run of all of it."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("matplotlib")
import fastrefine as fr
from benchmarks.papers import image_networks, infogan, mnist
from benchmarks.papers.cells import Cells
from benchmarks.papers.mnist_rows import AT, Mnist, add_faint
from fastrefine.datasets import Images, load_digits
from fastrefine.demo import gan

BETTER = {"frechet_distance": 5.0, "classifier_score": 8.0}
WORSE = {"frechet_distance": 10.0, "classifier_score": 7.0}


# --- networks and training


def test_the_networks_are_the_published_ones():
    g, d = infogan.infogan_generator(), infogan.infogan_discriminator()
    with torch.no_grad():
        shapes = {layer.name: layer.shape for layer in fr.layers(g, torch.zeros(2, 62))}
        images = g.eval()(torch.zeros(2, 62))
        assert images.shape == (2, 1, 28, 28) and d(images).shape == (2, 1) and float(images.abs().max()) <= 1
    assert shapes["act1"] == (1024,) and shapes[AT] == (128, 7, 7) and shapes["act14"] == (64, 14, 14)
    assert set(mnist.FULL.layers) <= set(shapes)
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in d), "its statistics would not rank samples"


def test_weights_start_from_a_normal_law_of_width_02_and_biases_from_0():
    for layer in infogan.infogan_discriminator():
        if isinstance(layer, gan.WEIGHTED):
            n = layer.weight.numel()
            assert abs(float(layer.weight.detach().std()) / 0.02 - 1) < 4 / math.sqrt(2 * n) and not layer.bias.any()


def trainer(bfloat16, seed=0):
    training = replace(image_networks.INFO_TRAINING, batch_size=8, bfloat16=bfloat16)
    real = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return image_networks.info_trainer(real, seed, training, width=2, hidden=8)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_only_between_the_outer_layers_is_training_in_bfloat16(bfloat16):
    one, seen = trainer(bfloat16), {}
    for network in (one.generator, one.discriminator):
        for name, layer in network.named_children():
            layer.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.dtype))
    assert list(one.advance(1)) == [1]
    inner = torch.bfloat16 if bfloat16 else torch.float32
    assert {seen[name] for name in ("fc2", "up14", "conv7", "fc")} == {inner}
    assert {seen[name] for name in ("fc1", "up28", "tanh", "conv14", "logit")} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in one.generator.parameters())


def test_training_repeats_its_bits_and_differs_by_seed():
    def trained(seed):
        one = trainer(True, seed)
        list(one.advance(3))
        return torch.cat([p.detach().flatten() for p in one.generator.parameters()])

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


# --- data


def test_noise_is_nine_tenths_of_the_image_and_three_of_the_faint_one_clipped():
    x, faint = torch.tensor([-1.0, -1.0, 0.5, 1.0, 1.0]), torch.tensor([-1.0, 1.0, 0.5, -1.0, 1.0])
    torch.testing.assert_close(add_faint(x, faint), torch.tensor([-1.0, -0.6, 0.6, 0.6, 1.0]))


def test_digits_are_enlarged_within_the_range_and_keep_their_labels():
    small, data = load_digits(), mnist.enlarged(load_digits())
    assert data.train.shape == (1400, 1, 28, 28) and data.test.shape[1:] == (1, 28, 28)
    assert float(data.train.min()) == -1 and float(data.train.max()) == 1
    assert torch.equal(data.test_labels, small.test_labels)
    back = torch.nn.functional.interpolate(data.test, size=8, mode="area")
    assert float(torch.corrcoef(torch.stack([back.flatten(), small.test.flatten()]))[0, 1]) > 0.95


def test_a_quick_run_takes_the_first_images_with_their_labels():
    data = mnist.fewer(Images(*(torch.arange(9) for _ in range(4))), 5)
    assert all(torch.equal(part, torch.arange(5)) for part in data)


# --- the ways


def test_fixed_steps_are_the_published_ones_of_their_checkpoint():
    one = object.__new__(Mnist)
    one.recipe = mnist.FULL
    for checkpoint, size in ((200, 0.5), (1000, 0.3), (4200, 0.1)):
        own, shaped = one.fixed()[checkpoint]
        assert own.sampler == fr.Collaborative(size, optimizer="momentum", momentum=0.9) and own.at == "map7"
        assert (own.stop, own.keep, own.shaped, shaped.shaped) == ("none", "best", False, True)


def test_backtracking_rows_differ_in_the_discriminator_and_in_selection_alone():
    one = object.__new__(Mnist)
    one.recipe = mnist.FULL
    *raw, own, shaped, collaborative = one.backtracking()[1000]
    assert [way.name for way in raw] == ["standard", "DRS", "MH"] and all(way.sampler is None for way in raw)
    assert replace(own, name=shaped.name, shaped=True) == shaped and own.sampler.control == "backtracking"
    assert replace(shaped, name="collaborative", select="mh") == collaborative and own.stop == "median"


# --- verdicts


def rows(changed=(), checkpoint=1000, seeds=(0, 1)):
    """Rows in which every claim holds; changed: {(seed, part, name): figures}."""
    base = {
        "standard": WORSE, "DRS": WORSE, "MH": WORSE, "refine, unshaped": {"frechet_distance": 8.0, "classifier_score": 7.5},
        "refine, shaped": BETTER, "collaborative": {**BETTER, "samples": 2000},
        "refine, unshaped, fixed steps": {"frechet_distance": 8.0, "classifier_score": 7.5},
        "refine, shaped, fixed steps": BETTER,
    }  # fmt: skip
    noise = {"noisy": {"mse": 0.03}, "denoised, unshaped": {"mse": 0.02}, "denoised, shaped": {"mse": 0.01}}
    found = []
    for seed in seeds:
        for name, figures in base.items():
            row = {"seed": seed, "part": "table", "checkpoint": checkpoint, "name": name, "samples": 10_000, **figures}
            row |= {f"{key}_2000": row[key] for key in BETTER} | dict(changed).get((seed, "table", name), {})
            found.append(row)
        for iterations, distance in ((0, 8.0), (500, 5.0)):
            row = {"seed": seed, "part": "shaping", "iterations": iterations, "frechet_distance": distance}
            found.append(row | dict(changed).get((seed, "shaping", iterations), {}))
        for name, figures in noise.items():
            found.append(
                {"seed": seed, "part": "denoising", "name": name, **figures, **dict(changed).get((seed, "denoising", name), {})}
            )
    return found  # fmt: skip


def failed(changed):
    return [i for i, one in enumerate(mnist.claims(rows(changed))) if not one["holds"]]


def test_all_claims_hold_where_everything_is_better():
    assert failed({}) == [] and len(mnist.claims(rows())) == 7


@pytest.mark.parametrize(
    ("seed", "part", "name", "figures", "claims"),
    [
        (1, "table", "refine, shaped", {"frechet_distance": 10.5}, [0, 1]),
        (0, "table", "refine, shaped", {"classifier_score": 6.9}, [0]),
        (1, "table", "refine, unshaped", {"frechet_distance": 4.0}, [1]),
        (0, "table", "refine, shaped, fixed steps", {"frechet_distance_2000": 10.5}, [2, 3]),
        (0, "table", "refine, shaped, fixed steps", {"frechet_distance": 10.5}, []),  # of fewer samples: not compared
        (1, "table", "refine, shaped, fixed steps", {"classifier_score_2000": 6.9}, [2]),
        (0, "table", "MH", {"frechet_distance_2000": 4.9}, [4]),
        (1, "table", "DRS", {"frechet_distance_2000": 4.9}, [4]),
        (1, "table", "DRS", {"frechet_distance": 4.9}, []),
        (1, "shaping", 500, {"frechet_distance": 8.1}, [5]),
        (0, "denoising", "denoised, unshaped", {"mse": 0.005}, [6]),
        (0, "denoising", "noisy", {"mse": 0.005}, [6]),
    ],
)
def test_a_claim_fails_where_one_seed_contradicts_it(seed, part, name, figures, claims):
    assert failed({(seed, part, name): figures}) == claims


def test_changes_are_put_beside_the_published_changes():
    found = {(row["case"], row["metric"]): row for row in mnist.comparison(rows())}
    ratio = found["MNIST, checkpoint 1000: refine, shaped", "FD / FD of the generator"]
    assert ratio["ours"] == 0.5 and ratio["published"] == pytest.approx(0.705 / 6.07) and ratio["headline"]
    gain = found["MNIST, checkpoint 1000: refine, unshaped", "CS - CS of the generator"]
    assert gain["ours"] == pytest.approx(0.5) and gain["published"] == pytest.approx(8.98 - 8.13) and not gain["headline"]
    assert ("MNIST, checkpoint 1000: DRS", "FD / FD of the generator") in found
    assert ("MNIST, checkpoint 1000: DRS", "CS - CS of the generator") not in found  # not published
    assert not any(row["seeds"] for row in mnist.comparison(rows(checkpoint=150)))


@pytest.mark.parametrize("name", ["DRS", "refine, shaped, fixed steps"])
def test_rows_of_fewer_samples_are_compared_at_equal_numbers(name):
    found = {
        row["case"]: row["ours"]
        for row in mnist.comparison(rows({(s, "table", name): {"frechet_distance_2000": 7.0} for s in (0, 1)}))
        if row["metric"].startswith("FD")
    }
    assert found[f"MNIST, checkpoint 1000: {name}"] == pytest.approx(0.7)


def test_published_figures_are_those_of_the_checkpoints_that_are_run():
    assert tuple(mnist.PUBLISHED) == mnist.FULL.checkpoints


# --- a quick run


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("mnist")


def test_a_quick_run_writes_rows_of_every_part_and_what_they_were_made_of(quick):
    _, record = quick
    assert list(dict.fromkeys(row["part"] for row in record["rows"])) == ["table", "shaping", "layers", "denoising"]
    assert record["reduced"] and record["reductions"] and record["recipe"]["checkpoints"] == [70]
    assert 0.9 < record["classifier_accuracy"]["0"] <= 1 and record["seeds"] == [0]


def test_a_quick_run_draws_its_pictures_in_grey(quick):
    outdir, _ = quick
    for name in ("early-late", "layers", "denoising"):
        picture = Image.open(outdir / f"{name}.png")
        assert picture.mode == "L" and picture.width > 900 and picture.getextrema() == (0, 255)
    for name in ("checkpoints", "shaping"):
        assert Image.open(outdir / f"{name}.png").width > 300


def test_shaping_starts_and_ends_with_the_tables_rows_at_as_many_samples(quick):
    _, record = quick
    table = {row["name"]: row for row in record["rows"] if row["part"] == "table"}
    first, last = [row for row in record["rows"] if row["part"] == "shaping"]
    assert (first["iterations"], last["iterations"]) == (0, 20)
    assert first["frechet_distance"] == table["refine, unshaped"]["frechet_distance_100"]
    assert last["classifier_score"] == table["refine, shaped"]["classifier_score_100"]


def test_denoising_is_measured_against_the_clean_images(quick):
    _, record = quick
    real, noisy, *denoised = [row for row in record["rows"] if row["part"] == "denoising"]
    assert real["mse"] == 0 < noisy["mse"] and all(row["mean_steps"] > 0 and row["mse"] > 0 for row in denoised)
    assert [row["samples"] for row in (real, noisy)] == [50, 50] and real["accuracy"] > 0.9


def test_a_stage_of_shaping_goes_on_from_the_one_before(quick, monkeypatch, tmp_path):
    outdir, _ = quick
    recipe = mnist.QUICK.but(shaping_stages=(1, 3))
    cells = Cells(tmp_path, recipe)
    for path in (outdir / "cells-quick").glob("*.safetensors"):
        if path.name.startswith(("gan", "classifier")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    one = Mnist(cells, recipe, 0, mnist.fewer(mnist.enlarged(load_digits()), 1000))
    first = one.shaped(70, 1)
    assert not cells.has("0-D-shaped-70-3")
    began, shape = [], fr.shape_discriminator

    def watched(refiner, real, iterations, *arguments, **options):
        began.append((refiner.discriminator, iterations))
        return shape(refiner, real, iterations, *arguments, **options)

    monkeypatch.setattr(fr, "shape_discriminator", watched)
    last = one.shaped(70, 3)
    (start, iterations), *others = began
    assert iterations == 2 and not others
    assert torch.equal(start[-1].weight, first[-1].weight) and not torch.equal(last[-1].weight, first[-1].weight)
