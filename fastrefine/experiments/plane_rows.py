"""The table of [CS] Figures 3 and 4 on a mixture in the plane: one GAN at several checkpoints, every way to sample from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from fastrefine.experiments import gan
from fastrefine.experiments.cells import Cells
from fastrefine.experiments.mixtures import Mixture
from fastrefine.experiments.plane import LATENT_DIM, Fresh, Plane
from fastrefine.result import Result

Row = dict[str, Any]
REAL = 12345  # seeds the real samples that stop, score and calibrate: never those of a training
PART = 100_000  # refined proposals in memory at once


@dataclass(frozen=True)
class Recipe:
    """What the table of one mixture is made of.

    shaping_*: [CS] Alg. 2 with SGD, batches refined like the samples and left at a uniformly drawn step. step_size: of
    "ladam", in data space. chain_length: proposals of a chain of Metropolis-Hastings; one chain for each sample.
    """

    plane: Plane
    checkpoints: tuple[int, ...]
    shaping_iterations: int
    shaping_batch: int
    shaping_rate: float
    step_size: float
    max_steps: int = 50
    samples: int = 10_000
    chain_length: int = 20
    real: int = 10_000
    num_slots: int = 1000


class Table:
    """The rows of one recipe, mixture and training seed, each kept in ``cells`` when it is done."""

    def __init__(self, cells: Cells, recipe: Recipe, mixture: Mixture, seed: int):
        self.cells, self.recipe, self.mixture, self.seed = cells, recipe, mixture, seed
        self.real = mixture.draw(recipe.real, torch.Generator().manual_seed(REAL))

    def pairs(self) -> dict[int, gan.Pair]:
        """The GAN after each checkpoint."""
        return gan.checkpoints(
            self.cells, f"gan-{self.seed}", lambda: self.recipe.plane.trainer(self.mixture.draw, self.seed),
            self.recipe.checkpoints,
        )  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """Checkpoint by checkpoint."""
        for checkpoint, (g, d) in self.pairs().items():
            yield from self._of(checkpoint, g, d)

    def points(self, checkpoint: int, name: str) -> Tensor:
        """The samples (n, 2) of a row that was made."""
        return self.cells.tensors(self._key(checkpoint, name), dict)["samples"]

    def refiner(self, g: nn.Module, d: nn.Module, stop: str, max_steps: int | None = None) -> fr.Refiner:
        """stop: "arg-max", K steps for all and the best of them kept (the public code) | "median", the paper's own rule."""
        recipe = self.recipe
        return fr.Refiner(
            g, d, fr.Collaborative(recipe.step_size, optimizer="ladam"), at="output", prior=fr.Normal(LATENT_DIM),
            real=self.real, max_steps=recipe.max_steps if max_steps is None else max_steps, num_slots=recipe.num_slots,
            stop=fr.stopping.MedianOfReal() if stop == "median" else None, keep="last" if stop == "median" else "best",
        )  # fmt: skip

    def shaped(self, checkpoint: int, g: nn.Module, d: nn.Module) -> nn.Module:
        """D shaped for refinement."""
        recipe = self.recipe

        def shape() -> nn.Module:
            refiner = self.refiner(g, d, "arg-max")
            refiner.keep = "last"
            refiner.compile = recipe.shaping_iterations > 1000  # half a minute, won back
            fresh = Fresh(self.mixture.draw, recipe.shaping_batch, self.seed + 1)
            return fr.shape_discriminator(
                refiner, fresh, recipe.shaping_iterations, recipe.shaping_batch, recipe.shaping_rate, optimizer="sgd",
                seed=self.seed, progress=None,
            )  # fmt: skip

        _, empty = self.recipe.plane.networks(0)
        return self.cells.network(f"shaped-{self.seed}-{checkpoint}", empty, shape)

    def _of(self, checkpoint: int, g: nn.Module, d: nn.Module) -> Iterator[Row]:
        n, length = self.recipe.samples, self.recipe.chain_length
        raw = self.refiner(g, d, "median", max_steps=0)
        proposals = self._drawn(raw, n * length)
        yield self._row(checkpoint, "standard", lambda: (proposals()[0][:n], {}))
        yield self._row(checkpoint, "DRS", lambda: _rejected(*proposals(), n))
        yield self._row(checkpoint, "MH", lambda: self._chains(*proposals(), raw))
        yield self._row(checkpoint, "MH, calibrated", lambda: self._chains(*proposals(), raw, calibrated=True))
        yield self._row(checkpoint, "refine, unshaped", lambda: _told(self.refiner(g, d, "arg-max").sample(n, seed=self.seed)))
        better = self.shaped(checkpoint, g, d)
        for stop, suffix in (("arg-max", ""), ("median", ", median stop")):
            refiner = self.refiner(g, better, stop)
            refined = self._drawn(refiner, n * length)
            yield self._row(checkpoint, "refine" + suffix, lambda r=refiner: _told(r.sample(n, seed=self.seed)))  # type: ignore[misc]
            yield self._row(checkpoint, "collaborative" + suffix, lambda p=refined, r=refiner: self._chains(*p(), r))  # type: ignore[misc]
            yield self._row(
                checkpoint, f"collaborative, calibrated{suffix}",
                lambda p=refined, r=refiner: self._chains(*p(), r, calibrated=True),  # type: ignore[misc]
            )  # fmt: skip

    def _row(self, checkpoint: int, name: str, make: Any) -> Row:
        def row() -> Row:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fr.FastrefineWarning)  # the rows show what comes of it
                x, facts = make()
            self.cells.put(self._key(checkpoint, name), {"samples": x})
            measured = self.mixture.measure(x)
            return {"seed": self.seed, "checkpoint": checkpoint, "name": name, "samples": len(x), **measured, **facts}

        return self.cells.row(self._key(checkpoint, name), row)

    def _key(self, checkpoint: int, name: str) -> str:
        return f"{self.seed}-{checkpoint}-{name}"

    def _drawn(self, refiner: fr.Refiner, n: int) -> Any:
        """A function that gives (samples (n, 2), logits (n,)), drawn at the first call."""
        found: list[tuple[Tensor, Tensor]] = []

        def draw() -> tuple[Tensor, Tensor]:
            if not found:
                parts = list(refiner.stream(n, seed=self.seed, chunk=min(n, PART)))
                found.append((torch.cat([p.images for p in parts]), torch.cat([p.logits for p in parts])))
            return found[0]

        return draw

    def _chains(self, x: Tensor, logits: Tensor, refiner: fr.Refiner, calibrated: bool = False) -> tuple[Tensor, Row]:
        """One chain for each sample, from a real logit; calibrated: isotonic, on real samples and the chains' own proposals."""
        real = refiner.score(self.real)
        if calibrated:
            apply = fr.calibrate(real, logits[: len(real)])
            real, logits = apply(real), apply(logits)
        chosen = fr.metropolis_hastings(
            logits, self.recipe.chain_length, initial_logits=real, seed=self.seed, untrusted="allow"
        )
        return x[chosen.indices], {"acceptance": chosen.acceptance_rate, "moved": float(chosen.moved.double().mean())}


def _rejected(x: Tensor, logits: Tensor, n: int) -> tuple[Tensor, Row]:
    kept = fr.rejection_sample(logits, untrusted="allow")
    return x[kept[:n]], {"acceptance": len(kept) / len(x)}


def _told(out: Result) -> tuple[Tensor, Row]:
    return out.images, {"mean_steps": float(out.steps.double().mean()), "backend": out.report["backend"]}
