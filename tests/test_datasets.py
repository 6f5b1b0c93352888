"""Datasets: shapes, range, the fixed split, and what is said about broken files."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrefine.datasets import MNIST_FILES, is_mnist, load_digits, load_mnist
from fastrefine.errors import InputError
from tests.support.idx_files import write_idx

DATA = Path(os.environ.get("FASTREFINE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


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


def test_mnist_is_also_read_from_unpacked_files(folder):
    packed = load_mnist(folder)
    assert is_mnist(folder) and not is_mnist(folder.parent)
    for name in MNIST_FILES.values():
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress((folder / name).read_bytes()))
        (folder / name).unlink()
    assert is_mnist(folder)
    assert all(torch.equal(a, b) for a, b in zip(packed, load_mnist(folder), strict=True))


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
