"""Refined samples as a torch Dataset, for code that wants a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastrefine import checks
from fastrefine.errors import InputError

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner


class RefinedDataset(IterableDataset):
    """``refiner.dataset(n, seed)``: samples first_id ... first_id + n - 1 as they are made, in bounded memory.

    Each item is a dict: "image" (C, ...) tensor, "logit" () tensor, "id" int, and "label" where labels were given. With
    several DataLoader workers each makes every w-th chunk: together they give every sample once, in an order of chunks
    that depends on the number of workers; which sample has which id does not.
    """

    def __init__(self, refiner: Refiner, n: int, *, seed: int, first_id: int, labels: Any, chunk: int):
        checks.count("n", n, 0)
        self.refiner, self.n, self.seed, self.first_id = refiner, n, seed, first_id
        self.labels, self.chunk = checks.labels(labels, n), checks.count("chunk", chunk, 1)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None and self.refiner.device.type == "cuda" and torch.cuda._is_in_bad_fork():
            raise InputError(
                "a refiner on a GPU cannot be used in a forked process: DataLoader(..., num_workers=0), which is as fast on "
                'one GPU, or multiprocessing_context="spawn"'
            )
        if workers == 1:
            yield from self._items(0, self.n)
            return
        if info is not None and torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # the workers share the cores
        for start in range(worker * self.chunk, self.n, workers * self.chunk):
            yield from self._items(start, min(start + self.chunk, self.n))

    def _items(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        labels = None if self.labels is None else self.labels[start:stop]
        for part in self.refiner.stream(
            stop - start, first_id=self.first_id + start, seed=self.seed, chunk=self.chunk, labels=labels
        ):
            for row, number in enumerate(part.ids.tolist()):
                item = {"image": part.images[row], "logit": part.logits[row], "id": number}
                yield item if part.labels is None else {**item, "label": part.labels[row]}
