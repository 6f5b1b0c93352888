"""The rows of the MNIST experiment for one training seed: the table over checkpoints, shaping, layers, denoising."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import image_networks, infogan
from benchmarks.papers.cells import Cells, checkpoints, trained_judge
from benchmarks.papers.image_rows import ImageTable, Way
from benchmarks.papers.result_file import Row
from benchmarks.papers.run import SHOWN, Recipe, Table
from fastrefine.datasets import Images
from fastrefine.demo.gan import Pair, Trainer
from fastrefine.demo.judge import accuracy
from fastrefine.models import digits

AT = "map7"  # the 7x7x128 map that [CS] refines
PRIOR = fr.Uniform(infogan.LATENT_DIM)
FIXED = ", fixed steps"  # ends the names of the ways with fixed steps
FAINT = 1_000_000  # ids from here on: the latents of the faint images, which no other row has


class Mnist(Table):
    """All rows of one training seed."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int, data: Images):
        super().__init__(cells, recipe, seed)
        self.data = data
        self.judge = trained_judge(cells, digits.mnist_classifier, data, seed=seed, steps=recipe.classifier_steps)
        self.table = ImageTable(cells, recipe, seed, self.judge, PRIOR, data.train)
        few = recipe.but(samples=self.table.chains, chain_length=1)
        self.small = ImageTable(cells, few, seed, self.judge, PRIOR, data.train)
        self.pairs: dict[int, Pair] = checkpoints(cells, f"gan-{seed}", self._trainer, recipe.checkpoints)

    def rows(self) -> list[Row]:
        """The table in order of checkpoints, then the rest; what the claims need is made first."""
        table = []
        for ways in (self.backtracking(), self.fixed()):
            for checkpoint in self.recipe.checkpoints:
                g, d = self.pairs[checkpoint]
                shaped = self._shaper(checkpoint, max(self.recipe.shaping_stages))
                table += list(self.table.rows(self.facts(checkpoint), g, d, shaped, ways[checkpoint]))
        table.sort(key=lambda row: row["checkpoint"])
        return [*table, *self.shaping(table), *self.layers(), *self.denoising()]

    def facts(self, checkpoint: int) -> Row:
        """What the table's rows of a checkpoint have in common."""
        return {"part": "table", "checkpoint": checkpoint}

    def backtracking(self) -> dict[int, tuple[Way, ...]]:
        """Not refined, and refined with backtracking until the median real logit."""
        own = self._way("refine, unshaped")
        better = replace(own, name="refine, shaped", shaped=True)
        raw = Way("standard", at="output")
        ways = (
            raw, replace(raw, name="DRS", select="drs"), replace(raw, name="MH", select="mh"), own, better,
            replace(better, name="collaborative", select="mh"),
        )  # fmt: skip
        return dict.fromkeys(self.recipe.checkpoints, ways)

    def fixed(self) -> dict[int, tuple[Way, ...]]:
        """Refined as published: fixed steps with momentum, K for every sample, the best of which is kept."""
        found: dict[int, tuple[Way, ...]] = {}
        for checkpoint, size in zip(self.recipe.checkpoints, self.recipe.momentum_steps, strict=True):
            sampler = fr.Collaborative(size, optimizer="momentum", momentum=0.9)
            own = Way(
                "refine, unshaped" + FIXED, sampler, AT, self.recipe.max_steps, keep="best", samples=self.recipe.fixed_samples
            )
            found[checkpoint] = (own, replace(own, name="refine, shaped" + FIXED, shaped=True))
        return found

    def shaping(self, table: Sequence[Row]) -> Iterator[Row]:
        """[CS] Figure 10 at the checkpoint shown: D after fewer iterations, between the table's own rows of none and all."""
        g, d = self.pairs[self.recipe.shown]
        number = self.small.recipe.samples
        own, better = ({**row} for row in table if (row["checkpoint"], row["name"]) in
                       ((self.recipe.shown, "refine, unshaped"), (self.recipe.shown, "refine, shaped")))  # fmt: skip
        for row, iterations in ((own, 0), (better, max(self.recipe.shaping_stages))):
            row |= {"part": "shaping", "iterations": iterations, "samples": number}
            row |= {key: row[f"{key}_{number}"] for key in ("frechet_distance", "classifier_score")}
        yield own
        for iterations in sorted(self.recipe.shaping_stages)[:-1]:
            facts = {"part": "shaping", "checkpoint": self.recipe.shown, "iterations": iterations}
            way = replace(self._way("refine, shaped"), shaped=True)
            yield from self.small.rows(facts, g, d, self._shaper(self.recipe.shown, iterations), [way])
        yield better

    def layers(self) -> Iterator[Row]:
        """[CS] Figure 11 at the checkpoint shown: refined elsewhere, by the D that was shaped at the 7x7 map."""
        g, d = self.pairs[self.recipe.shown]
        shaped = self._shaper(self.recipe.shown, max(self.recipe.shaping_stages))
        for layer in self.recipe.layers:
            way = replace(self._way("refine, shaped"), shaped=True, at=layer)
            if layer == "output":
                way = replace(way, sampler=self._on_images())
            yield from self.small.rows(self.layer(layer), g, d, shaped, [way])

    def layer(self, layer: str) -> Row:
        """What tells the row of ``layers`` of a layer."""
        return {"part": "layers", "checkpoint": self.recipe.shown, "layer": layer}

    def denoising(self) -> list[Row]:
        """[CS0] Figure 9 at the last checkpoint: held-out images under faint generated ones, refined in data space.

        D shaped: [CS] Alg. 2 on training images that are noisy in the same way. mse: to the image below, mean over pixels
        on the scale -1 ... 1. accuracy: of the classifier.
        """
        return self.cells.row(self._key("denoising"), self._denoising)

    def shaped(self, checkpoint: int, iterations: int) -> nn.Module:
        """D of a checkpoint shaped for refinement at the 7x7 map: one of the recipe's stages."""
        recipe = self.recipe
        g, d = self.pairs[checkpoint]
        refiner = self.table.refiner(replace(self._way("shaping"), max_steps=recipe.shaping_steps), g, d)
        done = 0
        for stage, end in enumerate(sorted(recipe.shaping_stages)):
            if end <= iterations:
                d = self._stage(f"D-shaped-{checkpoint}-{end}", refiner.with_discriminator(d), end - done, stage)
                done = end
        return d

    def _stage(
        self, key: str, refiner: fr.Refiner, iterations: int, stage: int = 0, latents: Tensor | None = None
    ) -> nn.Module:  # fmt: skip
        """D after ``iterations`` more: [CS] Alg. 2, samples leave at a uniformly drawn step."""
        # fewer slots than the batch: most of it leaves early, and the rest moves up
        refiner = refiner.replaced(num_slots=self.recipe.shaping_slots)
        return self.trained(
            key, self._trainer().discriminator, refiner, self.data.train, iterations=iterations, latents=latents,
            seed=self.seed + 1000 * (stage + 1),
        )  # fmt: skip

    def _shaper(self, checkpoint: int, iterations: int) -> Callable[[], nn.Module]:
        return lambda: self.shaped(checkpoint, iterations)

    def _way(self, name: str) -> Way:
        return Way(name, fr.Collaborative(self.recipe.step_size), AT, self.recipe.max_steps, "median")

    def _on_images(self) -> fr.Collaborative:
        return fr.Collaborative(self.recipe.step_size, clamp=(-1.0, 1.0))

    def _denoising(self) -> list[Row]:
        recipe, checkpoint = self.recipe, self.recipe.checkpoints[-1]
        g, d = self.pairs[checkpoint]
        clean, labels = self.data.test[: recipe.denoised], self.data.test_labels[: recipe.denoised]
        trained = self.data.train[: recipe.shaping_batch * recipe.denoising_iterations]
        raw = self.table.refiner(Way("faint", at="output"), g, d)
        faint = raw.sample(len(clean) + len(trained), first_id=FAINT, seed=self.seed).images
        noisy, latents = add_faint(clean, faint[: len(clean)]), add_faint(trained, faint[len(clean) :])
        way = replace(self._way("denoising"), sampler=self._on_images(), at="output")
        refiner = self.table.refiner(way, None, d)
        few = self.table.refiner(replace(way, max_steps=recipe.shaping_steps), None, d)
        shaped = self._stage(f"D-shaped-{checkpoint}-denoising", few, recipe.denoising_iterations, latents=latents)
        images, steps = {"real": clean, "noisy": noisy}, {"real": 0.0, "noisy": 0.0}
        for name, by in (("denoised, unshaped", refiner), ("denoised, shaped", refiner.with_discriminator(shaped))):
            out = by.refine(noisy, seed=self.seed)
            images[name], steps[name] = out.images, float(out.steps.double().mean())
        self.cells.put(self._key("denoising"), {name: x[:SHOWN] for name, x in images.items()})
        facts = {"seed": self.seed, "part": "denoising", "checkpoint": checkpoint}
        return [
            {
                **facts, "name": name, "samples": len(x), "mse": float((x - clean).square().mean()),
                "mean_steps": steps[name], "accuracy": accuracy(self.judge.classifier, x, labels),
            }
            for name, x in images.items()
        ]  # fmt: skip

    def _trainer(self) -> Trainer:
        recipe = self.recipe
        return image_networks.info_trainer(self.data.train, self.seed, recipe.training, recipe.width, recipe.hidden)


def add_faint(images: Tensor, faint: Tensor) -> Tensor:
    """[CS0]'s noise: clip(.9 x + .3 x') on the scale -1 ... 1, as in the public code; x' a generated image."""
    return (0.9 * images + 0.3 * faint).clamp(-1, 1)
