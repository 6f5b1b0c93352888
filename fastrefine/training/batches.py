"""Batches of real images from a tensor, an array, a Dataset or a loader; none draws from torch's random state itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.noise import Stream, uniform

MIN_HELD_OUT, HELD_OUT = 16, 1000  # images taken aside

Batch = tuple[Tensor, dict[str, Tensor]]  # images, and their labels and conditions by name


class RealBatches:
    """Batch k of the data is a pure function of (seed, k) for a tensor or a map-style Dataset; a loader is cycled.

    real: images (N, ...), a Dataset of images, (image, label) or (image, {name: input}), or an iterable of batches of these.
    labels, conditions: of the images of a tensor or Dataset, in place of its own. labelled: False leaves the data's own
    unread. size: how many images there are, those held out included; None for a loader. Labels are given on the CPU.
    """

    def __init__(
        self, real: Any, batch_size: int, seed: int, labels: Any = None, labelled: bool = True,
        conditions: Mapping[str, Tensor] | None = None,
    ):  # fmt: skip
        self.batch_size, self.seed, self._labelled = checks.count("batch_size", batch_size, 1), seed, labelled
        self._loader: Any = None
        self._iterator: Iterator[Any] | None = None
        self.size: int | None = None
        if isinstance(real, Tensor | np.ndarray):
            self._images: Any = checks.tensor("real", real)
        elif hasattr(real, "__getitem__") and hasattr(real, "__len__") and not isinstance(real, IterableDataset):
            self._images = real
        elif hasattr(real, "__iter__"):
            self._loader = real
        else:
            raise InputError(f"real is a {type(real).__name__}; wanted a tensor (N, ...), a Dataset or a loader")
        if self._loader is not None:
            if labels is not None or conditions:
                raise InputError(
                    "real_labels and real_conditions cannot be matched with a loader: let it give (images, labels) or "
                    "(images, {name: input}) instead"
                )
            return
        self.size = len(self._images)
        if self.size == 0:
            raise InputError("`real` is empty; wanted real images (N, ...)")
        self._inputs = _inputs(labels, self.size) | dict(conditions or {})

    def batch(self, index: int) -> Batch:
        """Images (batch_size, ...) and their inputs; a loader gives its own batch size."""
        if self._loader is not None:
            return self._from_loader()
        ids = torch.tensor([index])
        u = uniform(self.seed, ids, torch.zeros_like(ids), self.batch_size, Stream.BATCH)[0]
        return self.rows((u * len(self._images)).long().clamp(max=len(self._images) - 1))

    def rows(self, positions: Tensor) -> Batch:
        """Images and inputs at the given positions (tensor or Dataset only)."""
        inputs = {name: value[positions] for name, value in self._inputs.items()}
        if isinstance(self._images, Tensor):
            return self._images[positions], inputs
        items = [_parts(self._images[i]) for i in positions.tolist()]
        images = checks.tensor("real", _stacked("images", [image for image, _ in items]))
        if not inputs and self._labelled and items[0][1] is not None:
            own = [further if isinstance(further, Mapping) else {"labels": further} for _, further in items]
            inputs = _inputs({name: _stacked(name, [given[name] for given in own]) for name in own[0]}, len(items))
        return images, inputs

    def _from_loader(self) -> Batch:
        for _ in range(2):
            batch = self._rest_of_pass()
            if batch is not None:
                return batch
        raise InputError("the loader of real images gave no batch; it must be one that can be iterated again and again")

    def _rest_of_pass(self) -> Batch | None:
        """The next batch of the loader; None, once, at the end of each pass."""
        if self._iterator is None:
            self._iterator = iter(self._loader)
        item = next(self._iterator, None)
        if item is None:
            self._iterator = None
            return None
        images, further = _parts(item)
        x = checks.tensor("real", images)
        return x, _inputs(further, len(x)) if self._labelled else {}

    def hold_out(self, count: int | None = None) -> Batch:
        """Take ``count`` images aside, at most half of them: they never appear in a batch again.

        None: a tenth, at least 16 and at most 1,000. Of a loader these are its next batches, at most one pass and 1,000 images;
        they do appear again when it is cycled.
        """
        if count is None:
            count = HELD_OUT if self.size is None else min(HELD_OUT, max(MIN_HELD_OUT, self.size // 10))
        if self._loader is not None:
            taken = [self._from_loader()]
            while sum(len(x) for x, _ in taken) < count and (batch := self._rest_of_pass()) is not None:
                taken.append(batch)
            inputs = {name: torch.cat([given[name] for _, given in taken])[:count] for name in taken[0][1]}
            return torch.cat([x for x, _ in taken])[:count], inputs
        total = len(self._images)
        if total < 2:
            raise InputError("`real` holds one image, so that none can be held out; wanted two or more")
        ids = torch.arange(total)
        order = uniform(self.seed, ids, torch.zeros_like(ids), 1, Stream.BATCH)[:, 0].argsort()
        held, rest = order.tensor_split([max(1, min(count, total // 2))])
        batch = self.rows(held)
        self._images = self._images[rest] if isinstance(self._images, Tensor) else Subset(self._images, rest.tolist())
        self._inputs = {name: value[rest] for name, value in self._inputs.items()}
        return batch


def as_given(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs of a batch as the arguments ``labels`` and ``conditions`` of a Refiner's methods."""
    conditions = {name: value for name, value in inputs.items() if name != "labels"}
    return {"labels": inputs.get("labels"), "conditions": conditions or None}


def _parts(item: Any) -> tuple[Any, Any]:
    """(image, label or further inputs by name) of one item or batch, None where it has none."""
    if not isinstance(item, tuple | list):
        return item, None
    if not item:
        raise InputError("an item of `real` is empty; wanted an image or (image, label)")
    return item[0], item[1] if len(item) > 1 else None


def _stacked(what: str, values: list[Any]) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the {what} of `real` must be numbers or tensors of one shape: {error}") from error


def _inputs(given: Any, n: int) -> dict[str, Tensor]:
    """Labels, or labels and conditions by name, as inputs of n samples; none for None."""
    if not isinstance(given, Mapping):
        y = _labels(given, n)
        return {} if y is None else {"labels": y}
    found = {}
    for name, value in given.items():
        x = _labels(value, n) if name == "labels" else torch.as_tensor(value)
        if x is None or x.shape[:1] != (n,):
            raise InputError(f"{name!r} of `real` has {'none' if x is None else tuple(x.shape)}; wanted ({n}, ...)")
        found[name] = x
    return found


def _labels(value: Any, n: int) -> Tensor | None:
    """Labels on the CPU, (n,) or (n, C), that may take part in autograd; classes given as (n, 1) are flattened."""
    y = checks.labels(value, n)
    if y is None:
        return None
    y = y[:, 0] if y.shape[1:] == (1,) and not y.is_floating_point() else y
    return y.clone().cpu() if y.is_inference() else y.cpu()
