"""The rows of the MNIST experiment for one training seed: the table over checkpoints, shaping, layers, denoising."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import mnist_networks, training
from benchmarks.papers.cells import Cells
from benchmarks.papers.image_rows import SHOWN, ImageTable, Protocol, Row, Way
from fastrefine.datasets import Images
from fastrefine.demo import gan
from fastrefine.demo.gan import Pair, Training
from fastrefine.models import digits as networks
from fastrefine.models.digits import classify

AT = "map7"  # the 7x7x128 map that [CS] refines
PRIOR = fr.Uniform(mnist_networks.LATENT_DIM)
FIXED = ", fixed steps"  # ends the names of the ways with fixed steps
FAINT = 1_000_000  # ids from here on: the latents of the faint images, which no other row has


@dataclass(frozen=True)
class Recipe:
    """What one run is made of; rate of shaping and step size were chosen on checkpoint 1000 of seed 0.

    momentum_steps: the published step size at each checkpoint, here of each sample's own gradient (the public code takes it
    of the mean over its batch of 64). step_size: of backtracking, at first. shaping_stages: numbers of iterations after which
    the shaped D is kept; each stage goes on from the last one, with fresh moments of Adam. shaping_steps: the most that a
    batch is refined by for D. layers: where [CS] Figure 11 refines. width, hidden: of the networks. denoised: images.
    real: training images, None for all.
    """

    checkpoints: tuple[int, ...] = (200, 1000, 4200)
    momentum_steps: tuple[float, ...] = (0.5, 0.3, 0.1)
    shown: int = 1000  # the checkpoint that shaping and layers are looked at
    training: Training = mnist_networks.TRAINING
    width: int = 64
    hidden: int = 1024
    classifier_steps: int = 2500
    max_steps: int = 20
    step_size: float = 5.0
    fixed_samples: int = 5000
    shaping_stages: tuple[int, ...] = (100, 250, 500)
    shaping_batch: int = 64
    shaping_rate: float = 1e-4
    shaping_steps: int = 10
    shaping_slots: int = 32
    layers: tuple[str, ...] = ("input", "act1", AT, "act14", "output")
    denoising_iterations: int = 150
    denoised: int = 1000
    real: int | None = None
    protocol: Protocol = field(default_factory=lambda: Protocol(num_slots=64, precision="bfloat16"))


class Mnist:
    """All rows of one training seed, each kept in ``cells``."""

    def __init__(self, cells: Cells, recipe: Recipe, data: Images, seed: int):
        self.cells, self.recipe, self.data, self.seed = cells, recipe, data, seed
        self.judge = training.trained_judge(cells, networks.mnist_classifier, data, seed=seed, steps=recipe.classifier_steps)
        self.table = ImageTable(cells, recipe.protocol, self.judge, PRIOR, data.train, seed)
        few = replace(recipe.protocol, samples=recipe.protocol.chains, chain_length=1)
        self.small = ImageTable(cells, few, self.judge, PRIOR, data.train, seed)
        self.pairs: dict[int, Pair] = training.checkpoints(cells, f"gan-{seed}", self._trainer, recipe.checkpoints)

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
        number = self.small.protocol.samples
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
            facts = {"part": "layers", "checkpoint": self.recipe.shown, "layer": layer}
            way = replace(self._way("refine, shaped"), shaped=True, at=layer)
            if layer == "output":
                way = replace(way, sampler=self._on_images())
            yield from self.small.rows(facts, g, d, shaped, [way])

    def shown(self, part: str, layer: str) -> Tensor:
        """The first images of a row of ``layers``."""
        return self.small.images({"part": part, "checkpoint": self.recipe.shown, "layer": layer}, "refine, shaped")

    def denoising(self) -> list[Row]:
        """[CS0] Figure 9 at the last checkpoint: held-out images under faint generated ones, refined in data space.

        D shaped: [CS] Alg. 2 on training images that are noisy in the same way. mse: to the image below, mean over pixels
        on the scale -1 ... 1. accuracy: of the classifier.
        """
        return self.cells.row(self._key("denoising"), self._denoising)

    def denoised(self) -> dict[str, Tensor]:
        """The first images of the rows of ``denoising``, by name."""
        return self.cells.tensors(self._key("denoising"), dict)

    def shaped(self, checkpoint: int, iterations: int) -> nn.Module:
        """D of a checkpoint shaped for refinement at the 7x7 map: one of the recipe's stages."""
        recipe = self.recipe
        g, d = self.pairs[checkpoint]
        refiner = self.table.refiner(replace(self._way("shaping"), max_steps=recipe.shaping_steps), g, d)
        done = 0
        for stage, end in enumerate(sorted(recipe.shaping_stages)):
            if end <= iterations:
                d = self._stage(f"shaped-{checkpoint}-{end}", refiner.with_discriminator(d), end - done, stage)
                done = end
        return d

    def _stage(
        self, name: str, refiner: fr.Refiner, iterations: int, stage: int = 0, latents: Tensor | None = None
    ) -> nn.Module:  # fmt: skip
        """D after ``iterations`` more: [CS] Alg. 2, samples leave at a uniformly drawn step."""
        recipe = self.recipe
        refiner.num_slots = recipe.shaping_slots  # fewer than the batch: most of it leaves early, and the rest moves up

        def shape() -> nn.Module:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fr.FastrefineWarning)  # of a D that is only becoming one
                return fr.shape_discriminator(
                    refiner, self.data.train, iterations, recipe.shaping_batch, recipe.shaping_rate, latents=latents,
                    seed=self.seed + 1000 * (stage + 1), progress=None,
                )  # fmt: skip

        return self.cells.network(self._key(name), self._trainer().discriminator, shape)

    def _shaper(self, checkpoint: int, iterations: int) -> Callable[[], nn.Module]:
        return lambda: self.shaped(checkpoint, iterations)

    def _way(self, name: str) -> Way:
        return Way(name, fr.Collaborative(self.recipe.step_size), AT, self.recipe.max_steps, "median")

    def _on_images(self) -> fr.Collaborative:
        return fr.Collaborative(self.recipe.step_size, clamp=(-1.0, 1.0))

    def _denoising(self) -> list[Row]:
        checkpoint = self.recipe.checkpoints[-1]
        g, d = self.pairs[checkpoint]
        clean, labels = self.data.test[: self.recipe.denoised], self.data.test_labels[: self.recipe.denoised]
        trained = self.data.train[: self.recipe.shaping_batch * self.recipe.denoising_iterations]
        raw = self.table.refiner(Way("faint", at="output"), g, d)
        faint = raw.sample(len(clean) + len(trained), first_id=FAINT, seed=self.seed).images
        noisy = add_faint(clean, faint[: len(clean)])
        way = replace(self._way("denoising"), sampler=self._on_images(), at="output")
        refiner = self.table.refiner(way, None, d)
        few = self.table.refiner(replace(way, max_steps=self.recipe.shaping_steps), None, d)
        latents = add_faint(trained, faint[len(clean) :])
        shaped = self._stage(f"shaped-{checkpoint}-denoising", few, self.recipe.denoising_iterations, latents=latents)
        images, told = {"real": clean, "noisy": noisy}, {"real": 0.0, "noisy": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fr.FastrefineWarning)  # the rows show what comes of it
            for name, run in (("denoised, unshaped", refiner), ("denoised, shaped", refiner.with_discriminator(shaped))):
                out = run.refine(noisy, seed=self.seed)
                images[name], told[name] = out.images, float(out.steps.double().mean())
        self.cells.put(self._key("denoising"), {name: x[:SHOWN] for name, x in images.items()})
        return [
            {
                "seed": self.seed, "part": "denoising", "checkpoint": checkpoint, "name": name, "samples": len(x),
                "mse": float((x - clean).square().mean()), "mean_steps": told[name],
                "accuracy": float((classify(self.judge.classifier, x)[1].argmax(1) == labels).double().mean()),
            }
            for name, x in images.items()
        ]  # fmt: skip

    def _trainer(self) -> gan.Trainer:
        recipe = self.recipe
        return mnist_networks.trainer(self.data.train, self.seed, recipe.training, recipe.width, recipe.hidden)

    def _key(self, name: str) -> str:
        return f"{self.seed}-{name}"


def add_faint(images: Tensor, faint: Tensor) -> Tensor:
    """[CS0]'s noise: clip(.9 x + .3 x') on the scale -1 ... 1, as in the public code; x' a generated image."""
    return (0.9 * images + 0.3 * faint).clamp(-1, 1)


def quick_images(data: Images) -> Images:
    """scikit-learn's 8x8 digits as 28x28 images, for runs without MNIST."""

    def larger(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x, size=28, mode="bicubic", align_corners=False).clamp(-1, 1)

    return data._replace(train=larger(data.train), test=larger(data.test))


def fewer(data: Images, train: int | None, test: int) -> Images:
    """The first images of each part."""
    return Images(data.train[:train], data.test[:test], data.train_labels[:train], data.test_labels[:test])
