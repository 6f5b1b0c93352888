"""Files in MNIST's format."""

import gzip
import struct

import numpy as np

from fastrefine.datasets import MNIST_FILES


def write_idx(path, array, cut=0):
    """A gzipped idx file of bytes, without its last ``cut`` ones."""
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


def write_mnist(folder, *, train, test, side=28):
    """A folder with the four files, of random pixels; train, test: the labels."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for part, labels in (("train", train), ("test", test)):
        write_idx(folder / MNIST_FILES[part], random.randint(0, 256, (len(labels), side, side)))
        write_idx(folder / MNIST_FILES[f"{part}_labels"], np.array(labels))
    return folder
