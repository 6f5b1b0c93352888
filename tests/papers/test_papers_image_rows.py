"""The image protocol: what a row is of, what rows share, and that none is made twice."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastrefine as fr
from benchmarks.papers.cells import Cells, trained_judge
from benchmarks.papers.image_rows import ImageTable, Way
from benchmarks.papers.run import Recipe
from fastrefine.datasets import Images
from fastrefine.demo.gan import build
from fastrefine.demo.judge import Judge
from fastrefine.models.digits import Classifier

RECIPE = Recipe(samples=60, chain_length=3, reference=20, num_slots=20)
PRIOR = fr.Normal(3)
REFINED = Way("refined", fr.Collaborative(5.0), at="0", max_steps=3)
COLLABORATIVE = replace(REFINED, name="collaborative", select="mh")
WAYS = (
    Way("standard"), Way("DRS", select="drs"), Way("MH", select="mh"), REFINED, COLLABORATIVE,
    replace(REFINED, name="shaped", shaped=True), replace(REFINED, name="few", samples=10),
)  # fmt: skip


def classifier():
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh()), 3, 2)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DATA = Images(random(0, 50, 1, 2, 2), random(1, 80, 1, 2, 2), torch.arange(50) % 2, torch.arange(80) % 2)
GENERATOR = build(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Unflatten(1, (1, 2, 2))), 1).eval()
DISCRIMINATOR = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), 2).eval()
OTHER = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), 3).eval()


def rows(table, *ways, facts=None, generator=GENERATOR, discriminator=DISCRIMINATOR, shaped=lambda: OTHER):
    return list(table.rows(facts or {"checkpoint": 7}, generator, discriminator, shaped, ways))


def proposals(n):
    with torch.no_grad():
        return GENERATOR(PRIOR.sample(torch.arange(n), 4))


def places(images, among):
    """For each image the position of the one that it is."""
    distance = torch.cdist(images.flatten(1), among.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.min(1).values.max()) < 1e-5
    return distance.argmin(1)


def test_a_classifier_is_trained_once_and_read_afterwards(tmp_path):
    first = trained_judge(Cells(tmp_path, RECIPE), classifier, DATA, seed=1, steps=5)
    again = trained_judge(Cells(tmp_path, RECIPE), classifier, DATA, seed=1, steps=500)  # would be another one
    assert torch.equal(first.reference, again.reference)
    assert not torch.equal(first.reference, Judge(build(classifier, 1), DATA).reference)


# --- rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(table, name -> row, name -> all images, how often the shaped D was made, names of what was drawn) of every way."""
    table = ImageTable(
        Cells(tmp_path_factory.mktemp("rows"), RECIPE), RECIPE, 4, Judge(build(classifier, 0), DATA), PRIOR, DATA.train
    )
    seen, shaped, drawn, judge, refined = [], [], [], table.judge, table._refined
    table.judge = lambda images, small: seen.append(images) or judge(images, small)
    table._refined = lambda way, refiner: drawn.append(way.name) or refined(way, refiner)
    found = rows(table, *WAYS, shaped=lambda: shaped.append(1) or OTHER)
    found += rows(table, REFINED, facts={"checkpoint": 8}, discriminator=OTHER)
    again = rows(table, *WAYS, generator=None, shaped=None)
    assert again == found[:-1] and len(seen) == len(found) == len(WAYS) + 1, "a row was made twice"
    names = [*(way.name for way in WAYS), "of other networks"]
    return table, dict(zip(names, found, strict=True)), dict(zip(names, seen, strict=True)), shaped, drawn


def test_the_standard_row_is_of_the_generators_own_samples(made):
    _, found, seen, _, _ = made
    torch.testing.assert_close(seen["standard"], proposals(60))
    row = found["standard"]
    assert (row["seed"], row["checkpoint"], row["name"], row["samples"], row["mean_steps"]) == (4, 7, "standard", 60, 0)


def test_rows_of_other_networks_have_cells_of_their_own(made):
    _, found, seen, _, _ = made
    assert not torch.equal(seen["refined"], seen["of other networks"])
    assert found["refined"]["frechet_distance"] != found["of other networks"]["frechet_distance"]


def test_refined_rows_say_how_the_logit_rose_and_in_how_many_steps(made):
    row = made[1]["refined"]
    assert row["mean_steps"] == 3 and row["logit_after"] > row["logit_before"] + 0.01


def test_the_shaped_discriminator_is_made_once_and_refines_otherwise(made):
    _, _, seen, shaped, _ = made
    assert len(shaped) == 1 and not torch.equal(seen["refined"], seen["shaped"])


def test_a_way_may_have_fewer_samples(made):
    _, _, seen, _, _ = made
    assert len(seen["few"]) == 10 and torch.equal(seen["refined"][:10], seen["few"])


def test_the_first_images_of_a_row_are_kept(made):
    table, _, seen, _, _ = made
    assert torch.equal(table.images({"checkpoint": 7}, "refined"), seen["refined"][:16])


# --- selection


def test_a_chain_over_refined_samples_gives_one_of_its_own_proposals(made):
    _, found, seen, _, _ = made
    row, chosen = found["collaborative"], seen["collaborative"]
    assert row["samples"] == len(chosen) == 20 and 0 < row["acceptance"] <= 1
    assert torch.equal(places(chosen, seen["refined"]) // 3, torch.arange(20))


def test_a_chain_over_raw_samples_gives_one_of_its_own_proposals(made):
    _, found, seen, _, _ = made
    assert found["MH"]["samples"] == 60 and torch.equal(places(seen["MH"], proposals(180)) // 3, torch.arange(60))


def test_rejection_gives_what_it_accepts_and_is_not_filled_up(made):
    row, found = made[1]["DRS"], places(made[2]["DRS"], proposals(180))
    assert 2 < len(found) == row["samples"] < 60 and found.unique(sorted=True).equal(found)
    assert row["acceptance"] == len(found) / 180


def test_selected_samples_have_higher_logits(made):
    standard, drs, mh = (made[1][name]["logit_after"] for name in ("standard", "DRS", "MH"))
    assert min(drs, mh) > standard


def test_a_row_and_the_one_that_selects_from_it_are_drawn_together(made):
    assert made[4] == ["standard", "refined", "shaped", "few", "refined"]


def test_a_selecting_row_is_the_same_whether_or_not_the_other_was_made_before(tmp_path, made):
    alone = ImageTable(Cells(tmp_path, RECIPE), RECIPE, 4, Judge(build(classifier, 0), DATA), PRIOR, DATA.train)
    (found,) = rows(alone, COLLABORATIVE)
    assert {**found, "images_per_second": 0} == {**made[1]["collaborative"], "images_per_second": 0}
