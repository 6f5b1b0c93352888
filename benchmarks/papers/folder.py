"""The image protocol of [CS] 4.3 on any folder of pictures: whoever has CelebA or ImageNet (and a GPU) runs it as it stands.

``--data``: pictures in a folder are of no class (the recipe ``CELEBA64``: a DCGAN of 64x64), pictures in subfolders are of a
class each (``IMAGENET128``: a class-conditional SAGAN of 128x128); ``run(..., recipe=)`` takes another. Distances are on the
features of a classifier trained here: of the classes, or without classes of the quarter turn a picture was given.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import picture_files, result_file, training
from benchmarks.papers.cells import Cells
from benchmarks.papers.image_rows import SHOWN, Row
from benchmarks.papers.picture_networks import LabelledTrainer, PictureClassifier, drawn
from fastrefine import settings
from fastrefine.datasets import Images, PictureFolder
from fastrefine.demo import gan, picture
from fastrefine.demo.gan import build
from fastrefine.demo.judge import Judge
from fastrefine.models import SAGANDiscriminator, SAGANGenerator, dcgan_discriminator, dcgan_generator
from fastrefine.priors import Prior

_Drawn = tuple[Tensor, Tensor, Tensor]  # images, logits, steps


@dataclass(frozen=True)
class Recipe:
    """name: of what was published. network: "dcgan", latents uniform on (-1, 1), logistic loss | "sagan", class-conditional,
    normal latents, hinge loss.

    at, step_size, max_steps: collaborative refinement by sgd with fixed steps, all of them made and the best iterate kept,
    as in the public code. shaping_*: [CS] Alg. 2 with Adam. judged, held_out: pictures that train the classifier and that
    samples are compared with, at most.
    """

    name: str
    network: str
    size: int
    latent: int
    features: tuple[int, int]
    training: gan.Training
    steps: int
    at: str
    step_size: float
    max_steps: int
    shaping_iterations: int
    shaping_batch: int
    shaping_rate: float
    samples: int = 10_000
    chain_length: int = 5
    reference: int = 1000
    num_slots: int = 256
    classifier_width: int = 32
    classifier_features: int = 128
    classifier_steps: int = 5000
    judged: int = 20_000
    held_out: int = 10_000
    attention_size: int = 32

    def prior(self) -> Prior:
        """Of the latents."""
        return fr.Normal(self.latent) if self.network == "sagan" else fr.Uniform(self.latent)

    def networks(self, seed: int, classes: int) -> gan.Pair:
        """(G, D) untrained, on the GPU if there is one."""
        device, (g, d) = "cuda" if torch.cuda.is_available() else "cpu", self.features
        attention = {"num_classes": classes, "attention_size": self.attention_size}
        makers: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
            "dcgan": (lambda: dcgan_generator(self.size, self.latent, g), lambda: dcgan_discriminator(self.size, d)),
            "sagan": (
                lambda: SAGANGenerator(self.size, self.latent, g, **attention),
                lambda: SAGANDiscriminator(self.size, d, **attention),
            ),
        }
        generator, discriminator = makers[self.network]
        return build(generator, seed).to(device), build(discriminator, seed + 100).to(device)


CELEBA64 = Recipe(
    "celeba64", "dcgan", 64, 100, (64, 64), gan.Training(100, "adam", (2e-4, 2e-4), (0.5, 0.999)), 66_000, at="2",
    step_size=0.1, max_steps=50, shaping_iterations=2000, shaping_batch=100, shaping_rate=2e-4,
)  # fmt: skip
IMAGENET128 = Recipe(
    "imagenet128", "sagan", 128, 128, (64, 64), gan.Training(256, "adam", (1e-4, 4e-4), (0.0, 0.9)), 1_000_000, at="blocks.1",
    step_size=0.5, max_steps=16, shaping_iterations=5000, shaping_batch=256, shaping_rate=1e-4,
)  # fmt: skip
_TINY: dict[str, Any] = {
    "size": 8, "latent": 8, "features": (8, 8), "steps": 30, "max_steps": 5, "shaping_iterations": 8, "shaping_batch": 20,
    "shaping_rate": 3e-3, "samples": 100, "reference": 50, "num_slots": 50, "classifier_width": 4, "classifier_features": 32,
    "classifier_steps": 30, "attention_size": 8,
}  # fmt: skip
_FAST = gan.Training(16, "adam", (2e-3, 2e-3), (0.5, 0.999))
QUICK = (
    replace(CELEBA64, **_TINY, training=_FAST, step_size=20.0),
    replace(IMAGENET128, **_TINY, training=_FAST, at="blocks.0", step_size=4.0),
)


class Pictures:
    """The rows of one folder, recipe and seed."""

    def __init__(self, cells: Cells, recipe: Recipe, folder: Path, seed: int):
        self.cells, self.recipe, self.seed = cells, recipe, seed
        self.pictures = PictureFolder(folder, recipe.size)
        self.labelled, self.classes = recipe.network == "sagan", len(self.pictures.classes)
        if self.labelled and not self.classes:
            raise fr.InputError(f"{recipe.name} is class-conditional, but {folder} has pictures outside of its subfolders")
        self.count = len(self.pictures) - min(recipe.held_out, max(1, len(self.pictures) // 5))  # those to train with
        self.judge = self._judge()
        pairs = training.checkpoints(cells, f"gan-{seed}", self._trainer, (recipe.steps,))
        self.generator, self.own = pairs[recipe.steps]
        first = torch.arange(min(recipe.reference, self.count))
        self.real, self.real_labels = self.pictures.images(first), self.pictures.labels[first] if self.labelled else None
        chains = torch.arange(recipe.samples) // recipe.chain_length
        self.labels = chains % self.classes if self.labelled else None  # the proposals of a chain are of one class

    def refiner(self, discriminator: nn.Module) -> fr.Refiner:
        """All steps with D, the best iterate kept."""
        r = self.recipe
        return fr.Refiner(
            self.generator, discriminator, fr.Collaborative(r.step_size, control="fixed"), at=r.at, prior=r.prior(),
            real=self.real, real_labels=self.real_labels, max_steps=r.max_steps, num_slots=r.num_slots, keep="best",
        )  # fmt: skip

    def shaped(self) -> nn.Module:
        """D shaped for refinement on the training pictures, decoded batch by batch."""
        r = self.recipe

        def shape() -> nn.Module:
            refiner = self.refiner(self.own)
            refiner.keep = "last"
            data = torch.utils.data.Subset(self.pictures, range(self.count))  # type: ignore[arg-type, var-annotated]
            return fr.shape_discriminator(
                refiner, data, r.shaping_iterations, r.shaping_batch, r.shaping_rate, seed=self.seed, progress=None
            )

        return self.cells.network(f"shaped-{self.seed}", r.networks(0, self.classes)[1], shape)

    def rows(self) -> list[Row]:
        """Standard, refined with D as it is, refined with the shaped D, and Metropolis-Hastings on those."""
        length, drawn = self.recipe.chain_length, {}

        def unshaped() -> _Drawn:
            return self._refined(self.own)

        def shaped() -> _Drawn:
            if "shaped" not in drawn:
                drawn["shaped"] = self._refined(self.shaped())
            return drawn["shaped"]

        def chosen() -> _Drawn:
            images, logits, steps = shaped()
            real = self.refiner(self.shaped()).score(self.real, self.real_labels)
            picked = fr.metropolis_hastings(
                logits, length, real, self.seed, labels=self.labels, initial_labels=self.real_labels, untrusted="allow"
            )
            return images[picked.indices], logits[picked.indices], steps

        ways = {"standard": self._raw, "refine, unshaped": unshaped, "refine": shaped, "collaborative": chosen}
        return [self._row(name, make) for name, make in ways.items()]

    def images(self, name: str) -> Tensor:
        """The first images of a row that was made."""
        return self.cells.tensors(f"{self.seed}-{name}", dict)["images"]

    def _row(self, name: str, make: Callable[[], _Drawn]) -> Row:
        def row() -> Row:
            images, _, steps = make()
            self.cells.put(f"{self.seed}-{name}", {"images": images[:SHOWN]})
            measured = self.judge(images, self.recipe.samples // self.recipe.chain_length)
            facts = {"seed": self.seed, "recipe": self.recipe.name, "name": name, "samples": len(images)}
            return {**facts, **measured, "mean_steps": float(steps.double().mean())}

        return self.cells.row(f"{self.seed}-{name}", row)

    @torch.no_grad()
    def _raw(self) -> _Drawn:
        parts, device = [], next(self.generator.parameters()).device
        for ids in torch.arange(self.recipe.samples).split(self.recipe.num_slots):
            labels = () if self.labels is None else (self.labels[ids].to(device),)
            parts.append(self.generator(self.recipe.prior().sample(ids, self.seed).to(device), *labels).cpu())
        return torch.cat(parts), torch.zeros(0), torch.zeros(1)

    def _refined(self, discriminator: nn.Module) -> _Drawn:
        out = self.refiner(discriminator).sample(self.recipe.samples, seed=self.seed, labels=self.labels)
        return out.images, out.logits, out.steps

    def _trainer(self) -> gan.Trainer:
        r, pair = self.recipe, self.recipe.networks(self.seed, self.classes)
        if self.labelled:
            return LabelledTrainer(pair, self.pictures, self.count, gan.normal(r.latent), r.training, self.seed)
        return gan.Trainer(*pair, drawn(self.pictures, self.count), gan.uniform(r.latent), r.training, self.seed)

    def _judge(self) -> Judge:
        r, count = self.recipe, min(self.recipe.judged, self.count)
        data = Images(
            self.pictures.images(range(count)), self.pictures.images(range(self.count, len(self.pictures))),
            self.pictures.labels[:count], self.pictures.labels[self.count :],
        )  # fmt: skip
        if not self.classes:
            data = turned(data)
        return training.trained_judge(
            self.cells, lambda: PictureClassifier(r.size, r.classifier_width, r.classifier_features, self.classes or 4), data,
            seed=self.seed, steps=r.classifier_steps, batch_size=100, noise=0.05,
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


def run(
    outdir: Path, *, seeds: tuple[int, ...], quick: bool = False, data: Path | None = None, recipe: Recipe | None = None
) -> dict[str, Any]:
    """The protocol on ``data``; quick: tiny versions of both recipes, on pictures that it makes."""
    started, rows, accuracies, recipes = time.perf_counter(), [], {}, []
    with settings.threads_for(flops=0.0 if quick else None), warnings.catch_warnings(), tempfile.TemporaryDirectory() as made:
        warnings.simplefilter("ignore", fr.FastrefineWarning)  # the rows show what comes of it
        cases: list[tuple[Recipe, Path]]
        if quick or data is None:
            cases = [(QUICK[0], Path(made) / "plain"), (QUICK[1], Path(made) / "classes")]
            blobs(cases[0][1], 0, 90)
            blobs(cases[1][1], 3, 30)
        else:
            cases = [(recipe or chosen(data), data)]
        for one, folder in cases:
            recipes.append(one)
            for seed in seeds:
                pictures = Pictures(Cells(outdir / ("cells-quick" if quick else "cells") / one.name, one), one, folder, seed)
                accuracies[f"{one.name}, seed {seed}"] = pictures.judge.accuracy
                rows += pictures.rows()
            draw(outdir / f"{one.name}.png", pictures)
    return result_file.write(
        outdir, "folder", rows=rows, seeds=list(seeds), recipe={r.name: asdict(r) for r in recipes}, reduced=bool(quick),
        reductions=["10,000 samples in place of 50,000", "a classifier trained here in place of Inception-v3"],
        classifier_accuracy=accuracies, claims=claims(rows), comparison=comparison(rows), seconds=time.perf_counter() - started,
    )  # fmt: skip


def chosen(data: Path) -> Recipe:
    """The recipe that a folder looks like: pictures in subfolders only have classes."""
    return IMAGENET128 if PictureFolder(data, 8).classes else CELEBA64


def claims(rows: list[Row]) -> list[Row]:
    """Refinement with the shaped D lowers the distance, on means over seeds."""
    found = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        ways = ("standard", "refine, unshaped", "refine")
        raw, unshaped, refined = (result_file.mean(rows, "frechet_distance", recipe=name, name=way) for way in ways)
        text = f"{name}: refine (shaped) has a lower Frechet distance than the generator"
        found.append(result_file.claim(text, refined < raw, standard=raw, unshaped=unshaped, refine=refined))
    return found


def comparison(rows: list[Row]) -> list[Row]:
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
            found.append(result_file.against(case, "distance / generator's", theirs, ratios, "lower"))
    return found


def draw(path: Path, pictures: Pictures) -> None:
    """The first samples of three rows, the same latents in each."""
    names = ("standard", "refine, unshaped", "refine")
    shown = [(name, picture.pixels(pictures.images(name))) for name in names]
    labels = None if pictures.labels is None else pictures.labels[:SHOWN]
    logits = pictures.refiner(pictures.shaped()).score(pictures.images("refine"), labels)
    picture.comparison(path, shown, [f"{float(v):.1f}" for v in logits], f"{pictures.recipe.name}: same latents", 48)
    picture_files.shrink(path)
