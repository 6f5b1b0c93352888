"""What runs keep and take up again: cells, and the training of GANs in the plane."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from benchmarks.papers import plane
from benchmarks.papers.cells import Cells, checkpoints
from fastrefine.demo.gan import Trainer, Training
from fastrefine.errors import InputError


@dataclass(frozen=True)
class Recipe:
    size: int = 1


def never():
    raise AssertionError("made again")


# --- cells


def test_a_cell_is_made_once_and_read_afterwards(tmp_path):
    cells = Cells(tmp_path, Recipe())
    assert cells.row("a", lambda: {"good": 0.1}) == {"good": 0.1}
    assert Cells(tmp_path, Recipe()).row("a", never) == {"good": 0.1}
    kept = cells.tensors("x", lambda: {"x": torch.arange(3)})
    assert torch.equal(cells.tensors("x", never)["x"], kept["x"])
    network = cells.network("n", nn.Linear(2, 2), lambda: nn.Linear(2, 2))
    assert torch.equal(cells.network("n", nn.Linear(2, 2), never).weight, network.weight)


def test_a_cut_while_a_cell_is_made_leaves_no_cell(tmp_path):
    cells = Cells(tmp_path, Recipe())

    def cut():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.row("a", cut)
    assert cells.row("a", lambda: 2) == 2


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    Cells(tmp_path, Recipe())
    with pytest.raises(InputError, match="another recipe"):
        Cells(tmp_path, Recipe(2))


def test_keys_that_differ_only_in_signs_that_no_file_name_has_do_not_meet(tmp_path):
    cells = Cells(tmp_path, Recipe())
    assert [cells.row(key, lambda key=key: key) for key in ("a, b", "a- b", "a/ b")] == ["a, b", "a- b", "a/ b"]
    assert {json.loads(path.read_text()) for path in tmp_path.glob("a*.json")} == {"a, b", "a- b", "a/ b"}


# --- training

SMALL = plane.Plane((8, 8), True, Training(20, "sgd", (5e-3, 1e-2)))
PLANES = {
    "sgd": SMALL,
    "adam, no BatchNorm": plane.Plane((8, 8), False, Training(20, "adam", (1e-3, 1e-3), r1=0.1)),
    "bfloat16": replace(SMALL, training=replace(SMALL.training, bfloat16=True)),
}


def trainer(recipe, seed=0):
    return recipe.trainer(plane.IMBALANCED8.draw, seed)


def trained(recipe, steps, seed=0):
    """The pair after so many steps."""
    one = trainer(recipe, seed)
    assert list(one.advance(steps)) == list(range(1, steps + 1))
    return one.generator, one.discriminator


def weights(pair):
    return [tensor for net in pair for tensor in net.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("recipe", PLANES.values(), ids=PLANES)
def test_a_training_that_was_cut_ends_where_one_in_one_go_does(tmp_path, recipe):
    whole = trained(recipe, 9)
    first = trainer(recipe)
    for _ in first.advance(5):
        pass
    cells = Cells(tmp_path, Recipe())
    cells.put("gan-state", first.state())
    pairs = checkpoints(cells, "gan", lambda: trainer(recipe), (7, 9))
    assert same(pairs[9], whole) and not same(pairs[7], whole)
    assert not any(net.training for pair in pairs.values() for net in pair)


def test_checkpoints_are_the_beginnings_of_one_run_and_trained_once(tmp_path, monkeypatch):
    cells = Cells(tmp_path, Recipe())
    pairs = checkpoints(cells, "gan", lambda: trainer(SMALL), (3, 6))
    assert same(pairs[3], trained(SMALL, 3))
    monkeypatch.setattr(Trainer, "advance", lambda *_: never())
    assert same(checkpoints(cells, "gan", lambda: trainer(SMALL), (3, 6))[6], pairs[6])


def test_a_checkpoint_added_before_the_last_is_that_of_the_same_run(tmp_path):
    cells = Cells(tmp_path, Recipe())
    checkpoints(cells, "gan", lambda: trainer(SMALL), (6,))
    pairs = checkpoints(cells, "gan", lambda: trainer(SMALL), (4, 6))
    assert same(pairs[4], trained(SMALL, 4))


def test_training_follows_its_seed_and_leaves_torchs_random_state_alone():
    state = torch.get_rng_state()
    a, b, c = (trained(SMALL, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and same(a, b) and not same(a, c)


def test_bfloat16_changes_a_training_little(monkeypatch):
    one, other = (trained(PLANES[name], 3) for name in ("sgd", "bfloat16"))
    away = max(float((a.float() - b.float()).abs().max()) for a, b in zip(weights(one), weights(other), strict=True))
    assert 0 < away < 0.05


def test_one_update_descends_the_published_losses_by_plain_sgd():
    recipe = plane.Plane((8, 8), False, Training(20, "sgd", (0.02, 0.01)))
    g, d = recipe.networks(0)
    random = torch.Generator().manual_seed(0)
    real = plane.IMBALANCED8.draw(20, random)
    softplus = nn.functional.softplus
    fake = g(torch.randn(20, 2, generator=random)).detach()
    (softplus(-d(real)).mean() + softplus(d(fake)).mean()).backward()
    with torch.no_grad():
        for p in d.parameters():
            p -= 0.01 * p.grad
    softplus(-d(g(torch.randn(20, 2, generator=random)))).mean().backward()
    with torch.no_grad():
        for p in g.parameters():
            p -= 0.02 * p.grad
    for ours, expected in zip(weights(trained(recipe, 1)), weights((g, d)), strict=True):
        torch.testing.assert_close(ours, expected)
