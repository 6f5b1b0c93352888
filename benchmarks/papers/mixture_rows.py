"""The table of [CS] Figures 3 and 4 on a mixture in the plane: one GAN at several checkpoints, every way to sample from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import training
from benchmarks.papers.cells import Cells
from benchmarks.papers.mixtures import Mixture
from benchmarks.papers.plane import LATENT_DIM, RING
from benchmarks.papers.recipe import Recipe
from benchmarks.papers.result_file import Row
from benchmarks.papers.table import Fresh, Made, Table
from fastrefine.demo.gan import Pair

Proposals = Callable[[], tuple[Tensor, Tensor]]  # samples (n, 2), logits (n,)
REAL = 12345  # seeds the real samples that stop, score and calibrate: never those of a training
PART = 100_000  # refined proposals in memory at once
# Of [CS] on the imbalanced ring. Shaping is by SGD, batches refined like the samples and left at a uniformly drawn step.
# step_size: of "ladam", in data space. One chain of Metropolis-Hastings for each sample.
PUBLISHED = Recipe(
    plane=RING, checkpoints=(1000, 3000, 5000, 7000, 9000), shaping_iterations=5000, shaping_batch=1000, shaping_rate=8e-3,
    step_size=0.1, max_steps=50, samples=10_000, chain_length=20, reference=10_000, num_slots=1000,
)  # fmt: skip


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


class MixtureTable(Table):
    """The rows of one recipe, mixture and training seed."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int, mixture: Mixture):
        super().__init__(cells, recipe, seed)
        self.mixture, self.real = mixture, mixture.draw(recipe.reference, torch.Generator().manual_seed(REAL))

    def pairs(self) -> dict[int, Pair]:
        """The GAN after each checkpoint."""
        plane, draw, seed = self.recipe.plane, self.mixture.draw, self.seed
        return training.checkpoints(self.cells, f"gan-{seed}", lambda: plane.trainer(draw, seed), self.recipe.checkpoints)

    def rows(self) -> Iterator[Row]:
        """Checkpoint by checkpoint."""
        for checkpoint, (g, d) in self.pairs().items():
            yield from self._of(checkpoint, g, d)

    def covered(self, checkpoint: int) -> Iterator[Row]:
        """A control: as ``rows`` refines at a checkpoint, but half of the proposals are the first checkpoint's generator's."""
        pairs = self.pairs()
        (early, _), (late, d) = pairs[min(pairs)], pairs[checkpoint]
        g = Halves(early, late)
        better = self.discriminator("shaped", checkpoint, g, d, ", covering")
        yield from self._refined(checkpoint, self.refiner(g, better, "arg-max"), ", covering proposals")

    def points(self, checkpoint: int, name: str) -> Tensor:
        """The samples (n, 2) of a row that was made."""
        return self.shown(checkpoint, name)["samples"]

    def refiner(self, g: nn.Module, d: nn.Module, stop: str, max_steps: int | None = None) -> fr.Refiner:
        """stop: "arg-max", K steps for all and the best of them kept (the public code) | "median", the paper's own rule."""
        recipe = self.recipe
        return fr.Refiner(
            g, d, fr.Collaborative(recipe.step_size, optimizer="ladam"), at="output", prior=fr.Normal(LATENT_DIM),
            real=self.real, max_steps=recipe.max_steps if max_steps is None else max_steps, num_slots=recipe.num_slots,
            stop=fr.stopping.MedianOfReal() if stop == "median" else None, keep="last" if stop == "median" else "best",
        )  # fmt: skip

    def discriminator(self, how: str, checkpoint: int, g: nn.Module, d: nn.Module, suffix: str = "") -> nn.Module:
        """D trained on: how = "shaped" on refined samples, "tuned" on raw ones; otherwise alike."""
        # half a minute of compiling, won back over thousands of iterations
        compiled = how == "shaped" and self.recipe.shaping_iterations > 1000
        refiner = self.refiner(g, d, "arg-max").replaced(keep="last", compile=compiled)
        fresh, (_, empty) = Fresh(self.mixture.draw, self.recipe.shaping_batch, self.seed + 1), self.recipe.plane.networks(0)
        return self.trained(f"{checkpoint}-D-{how}{suffix}", empty, refiner, fresh, how, optimizer="sgd")

    def _of(self, checkpoint: int, g: nn.Module, d: nn.Module) -> Iterator[Row]:
        n = self.recipe.samples
        for how, suffix in (("", ""), ("tuned", ", tuned D")):
            critic = self.discriminator(how, checkpoint, g, d) if how else d
            yield from self._selected(checkpoint, self.refiner(g, critic, "median", max_steps=0), suffix)
        yield self._row(checkpoint, "refine, unshaped", lambda: _told(self.refiner(g, d, "arg-max").sample(n, seed=self.seed)))
        better = self.discriminator("shaped", checkpoint, g, d)
        for stop, suffix in (("arg-max", ""), ("median", ", median stop")):
            yield from self._refined(checkpoint, self.refiner(g, better, stop), suffix)

    def _selected(self, checkpoint: int, raw: fr.Refiner, suffix: str) -> Iterator[Row]:
        n = self.recipe.samples
        proposals = self._drawn(raw)
        if not suffix:
            yield self._row(checkpoint, "standard", lambda: (proposals()[0][:n], {}))
        yield self._row(checkpoint, "DRS" + suffix, lambda: _rejected(*proposals(), n))
        yield self._row(checkpoint, "MH" + suffix, lambda: self._chains(proposals, raw))
        yield self._row(checkpoint, "MH, calibrated" + suffix, lambda: self._chains(proposals, raw, calibrated=True))

    def _refined(self, checkpoint: int, refiner: fr.Refiner, suffix: str) -> Iterator[Row]:
        proposals, chains = self._drawn(refiner), self._chains
        n, name = self.recipe.samples, "collaborative"
        yield self._row(checkpoint, f"refine{suffix}", lambda: _told(refiner.sample(n, seed=self.seed)))
        yield self._row(checkpoint, f"{name}{suffix}", lambda: chains(proposals, refiner))
        yield self._row(checkpoint, f"{name}, calibrated{suffix}", lambda: chains(proposals, refiner, calibrated=True))

    def _row(self, checkpoint: int, name: str, make: Callable[[], tuple[Tensor, Row]]) -> Row:
        def row() -> Made:
            x, facts = make()
            return {"samples": x}, {"samples": len(x), **self.mixture.measure(x), **facts}

        return self.kept({"checkpoint": checkpoint, "name": name}, row, first=None)

    def _drawn(self, refiner: fr.Refiner) -> Proposals:
        """A function that gives (samples (n, 2), logits (n,)) for all chains, drawn at the first call."""
        n, found = self.recipe.samples * self.recipe.chain_length, list[tuple[Tensor, Tensor]]()

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
        length = self.recipe.chain_length
        chosen = fr.metropolis_hastings(logits, length, initial_logits=real, seed=self.seed, untrusted="allow")
        return x[chosen.indices], {"acceptance": chosen.acceptance_rate, "moved": float(chosen.moved.double().mean())}


def _rejected(x: Tensor, logits: Tensor, n: int) -> tuple[Tensor, Row]:
    kept = fr.rejection_sample(logits, untrusted="allow")
    return x[kept[:n]], {"acceptance": len(kept) / len(x)}


def _told(out: fr.Result) -> tuple[Tensor, Row]:
    return out.images, {"mean_steps": float(out.steps.double().mean()), "backend": out.report["backend"]}
