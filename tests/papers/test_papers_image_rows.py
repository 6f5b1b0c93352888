"""The image protocol: what a row is of, what rows share, and that none is made twice."""

import math
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
from fastrefine.metrics import frechet_distance
from fastrefine.models.digits import Classifier

RECIPE = Recipe(samples=60, chain_length=3, reference=20, num_slots=20)
PRIOR = fr.Normal(3)
REFINED = Way("refined", fr.Collaborative(5.0), at="0", max_steps=3)
RAW = Way("standard")


def classifier():
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh()), 3, 2)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DATA = Images(random(0, 50, 1, 2, 2), random(1, 80, 1, 2, 2), torch.arange(50) % 2, torch.arange(80) % 2)
GENERATOR = build(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Unflatten(1, (1, 2, 2))), 1).eval()
DISCRIMINATOR = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), 2).eval()
OTHER = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), 3).eval()


@pytest.fixture
def table(tmp_path):
    return ImageTable(Cells(tmp_path, RECIPE), RECIPE, 4, Judge(build(classifier, 0), DATA), PRIOR, DATA.train)


@pytest.fixture
def seen(table, monkeypatch):
    """All images of each row, in the order in which the rows were made."""
    found, judge = [], table.judge
    monkeypatch.setattr(table, "judge", lambda images, small: found.append(images) or judge(images, small))
    return found


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


# --- the judge


def test_the_judge_finds_no_distance_between_the_held_out_images_and_themselves():
    judge = Judge(build(classifier, 0), DATA)
    assert judge(DATA.test)["frechet_distance"] == pytest.approx(0, abs=1e-9) and judge(DATA.train)["frechet_distance"] > 1e-3


def test_the_judge_tells_the_figures_of_the_first_images_too():
    judge = Judge(build(classifier, 0), DATA)
    found, few = judge(DATA.train, 30), judge(DATA.train[:30])
    assert found["frechet_distance_30"] == few["frechet_distance"] != found["frechet_distance"]
    assert found["classifier_score_30"] == few["classifier_score"] != found["classifier_score"]


def test_the_judges_distance_is_of_the_penultimate_features():
    net = build(classifier, 0)
    features = [net.features(x).detach() for x in (DATA.train, DATA.test)]
    assert Judge(net, DATA)(DATA.train)["frechet_distance"] == pytest.approx(frechet_distance(*features))


def test_a_selection_that_leaves_nothing_has_the_worst_figures():
    judge = Judge(build(classifier, 0), DATA)
    for images in (DATA.train[:0], DATA.train[:1]):
        found = judge(images, 30)
        assert [found["frechet_distance"], found["frechet_distance_30"]] == [math.inf] * 2 and found["classifier_score"] == 1


def test_a_classifier_is_trained_once_and_read_afterwards(tmp_path):
    first = trained_judge(Cells(tmp_path, RECIPE), classifier, DATA, seed=1, steps=5)
    again = trained_judge(Cells(tmp_path, RECIPE), classifier, DATA, seed=1, steps=500)  # would be another one
    assert torch.equal(first.reference, again.reference)
    assert not torch.equal(first.reference, Judge(build(classifier, 1), DATA).reference)


# --- rows


def test_the_standard_row_is_of_the_generators_own_samples(table, seen):
    (row,) = rows(table, RAW)
    torch.testing.assert_close(seen[0], proposals(60))
    assert (row["seed"], row["checkpoint"], row["name"], row["samples"], row["mean_steps"]) == (4, 7, "standard", 60, 0)


def test_a_row_is_made_once(table, seen):
    first = rows(table, RAW, REFINED)
    assert rows(table, RAW, REFINED, generator=None, shaped=None) == first and len(seen) == 2


def test_rows_of_other_networks_have_cells_of_their_own(table, seen):
    a, b = (rows(table, REFINED, facts={"checkpoint": k}, discriminator=d)[0] for k, d in ((1, DISCRIMINATOR), (2, OTHER)))
    assert not torch.equal(*seen) and a["frechet_distance"] != b["frechet_distance"]


def test_refined_rows_say_how_the_logit_rose_and_in_how_many_steps(table):
    (row,) = rows(table, REFINED)
    assert row["mean_steps"] == 3 and row["logit_after"] > row["logit_before"] + 0.01


def test_the_shaped_discriminator_is_made_only_where_a_row_wants_it(table, seen):
    calls = []
    ways = RAW, REFINED, replace(REFINED, name="shaped", shaped=True)
    for _ in range(2):
        rows(table, *ways, shaped=lambda: calls.append(1) or OTHER)
    assert len(calls) == 1 and not torch.equal(seen[1], seen[2])


def test_a_way_may_have_fewer_samples(table, seen):
    rows(table, REFINED, replace(REFINED, name="few", samples=10))
    assert len(seen[1]) == 10 and torch.equal(seen[0][:10], seen[1])


def test_the_first_images_of_a_row_are_kept(table, seen):
    rows(table, REFINED)
    assert torch.equal(table.images({"checkpoint": 7}, "refined"), seen[0][:16])


# --- selection


def test_a_chain_over_refined_samples_gives_one_of_its_own_proposals(table, seen):
    _, row = rows(table, REFINED, replace(REFINED, name="collaborative", select="mh"))
    refined, chosen = seen
    assert row["samples"] == len(chosen) == 20 and 0 < row["acceptance"] <= 1
    assert torch.equal(places(chosen, refined) // 3, torch.arange(20))


def test_a_chain_over_raw_samples_gives_one_of_its_own_proposals(table, seen):
    (row,) = rows(table, Way("MH", select="mh"))
    assert row["samples"] == 60 and torch.equal(places(seen[0], proposals(180)) // 3, torch.arange(60))


def test_rejection_gives_what_it_accepts_and_is_not_filled_up(table, seen):
    (row,) = rows(table, Way("DRS", select="drs"))
    found = places(seen[0], proposals(180))
    assert 2 < len(found) == row["samples"] < 60 and found.unique(sorted=True).equal(found)
    assert row["acceptance"] == len(found) / 180


def test_selected_samples_have_higher_logits(table):
    standard, drs, mh = rows(table, RAW, Way("DRS", select="drs"), Way("MH", select="mh"))
    assert min(drs["logit_after"], mh["logit_after"]) > standard["logit_after"]


def test_a_row_and_the_one_that_selects_from_it_are_drawn_together(table, monkeypatch):
    drawn, sample = [], table._refined
    monkeypatch.setattr(table, "_refined", lambda way, refiner: drawn.append(way.name) or sample(way, refiner))
    rows(table, REFINED, replace(REFINED, name="collaborative", select="mh"))
    assert drawn == ["refined"]


def test_a_selecting_row_is_the_same_whether_or_not_the_other_was_made_before(tmp_path, table):
    way = replace(REFINED, name="collaborative", select="mh")
    _, together = rows(table, REFINED, way)
    alone = ImageTable(Cells(tmp_path / "alone", RECIPE), RECIPE, 4, table.judge, PRIOR, DATA.train)
    (found,) = rows(alone, way)
    for row in (found, together):
        del row["images_per_second"]
    assert found == together
