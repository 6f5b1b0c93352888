"""The image protocol of [CS] 4.3 on any folder of pictures: whoever has CelebA or ImageNet (and a GPU) runs it as it stands.

``--data``: pictures in a folder are of no class (the recipe ``CELEBA64``: a DCGAN of 64x64), pictures in subfolders are of a
class each (``IMAGENET128``: a class-conditional SAGAN of 128x128); ``run(folder, ..., recipe=)`` takes another. Distances are
on the features of a classifier trained here: of the classes, or without classes of the quarter turn a picture was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import fastrefine as fr
from benchmarks.papers import plots, result_file
from benchmarks.papers.cells import Cells, checkpoints, trained_judge
from benchmarks.papers.image_networks import LabelledTrainer, PictureClassifier, drawn, latents_of, networks_of, prior_of
from benchmarks.papers.image_rows import ImageTable, Way
from benchmarks.papers.pictures import PictureFolder
from benchmarks.papers.result_file import Row, against, claim
from benchmarks.papers.run import Recipe, Run
from fastrefine.datasets import Images
from fastrefine.demo import gan
from fastrefine.demo.judge import Judge

# network: "dcgan", logistic loss | "sagan", class-conditional, hinge loss. Collaborative refinement is by sgd with fixed steps,
# all of them made and the best iterate kept, as in the public code. Shaping is by Adam. judged, held_out: pictures that train
# the classifier and that samples are compared with, at most.
CELEBA64 = Recipe(
    "celeba64", network="dcgan", size=64, latent=100, features=(64, 64), checkpoints=(66_000,), at="2", step_size=0.1,
    training=gan.Training(100, "adam", (2e-4, 2e-4), (0.5, 0.999)), max_steps=50, shaping_iterations=2000, shaping_batch=100,
    shaping_rate=2e-4, samples=10_000, chain_length=5, reference=1000, num_slots=256, classifier_width=32,
    classifier_steps=5000, own=dict(classifier_features=128, judged=20_000, held_out=10_000, attention_size=32),
)  # fmt: skip
IMAGENET128 = replace(
    CELEBA64, name="imagenet128", network="sagan", size=128, latent=128, checkpoints=(1_000_000,), at="blocks.1", step_size=0.5,
    training=gan.Training(256, "adam", (1e-4, 4e-4), (0.0, 0.9)), max_steps=16, shaping_iterations=5000, shaping_batch=256,
    shaping_rate=1e-4,
)  # fmt: skip


def _tiny(recipe: Recipe, at: str, step_size: float) -> Recipe:
    return recipe.but(
        size=8, latent=8, features=(8, 8), checkpoints=(30,), training=gan.Training(16, "adam", (2e-3, 2e-3), (0.5, 0.999)),
        at=at, step_size=step_size, max_steps=5, shaping_iterations=8, shaping_batch=20, shaping_rate=3e-3, samples=100,
        reference=50, num_slots=50, classifier_width=4, classifier_features=32, classifier_steps=30, attention_size=8,
    )  # fmt: skip


FULL, QUICK, QUICK_LABELLED = CELEBA64, _tiny(CELEBA64, "2", 20.0), _tiny(IMAGENET128, "blocks.0", 4.0)
REDUCTIONS = ("10,000 samples in place of 50,000", "a classifier trained here in place of Inception-v3")
ALL_CORES = True


class Pictures(ImageTable):
    """The rows of one folder, recipe and seed."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int, folder: Path):
        self.pictures = PictureFolder(folder, recipe.size)
        labelled, self.classes = recipe.network == "sagan", len(self.pictures.classes)
        if labelled and not self.classes:
            raise fr.InputError(f"{recipe.name} is class-conditional, but {folder} has pictures outside of its subfolders")
        self.count = len(self.pictures) - min(recipe.held_out, max(1, len(self.pictures) // 5))  # those to train with
        first = torch.arange(min(recipe.reference, self.count))
        chains = torch.arange(recipe.samples) // recipe.chain_length
        super().__init__(
            cells, recipe, seed, self._judge(cells, recipe, seed), prior_of(recipe), self.pictures.images(first),
            real_labels=self.pictures.labels[first] if labelled else None,
            labels=chains % self.classes if labelled else None,  # the proposals of a chain are of one class
        )  # fmt: skip
        (steps,) = recipe.checkpoints
        self.generator, self.own = checkpoints(cells, f"gan-{seed}", self._trainer, (steps,))[steps]

    def way(self, name: str, **other: object) -> Way:
        """All steps with D, the best iterate kept."""
        r = self.recipe
        return Way(name, fr.Collaborative(r.step_size, control="fixed"), r.at, r.max_steps, keep="best", **other)  # type: ignore[arg-type]

    def shaped(self) -> torch.nn.Module:
        """D shaped for refinement on the training pictures, decoded batch by batch."""
        refiner = self.refiner(replace(self.way("shaping"), keep="last"), self.generator, self.own)
        data = torch.utils.data.Subset(self.pictures, range(self.count))  # type: ignore[arg-type, var-annotated]
        return self.trained("D-shaped", networks_of(self.recipe, 0, self.classes)[1], refiner, data)

    def all_rows(self) -> Iterator[Row]:
        """Standard, refined with D as it is, refined with the shaped D, and Metropolis-Hastings on those."""
        ways = (
            Way("standard", at="output"), self.way("refine, unshaped"), self.way("refine", shaped=True),
            self.way("collaborative", shaped=True, select="mh"),
        )  # fmt: skip
        return self.rows({"recipe": self.recipe.name}, self.generator, self.own, self.shaped, ways)

    def draw(self, path: Path) -> None:
        """The first samples of three rows, the same latents in each."""
        facts, names = {"recipe": self.recipe.name}, ("standard", "refine, unshaped", "refine")
        shown = {name: self.images(facts, name) for name in names}
        refiner = self.refiner(self.way("refine"), self.generator, self.shaped())
        labels = None if self.labels is None else self.labels[: len(shown["refine"])]
        plots.tiles(path, shown, refiner.score(shown["refine"], labels), f"{self.recipe.name}: same latents")

    def _trainer(self) -> gan.Trainer:
        r, pair = self.recipe, networks_of(self.recipe, self.seed, self.classes)
        if r.network == "sagan":
            return LabelledTrainer(pair, self.pictures, self.count, latents_of(r), r.training, self.seed)
        return gan.Trainer(*pair, drawn(self.pictures, self.count), latents_of(r), r.training, self.seed)

    def _judge(self, cells: Cells, recipe: Recipe, seed: int) -> Judge:
        count = min(recipe.judged, self.count)
        data = Images(
            self.pictures.images(range(count)), self.pictures.images(range(self.count, len(self.pictures))),
            self.pictures.labels[:count], self.pictures.labels[self.count :],
        )  # fmt: skip
        classes, width, features = self.classes or 4, recipe.classifier_width, recipe.classifier_features
        return trained_judge(
            cells, lambda: PictureClassifier(recipe.size, width, features, classes), data if self.classes else turned(data),
            seed=seed, steps=recipe.classifier_steps, batch_size=100, noise=0.05,
        )  # fmt: skip


def turned(data: Images) -> Images:
    """Training images each turned by k quarter turns, k their label; those held out stay as they are, with label 0."""
    turns = torch.arange(len(data.train)) % 4
    train = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(data.train, turns, strict=True)])
    return Images(train, data.test, turns, torch.zeros(len(data.test), dtype=torch.int64))


def blobs(folder: Path, classes: int, each: int, size: int = 20) -> None:
    """Writes PNG pictures for a quick run: a bright disc low in the picture; classes, in subfolders, differ in its colour."""
    random = np.random.RandomState(0)
    for i in range(max(classes, 1) * each):
        owner = folder / f"class{i % classes}" if classes else folder
        owner.mkdir(parents=True, exist_ok=True)
        canvas = Image.new("RGB", (size, size + 4), tuple(int(v) for v in random.randint(0, 60, 3)))
        x, y, radius = random.uniform(0.3, 0.7) * size, random.uniform(0.6, 0.8) * size, random.uniform(0.15, 0.3) * size
        colour = [int(v) for v in random.randint(0, 90, 3)]
        colour[i % max(classes, 3)] = 255
        ImageDraw.Draw(canvas).ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
        canvas.save(owner / f"{i:04d}.png")


def _tables(run: Run, seed: int) -> Iterator[Pictures]:
    """Of ``data``; of a quick run: tiny versions of both recipes, on pictures that are made for them."""
    if run.data is not None and not run.quick:
        recipe = chosen(run.data) if run.recipe == FULL else run.recipe
        yield Pictures(run.cells(recipe), recipe, seed, run.data)
        return
    for recipe, classes, each in ((QUICK, 0, 90), (QUICK_LABELLED, 3, 30)):
        cells = run.cells(recipe)
        if not (cells.folder / "pictures").exists():
            blobs(cells.folder / "pictures", classes, each)
        yield Pictures(cells, recipe, seed, cells.folder / "pictures")


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Folder by folder: there are several in a quick run alone."""
    for table in _tables(run, seed):
        run.extra.setdefault("recipe", {})[table.recipe.name] = table.recipe.facts()
        run.judged(f"{table.recipe.name}, seed {seed}", table.judge.accuracy)
        yield from table.all_rows()


def draw(run: Run, rows: Sequence[Row]) -> None:
    """A picture of each recipe, of the first seed."""
    for table in _tables(run, run.seeds[0]):
        table.draw(run.outdir / f"{table.recipe.name}.png")


def chosen(data: Path) -> Recipe:
    """The recipe that a folder looks like: pictures in subfolders only have classes."""
    return IMAGENET128 if PictureFolder(data, 8).classes else CELEBA64


def claims(rows: Sequence[Row]) -> list[Row]:
    """Refinement with the shaped D lowers the distance, on means over seeds."""
    found = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        ways = ("standard", "refine, unshaped", "refine")
        raw, unshaped, refined = (result_file.mean(rows, "frechet_distance", recipe=name, name=way) for way in ways)
        text = f"{name}: refine (shaped) has a lower Frechet distance than the generator"
        found.append(claim(text, refined < raw, standard=raw, unshaped=unshaped, refine=refined))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """Ratios to the generator's distance beside those of [CS]: CelebA-64 at 66,000 iterations, FID."""
    published = {("celeba64", "refine"): 23 / 26.7, ("celeba64", "collaborative"): 23.6 / 26.7}
    small, found = next(key for key in rows[0] if key.startswith("frechet_distance_")), []
    for recipe, name in dict.fromkeys((row["recipe"], row["name"]) for row in rows):
        if name != "standard":
            base = small if name == "collaborative" else "frechet_distance"  # of as many samples
            ours = result_file.pick(rows, "frechet_distance", recipe=recipe, name=name)
            raw = result_file.pick(rows, base, recipe=recipe, name="standard")
            ratios = [a / b for a, b in zip(ours, raw, strict=True)]
            case, theirs = f"{recipe}: {name}", published.get((recipe, name))
            found.append(against(case, "distance / generator's", theirs, ratios, "lower"))
    return found
