"""Pictures of samples: rows, captions, colours, ranges."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastrefine as fr
from fastrefine import pictures
from fastrefine.production import saved_pair


def test_colours_keep_their_channels_and_are_rounded_like_everywhere():
    x = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert pictures.levels(x).tolist() == [[[[0, 128, 255]]]]
    assert pictures.levels((x + 1) / 2, (0, 1)).tolist() == [[[[0, 128, 255]]]]
    assert pictures.coloured(pictures.levels(torch.ones(2, 1, 4, 4))).shape == (2, 4, 4, 3)


def test_red_is_brighter_blue_is_darker_and_white_is_unchanged():
    before, after = (np.array(values, np.uint8).reshape(1, 1, 3, 1) for values in ([100, 100, 200], [100, 240, 10]))
    assert pictures.difference(before, after)[0, 0].tolist() == [[255, 255, 255], [255, 0, 0], [0, 0, 255]]


def test_numbers_cannot_be_read_as_an_inequality():
    assert pictures.from_to(-1.0, 0.1) == "-1.0 to 0.1" and pictures.from_to(-0.04, 0.04) == "0.0 to 0.0"


@pytest.mark.parametrize(("values", "limits"), [((0.2, 1), (0, 1)), ((-0.1, 1), (-1, 1)), ((-3, 200), (-3, 200))])
def test_the_range_is_read_off_the_images(values, limits):
    assert pictures.likely_range(torch.tensor(values)) == limits


def refined():
    pair = saved_pair.load_pair("digits")
    made = fr.Refiner(pair.generator, pair.discriminator, fr.Collaborative(0.3), at="act2", prior=fr.Normal(32), max_steps=5)
    return made.sample(30, seed=0)


def test_a_grid_shows_the_first_samples_enlarged_before_and_after(tmp_path):
    out = refined()
    out.save_grid(tmp_path / "grid.png")
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    tops = [pictures.MARGIN + pictures.CAPTION + row * (pictures.SIDE + pictures.GAP) for row in range(3)]
    left, inside = pictures.MARGIN + pictures.LABEL, slice(4, None, 8)  # each pixel became 8 x 8
    levels = [pictures.levels(images[:16]) for images in (out.initial_images, out.images)]
    for top, shown in zip(tops, [*levels, pictures.difference(*levels)], strict=True):
        for i in (0, 15):
            at = left + i * (pictures.SIDE + pictures.GAP)
            tile = drawn[top : top + pictures.SIDE, at : at + pictures.SIDE][inside, inside]
            assert np.array_equal(tile, pictures.coloured(shown[i : i + 1])[0]), (top, i)


def test_rows_count_and_range_can_be_chosen_and_columns_are_broken_into_bands(tmp_path):
    out = refined()
    out.save_grid(tmp_path / "few.png", rows=("refined",), count=3)
    out.save_grid(tmp_path / "many.png", rows=("initial", "refined"), count=20, image_range=(-2, 2))
    few, many = (Image.open(tmp_path / name) for name in ("few.png", "many.png"))
    assert many.height > 2 * few.height and many.width < pictures.WIDTH + 200
    tile = np.asarray(many.convert("L"))[pictures.MARGIN + pictures.CAPTION :, pictures.MARGIN + pictures.LABEL :][2:62, 2:62]
    assert tile.max() < 200, "one in a range to two is not white"


def test_colour_pictures_and_large_ones_fit(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (3, 600, 300, 3), np.uint8)
    pictures.grid(tmp_path / "large.png", x, x[::-1], [], "Large")
    assert Image.open(tmp_path / "large.png").height < 3 * 256 + 200


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(dict(rows=("before",)), "wanted some of initial, refined"), (dict(count=0), "count"), (dict(rows=()), "rows are")],
)
def test_what_does_not_fit_is_named(tmp_path, wrong, words):
    out = refined()
    with pytest.raises(fr.InputError, match=words):
        out.save_grid(tmp_path / "grid.png", **wrong)
    with pytest.raises(fr.InputError, match=r"wanted e\.g\. grid\.png"):
        out.save_grid(tmp_path / "grid.nothing")
    with pytest.raises(fr.InputError, match="1 or 3, H, W"):
        fr.Refiner(torch.nn.Linear(4, 6), torch.nn.Linear(6, 1), fr.Collaborative(0.1), prior=fr.Normal(4)).sample(3).save_grid(
            tmp_path / "grid.png"
        )
