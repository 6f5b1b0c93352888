"""Pictures of CIFAR-10 and of folders: shapes, order, labels, and what is said about broken files."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.papers.pictures import PictureFolder, load_cifar10
from fastrefine.errors import InputError

DATA = Path(os.environ.get("FASTREFINE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write_picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10's layout, two classes, 6 training and 2 test pictures: red is their number, blue their class."""
    for part, each in (("cifar10-train", 3), ("cifar10-test", 1)):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for label, name in enumerate(("bird", "cat")):
                for i in range(each):
                    path = tmp_path / part / name / f"{i:04d}.png"
                    write_picture(path, (i, 100, 255 * label))
                    archive.write(path, f"{name}/{i:04d}.png")
    return tmp_path


def test_cifar10_is_read_from_zips_with_labels_in_alphabetical_order(cifar):
    data = load_cifar10(str(cifar))
    assert data.train.shape == (6, 3, 32, 32) and data.test.shape == (2, 3, 32, 32)
    assert data.train.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    assert torch.allclose(data.train[:, 1], torch.tensor(100 / 127.5 - 1))
    assert torch.equal(data.train[:, 2, 0, 0], 2.0 * data.train_labels - 1)
    assert sorted(data.train_labels.tolist()) == [0, 0, 0, 1, 1, 1] != data.train_labels.tolist(), "classes are mixed"
    reds = ((data.train[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert sorted(zip(data.train_labels.tolist(), reds.tolist(), strict=True)) == [(c, i) for c in (0, 1) for i in range(3)]


def test_extracted_folders_give_what_the_zips_give(cifar):
    zipped = load_cifar10(cifar)
    for part in ("cifar10-train", "cifar10-test"):
        (cifar / f"{part}.zip").unlink()
    for one, other in zip(zipped, load_cifar10(cifar), strict=True):
        assert torch.equal(one, other)


def test_cifar10_names_what_is_absent_or_broken(cifar, tmp_path):
    with pytest.raises(InputError, match="neither cifar10-train.zip"):
        load_cifar10(tmp_path / "nowhere")
    archive = cifar / "cifar10-test.zip"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cifar10-test.zip cannot be read as a zip"):
        load_cifar10(cifar)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("cat/0000.jpg", b"<html>")
    with pytest.raises(InputError, match=r"cat/0000.jpg cannot be read as a picture"):
        load_cifar10(cifar)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("readme.txt", b"")
    with pytest.raises(InputError, match="no pictures"):
        load_cifar10(cifar)


def test_pictures_are_cropped_in_the_middle_and_scaled(tmp_path):
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste((255, 0, 0), (16, 0, 32, 16))
    wide.save(tmp_path / "wide.png")
    ((image, label),) = PictureFolder(tmp_path, 8)
    assert image.shape == (3, 8, 8) and label == 0
    assert (image[0] == 1).all() and (image[1:] == -1).all()


def test_grey_and_transparent_pictures_become_colour_pictures(tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 255)).save(tmp_path / "b.png")
    assert torch.equal(PictureFolder(tmp_path, 8).images([0, 1]), torch.ones(2, 3, 8, 8))


def test_subfolders_are_classes_and_pictures_outside_of_them_have_none(tmp_path):
    for name in ("b", "a", "c/deeper"):
        for i in range(3):
            write_picture(tmp_path / name / f"{i}.jpg", (0, 0, 0), (8, 8))
    found = PictureFolder(tmp_path, 8)
    assert found.classes == ["a", "b", "c"]
    assert all(
        path.relative_to(tmp_path).parts[0] == "abc"[label] for path, label in zip(found.paths, found.labels, strict=True)
    )
    write_picture(tmp_path / "loose.jpg", (0, 0, 0))
    assert PictureFolder(tmp_path, 8).classes == [] and PictureFolder(tmp_path, 8).labels.tolist() == [0] * 10


def test_the_order_of_a_folder_is_fixed_and_mixes_classes(tmp_path):
    for name in ("a", "b"):
        for i in range(10):
            write_picture(tmp_path / name / f"{i}.png", (i, 0, 0), (8, 8))
    first, again = PictureFolder(tmp_path, 8), PictureFolder(tmp_path, 8)
    assert first.paths == again.paths and first.paths != sorted(first.paths)
    assert 0 < first.labels[:10].sum() < 10


def test_a_folder_without_pictures_or_with_a_broken_one_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="no pictures"):
        PictureFolder(tmp_path, 8)
    (tmp_path / "two.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"two.png cannot be read"):
        PictureFolder(tmp_path, 8)[0]


@pytest.mark.skipif(not (DATA / "cifar10-test.zip").is_file(), reason=f"no CIFAR-10 at {DATA} (set FASTREFINE_TEST_DATA)")
def test_the_real_cifar10_pictures_are_read(tmp_path):
    for part in ("train", "test"):  # the test part twice: a fifth of the time
        (tmp_path / f"cifar10-{part}.zip").symlink_to(DATA / "cifar10-test.zip")
    data = load_cifar10(tmp_path)
    assert data.test.shape == (10_000, 3, 32, 32)
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.test.min() == -1 and data.test.max() == 1
    assert data.test[data.test_labels == 0, 2].mean() > 0.1 > data.test[data.test_labels == 6, 2].mean()  # sky, frogs
