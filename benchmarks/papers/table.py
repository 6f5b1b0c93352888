"""The rows of one seed, each kept when it is done, and the discriminators that are trained for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers.cells import Cells
from benchmarks.papers.recipe import Recipe
from benchmarks.papers.result_file import Row
from fastrefine.demo.gan import Draw

SHOWN = 16  # samples of a row that are kept for pictures: the first ids, not chosen ones
Made = tuple[Mapping[str, Tensor], Row]  # tensors to keep, figures


class Table:
    """Rows and discriminators of one recipe and seed, kept in ``cells``."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int):
        self.cells, self.recipe, self.seed = cells, recipe, seed

    def kept(self, facts: Row, make: Callable[[], Made], first: int | None = SHOWN) -> Row:
        """The row {seed, facts, figures}: from ``cells``, or made now; the ``first`` of its tensors are kept with it."""
        key = self._key(*facts.values())

        def cell() -> Row:
            tensors, figures = make()
            if tensors:
                self.cells.put(key, {name: tensor[:first] for name, tensor in tensors.items()})
            return {"seed": self.seed, **facts, **figures}

        return self.cells.row(key, cell)

    def shown(self, *facts: Any) -> dict[str, Tensor]:
        """The tensors that were kept with the row of these facts."""
        return self.cells.tensors(self._key(*facts), dict)

    def trained(
        self, key: str, empty: nn.Module, refiner: fr.Refiner, real: Any, how: str = "shaped", *, iterations: int | None = None,
        batch: int | None = None, rate: float | None = None, **options: Any,
    ) -> nn.Module:  # fmt: skip
        """The refiner's D, trained by the recipe: "shaped" on refined samples ([CS] Alg. 2), "tuned" on raw ones.

        empty: a network that its weights are loaded into. iterations, batch, rate: the recipe's unless given.
        """
        recipe = self.recipe
        number = recipe.shaping_iterations if iterations is None else iterations
        options = {"seed": self.seed, "progress": None, **options}

        def train() -> nn.Module:
            update = fr.shape_discriminator if how == "shaped" else fr.tune_discriminator
            return update(refiner, real, number, batch or recipe.shaping_batch, rate or recipe.shaping_rate, **options)

        return self.cells.network(self._key(key), empty, train)

    def _key(self, *facts: Any) -> str:
        return "-".join(map(str, (self.seed, *facts)))


class Fresh:
    """A loader of fresh real batches without end, the same ones each time it is begun."""

    def __init__(self, draw: Draw, batch_size: int, seed: int):
        self.draw, self.batch_size, self.seed = draw, batch_size, seed

    def __iter__(self) -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        while True:
            yield self.draw(self.batch_size, random)


def moved(out: fr.Result) -> Row:
    """How far samples went: mean_steps, and the mean logit before and after."""
    return {
        "mean_steps": float(out.steps.double().mean()), "logit_before": float(out.initial_logits.mean()),
        "logit_after": float(out.logits.mean()),
    }  # fmt: skip
