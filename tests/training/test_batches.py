"""Batches of real images: labels of every kind of data, and images held out."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastrefine as fr
from fastrefine.training.batches import RealBatches

X = torch.arange(20.0)[:, None]  # image i is the number i
CLASSES = torch.arange(20) % 3


class Items(torch.utils.data.Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(column[i] for column in self.columns)


@pytest.mark.parametrize("real", [TensorDataset(X), DataLoader(TensorDataset(X), 4)], ids=["dataset", "loader"])
def test_items_of_one_part_are_images_without_labels(real):
    images, inputs = RealBatches(real, 4, 0).batch(0)
    assert images.shape == (4, 1) and not inputs


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (CLASSES, CLASSES),
        (CLASSES.tolist(), CLASSES),
        (CLASSES[:, None].numpy(), CLASSES),  # one class as an array of one
        (torch.eye(3)[CLASSES], torch.eye(3)[CLASSES]),
    ],
)
def test_labels_of_a_dataset_are_classes_or_vectors(column, expected):
    for real in (Items(X, column), DataLoader(Items(X, column), 4)):
        images, inputs = RealBatches(real, 4, 0).batch(0)
        assert torch.equal(inputs["labels"], expected[images[:, 0].long()])


@pytest.mark.parametrize("real", [X, X.numpy(), Items(X), Items(X, CLASSES * 0)], ids=["tensor", "array", "images", "pairs"])
def test_given_labels_belong_to_the_images_also_after_some_are_held_out(real):
    batches = RealBatches(real, 8, 0, labels=np.asarray(CLASSES))
    for images, inputs in ((held := batches.hold_out(5)), batches.batch(3)):
        assert torch.equal(inputs["labels"], CLASSES[images[:, 0].long()])
    held = held[0]
    assert len(held) == 5 and batches.size == 20
    for k in range(20):
        assert not np.isin(batches.batch(k)[0].numpy(), held.numpy()).any()


def test_labels_that_cannot_be_used_are_named_and_those_not_wanted_are_not_read():
    with pytest.raises(fr.InputError, match="let it give"):
        RealBatches(DataLoader(TensorDataset(X), 4), 4, 0, labels=CLASSES)
    with pytest.raises(fr.InputError, match="got 3 labels"):
        RealBatches(Items(X), 4, 0, labels=CLASSES[:3])
    names = Items(X, ["a name"] * 20)
    with pytest.raises(fr.InputError, match="labels of `real`"):
        RealBatches(names, 4, 0).batch(0)
    assert RealBatches(names, 4, 0, labelled=False).batch(0)[1] == {}


def test_a_loader_holds_out_one_pass_at_most_and_one_image_none():
    loader = DataLoader(TensorDataset(X, CLASSES), 8)
    for count, expected in ((3, 3), (10, 10), (1000, 20)):
        held, inputs = RealBatches(loader, 8, 0).hold_out(count)
        assert torch.equal(held, X[:expected]) and torch.equal(inputs["labels"], CLASSES[:expected])
    with pytest.raises(fr.InputError, match="none can be held out"):
        RealBatches(X[:1], 8, 0).hold_out(10)
    batches = RealBatches(iter([X]), 8, 0)
    batches.hold_out(1000)
    with pytest.raises(fr.InputError, match="iterated again"):
        batches.batch(0)


def test_an_iterable_dataset_with_a_length_is_a_loader():
    class Stream(IterableDataset):
        def __len__(self):
            return 5

        def __iter__(self):
            return iter(X.split(4))

    assert torch.equal(RealBatches(Stream(), 4, 0).batch(0)[0], X[:4])


def test_data_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        x, y = X.clone(), CLASSES.clone()
    for real, labels in ((x, y), ([(x, y)], None)):
        images, found = RealBatches(real if labels is not None else iter(real), 4, 0, labels).batch(0)
        assert not images.is_inference() and not found["labels"].is_inference()


@pytest.mark.parametrize("kind", ["given", "dataset", "loader"])
def test_conditions_belong_to_their_images(kind):
    edges = 10 * X
    if kind == "given":
        batches = RealBatches(X, 4, 0, conditions={"edges": edges})
    else:
        items = [(x, {"labels": y, "edges": e}) for x, y, e in zip(X, CLASSES, edges, strict=True)]
        batches = RealBatches(items if kind == "dataset" else DataLoader(items, 4), 4, 0)  # type: ignore[arg-type]
    for images, inputs in (batches.batch(0), batches.hold_out(5), batches.batch(1)):
        assert torch.equal(inputs["edges"], 10 * images)
        assert kind == "given" or torch.equal(inputs["labels"], CLASSES[images[:, 0].long()])
    with pytest.raises(fr.InputError, match="real_conditions cannot be matched with a loader"):
        RealBatches(DataLoader(TensorDataset(X), 4), 4, 0, conditions={"edges": edges})
