"""Datasets: shapes, range, the fixed split, and what is said about broken files."""

import gzip
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrefine.datasets import MNIST_FILES, PictureFolder, load_cifar10, load_digits, load_mnist
from fastrefine.errors import InputError

DATA = Path(os.environ.get("FASTREFINE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write_idx(path: Path, array: np.ndarray, cut: int = 0) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in MNIST's format: 3 training and 2 test images of 2x2 pixels."""
    write_idx(tmp_path / MNIST_FILES["train"], np.arange(0, 12).reshape(3, 2, 2))
    write_idx(tmp_path / MNIST_FILES["train_labels"], np.array([5, 0, 4]))
    write_idx(tmp_path / MNIST_FILES["test"], np.array([[[0, 255], [51, 204]]] * 2))
    write_idx(tmp_path / MNIST_FILES["test_labels"], np.array([7, 2]))
    return tmp_path


def test_digits_have_their_shapes_range_and_every_class():
    data = load_digits()
    assert data.train.shape == (1400, 1, 8, 8)
    assert data.test.shape == (397, 1, 8, 8)
    assert data.train.dtype == data.test.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert data.train.min() == -1
    assert data.train.max() == 1
    assert data.test_labels.bincount(minlength=10).min() >= 25
    assert data.train_labels.bincount().numel() == 10


def test_digits_split_is_fixed_and_leaves_torch_randomness_alone():
    state = torch.get_rng_state()
    data = load_digits()
    assert torch.equal(state, torch.get_rng_state())
    assert data.train_labels[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert torch.equal(data.train, load_digits().train)


def test_mnist_reads_bytes_as_images_from_minus_one_to_one(folder):
    data = load_mnist(str(folder))
    assert data.train.shape == (3, 1, 2, 2)
    assert data.train.dtype == torch.float32
    assert torch.allclose(data.test[0, 0], torch.tensor([[-1, 1], [-0.6, 0.6]]))
    assert torch.allclose(data.train.flatten(), torch.arange(12) / 127.5 - 1)
    assert data.train_labels.tolist() == [5, 0, 4]
    assert data.test_labels.tolist() == [7, 2]


def test_mnist_names_the_files_that_are_absent(folder):
    (folder / MNIST_FILES["test"]).unlink()
    with pytest.raises(InputError, match="has no t10k-images"):
        load_mnist(folder)
    with pytest.raises(InputError, match="has no train-images"):
        load_mnist(folder / "nowhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>not found</html>", "gzip"),
        (gzip.compress(bytes(5000))[:-9], "gzip"),
        (gzip.compress(b""), "no idx file"),
        (gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x02" + bytes(8)), "no idx file"),
        (gzip.compress(b"\x00\x00\x08\x03\x00\x00"), "header"),
        (gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 3, 2, 2) + bytes(11)), "header says 3x2x2"),
        (gzip.compress(b"\x00\x00\x08\x01" + struct.pack(">I", 3) + bytes(3)), "wanted"),
    ],
    ids=["html", "cut short", "empty", "another type", "half a header", "a pixel missing", "labels for images"],
)
def test_mnist_names_the_file_that_is_broken(folder, content, words):
    path = folder / MNIST_FILES["train"]
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_mnist(folder)
    assert path.name in str(caught.value)


def test_mnist_wants_a_label_for_every_image(folder):
    write_idx(folder / MNIST_FILES["test_labels"], np.array([7]))
    with pytest.raises(InputError, match=r"t10k-images.* labels"):
        load_mnist(folder)


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason=f"no MNIST at {DATA}/mnist (set FASTREFINE_TEST_DATA)")
def test_the_real_mnist_is_read_in_its_original_order():
    data = load_mnist(DATA / "mnist")
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.test.shape == (10000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert float(data.train.mean()) == pytest.approx(2 * 0.1306604 - 1, abs=1e-5)
    assert data.train.min() == -1
    assert data.train.max() == 1


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
