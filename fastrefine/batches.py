"""Batches of real images from a tensor, a Dataset or a loader, without touching torch's random state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks, ops
from fastrefine.errors import InputError
from fastrefine.ops.noise import Stream

Batch = tuple[Tensor, Tensor | None]


class RealBatches:
    """Batch k of the data is a pure function of (seed, k) for a tensor or a map-style Dataset; a loader is cycled.

    real: images (N, ...), a Dataset of images or (image, label), or an iterable of batches of either.
    """

    def __init__(self, real: Any, batch_size: int, seed: int, labels: Any = None):
        self.batch_size, self.seed = checks.count("batch_size", batch_size, 1), seed
        self._loader: Any = None
        self._iterator: Iterator[Any] | None = None
        if isinstance(real, Tensor):
            self._images: Any = checks.tensor("real", real)
            self._labels = checks.labels(labels, len(real))
        elif hasattr(real, "__getitem__") and hasattr(real, "__len__"):
            self._images, self._labels = real, None
        elif hasattr(real, "__iter__"):
            self._loader = real
        else:
            raise InputError(f"real is a {type(real).__name__}; wanted a tensor (N, ...), a Dataset or a loader")
        if self._loader is None and len(self._images) == 0:
            raise InputError("`real` is empty; wanted real images (N, ...)")

    def batch(self, index: int) -> Batch:
        """Images (batch_size, ...) and their labels or None; a loader gives its own batch size."""
        if self._loader is not None:
            return self._from_loader()
        ids = torch.tensor([index])
        u = ops.uniform(self.seed, ids, torch.zeros_like(ids), self.batch_size, Stream.BATCH)[0]
        return self.rows((u * len(self._images)).long().clamp(max=len(self._images) - 1))

    def rows(self, positions: Tensor) -> Batch:
        """Images and labels at the given positions (tensor or Dataset only)."""
        if isinstance(self._images, Tensor):
            return self._images[positions], None if self._labels is None else self._labels[positions]
        items = [self._images[i] for i in positions.tolist()]
        if isinstance(items[0], tuple | list):
            images = torch.stack([torch.as_tensor(item[0]) for item in items])
            return checks.tensor("real", images), checks.labels([int(item[1]) for item in items], len(items))
        return checks.tensor("real", torch.stack([torch.as_tensor(item) for item in items])), None

    def _from_loader(self) -> Batch:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._loader)
            item = next(self._iterator, None)
            if item is not None:
                images, labels = (item[0], item[1]) if isinstance(item, tuple | list) else (item, None)
                x = checks.tensor("real", images)
                return x, checks.labels(labels, len(x))
            self._iterator = None
        raise InputError("the loader of real images gave no batch")

    def hold_out(self, count: int) -> Batch:
        """Take ``count`` images aside: they never appear in a batch again (a loader gives its next batches)."""
        if self._loader is not None:
            taken = [self._from_loader()]
            while sum(len(x) for x, _ in taken) < count:
                taken.append(self._from_loader())
            labels = None if taken[0][1] is None else torch.cat([y for _, y in taken if y is not None])[:count]
            return torch.cat([x for x, _ in taken])[:count], labels
        total = len(self._images)
        count = max(1, min(count, total // 2))
        ids = torch.arange(total)
        order = ops.uniform(self.seed, ids, torch.zeros_like(ids), 1, Stream.BATCH)[:, 0].argsort()
        held = self.rows(order[:count])
        rest = order[count:]
        if isinstance(self._images, Tensor):
            self._images, self._labels = self._images[rest], None if self._labels is None else self._labels[rest]
        else:
            self._images = torch.utils.data.Subset(self._images, rest.tolist())
        return held
