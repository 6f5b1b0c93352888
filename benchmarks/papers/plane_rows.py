"""The table of [CS] Figures 3 and 4 on a mixture in the plane: one GAN at several checkpoints, every way to sample from it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import training
from benchmarks.papers.cells import Cells
from benchmarks.papers.mixtures import Mixture
from benchmarks.papers.plane import LATENT_DIM, Fresh, Plane
from fastrefine.demo import gan
from fastrefine.result import Result

Row = dict[str, Any]
Proposals = Callable[[], tuple[Tensor, Tensor]]  # samples (n, 2), logits (n,)
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


class Halves(nn.Module):
    """Two generators of latents N(0, I_2), (n, 2), each of half of the samples: of one half plane of the latents.

    A latent's angle is doubled first, so that each generator's latents have their own law.
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, z: Tensor) -> Tensor:
        """(n, 2)."""
        x, y = z.unbind(1)
        doubled = torch.stack([x * x - y * y, 2 * x * y], 1) / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return torch.where(y[:, None] > 0, self.first(doubled), self.second(doubled))


class Table:
    """The rows of one recipe, mixture and training seed, each kept in ``cells`` when it is done."""

    def __init__(self, cells: Cells, recipe: Recipe, mixture: Mixture, seed: int):
        self.cells, self.recipe, self.mixture, self.seed = cells, recipe, mixture, seed
        self.real = mixture.draw(recipe.real, torch.Generator().manual_seed(REAL))

    def pairs(self) -> dict[int, gan.Pair]:
        """The GAN after each checkpoint."""
        return training.checkpoints(
            self.cells, f"gan-{self.seed}", lambda: self.recipe.plane.trainer(self.mixture.draw, self.seed),
            self.recipe.checkpoints,
        )  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """Checkpoint by checkpoint."""
        for checkpoint, (g, d) in self.pairs().items():
            yield from self._of(checkpoint, g, d)

    def covered(self, checkpoint: int) -> Iterator[Row]:
        """A control: as ``rows`` refines at a checkpoint, but half of the proposals are the first checkpoint's generator's."""
        pairs = self.pairs()
        (early, _), (late, d) = pairs[min(pairs)], pairs[checkpoint]
        g = Halves(early, late)
        better = self.trained("shaped", checkpoint, g, d, ", covering")
        yield from self._refined(checkpoint, self.refiner(g, better, "arg-max"), ", covering proposals")

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

    def trained(self, how: str, checkpoint: int, g: nn.Module, d: nn.Module, suffix: str = "") -> nn.Module:
        """D trained on: how = "shaped" on refined samples, "tuned" on raw ones; otherwise alike."""
        recipe = self.recipe

        def train() -> nn.Module:
            # half a minute of compiling, won back over thousands of iterations
            compiled = how == "shaped" and recipe.shaping_iterations > 1000
            refiner = self.refiner(g, d, "arg-max").replaced(keep="last", compile=compiled)
            update = fr.shape_discriminator if how == "shaped" else fr.tune_discriminator
            fresh = Fresh(self.mixture.draw, recipe.shaping_batch, self.seed + 1)
            return update(
                refiner, fresh, recipe.shaping_iterations, recipe.shaping_batch, recipe.shaping_rate, optimizer="sgd",
                seed=self.seed, progress=None,
            )  # fmt: skip

        _, empty = self.recipe.plane.networks(0)
        return self.cells.network(f"{how}-{self.seed}-{checkpoint}{suffix}", empty, train)

    def _of(self, checkpoint: int, g: nn.Module, d: nn.Module) -> Iterator[Row]:
        n = self.recipe.samples
        for how, suffix in (("", ""), ("tuned", ", tuned D")):
            critic = self.trained(how, checkpoint, g, d) if how else d
            raw = self.refiner(g, critic, "median", max_steps=0)
            yield from self._selected(checkpoint, raw, suffix)
        yield self._row(checkpoint, "refine, unshaped", lambda: _told(self.refiner(g, d, "arg-max").sample(n, seed=self.seed)))
        better = self.trained("shaped", checkpoint, g, d)
        for stop, suffix in (("arg-max", ""), ("median", ", median stop")):
            yield from self._refined(checkpoint, self.refiner(g, better, stop), suffix)

    def _selected(self, checkpoint: int, raw: fr.Refiner, suffix: str) -> Iterator[Row]:
        n = self.recipe.samples
        proposals = self._drawn(raw, n * self.recipe.chain_length)
        if not suffix:
            yield self._row(checkpoint, "standard", lambda: (proposals()[0][:n], {}))
        yield self._row(checkpoint, "DRS" + suffix, lambda: _rejected(*proposals(), n))
        yield self._row(checkpoint, "MH" + suffix, lambda: self._chains(proposals, raw))
        yield self._row(checkpoint, "MH, calibrated" + suffix, lambda: self._chains(proposals, raw, calibrated=True))

    def _refined(self, checkpoint: int, refiner: fr.Refiner, suffix: str) -> Iterator[Row]:
        n, name = self.recipe.samples, "collaborative"
        proposals = self._drawn(refiner, n * self.recipe.chain_length)
        yield self._row(checkpoint, f"refine{suffix}", lambda: _told(refiner.sample(n, seed=self.seed)))
        yield self._row(checkpoint, f"{name}{suffix}", lambda: self._chains(proposals, refiner))
        yield self._row(
            checkpoint, f"{name}, calibrated{suffix}", lambda: self._chains(proposals, refiner, calibrated=True)
        )  # fmt: skip

    def _row(self, checkpoint: int, name: str, make: Callable[[], tuple[Tensor, Row]]) -> Row:
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

    def _drawn(self, refiner: fr.Refiner, n: int) -> Proposals:
        """A function that gives (samples (n, 2), logits (n,)), drawn at the first call."""
        found: list[tuple[Tensor, Tensor]] = []

        def draw() -> tuple[Tensor, Tensor]:
            if not found:
                parts = list(refiner.stream(n, seed=self.seed, chunk=min(n, PART)))
                found.append((torch.cat([p.images for p in parts]), torch.cat([p.logits for p in parts])))
            return found[0]

        return draw

    def _chains(self, proposals: Proposals, refiner: fr.Refiner, calibrated: bool = False) -> tuple[Tensor, Row]:
        """One chain for each sample, from a real logit; calibrated: isotonic, on real samples and the chains' own proposals."""
        (x, logits), real = proposals(), refiner.score(self.real)
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


def show(row: Row) -> None:
    """A row on stderr."""
    figures = "  ".join(f"{key} {row[key]:.4f}" for key in ("good", "kl", "js"))
    print(f"seed {row['seed']} {row['checkpoint']:>7}  {row['name']:<40}{figures}", file=sys.stderr, flush=True)


def reductions(recipe: Recipe, full: Recipe) -> list[str]:
    """In words: what of ``recipe`` is not the published ``full``."""
    return [
        f"{field.name.replace('_', ' ')}: {getattr(recipe, field.name)}, published {getattr(full, field.name)}"
        for field in fields(Recipe)
        if getattr(recipe, field.name) != getattr(full, field.name)
    ]
