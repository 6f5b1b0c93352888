"""CIFAR-10 ([CS] 4.3, [DDLS] 5.2, [DGflow] 5.2): one GAN, every sampler, with its own, a tuned and the shaped discriminator.

Frechet distance and classifier score are on a classifier trained here (its accuracy stands in the record); the pictures are
JPEG copies: ratios compare with the published ones, values do not. FID itself, where Inception's weights are at hand:
``export`` writes a row's samples as PNG files for torch-fidelity (see ``picture_files.write_folder``).

The published networks want a GPU: ``run(outdir, seeds=(0,), data=folder, recipe=DCGAN)``, or ``recipe=SNGAN``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import picture_files, result_file, training
from benchmarks.papers.cells import Cells
from benchmarks.papers.image_rows import SHOWN, ImageTable, Protocol, Row, Way
from benchmarks.papers.picture_networks import PictureClassifier
from fastrefine import settings
from fastrefine.datasets import Images, load_cifar10, load_digits
from fastrefine.demo import gan, picture
from fastrefine.demo.gan import build
from fastrefine.models import SNGANDiscriminator, SNGANGenerator, dcgan_discriminator, dcgan_generator
from fastrefine.priors import Prior

ROWS = (  # by discriminator
    ("own", ("standard", "DRS", "MH", "DDLS", "DGflow", "refine, fixed steps", "refine")),
    ("tuned", ("DRS", "MH", "DDLS", "DGflow", "refine")),
    ("shaped", ("DDLS", "DGflow", "refine, fixed steps", "refine", "collaborative")),
)


@dataclass(frozen=True)
class Recipe:
    """One network, its training and its rows.

    network: "dcgan", latents uniform on (-1, 1) | "sngan", normal latents. features: widths of G and D.
    at, step_size, max_steps: collaborative refinement by sgd with backtracking, stopped at the median real logit.
    shaping_*: [CS] Alg. 2 with Adam, batches left at a uniformly drawn step; tuning: as many iterations on raw samples.
    ddls: (step size, noise scale, steps). dgflow: (step size, gamma, steps), KL, on the latent.
    """

    network: str
    size: int
    latent: int
    features: tuple[int, int]
    training: gan.Training
    steps: int
    classifier_width: int
    classifier_steps: int
    protocol: Protocol
    at: str
    step_size: float = 0.3
    max_steps: int = 50
    shaping_iterations: int = 300
    shaping_batch: int = 64
    shaping_rate: float = 2e-4
    ddls: tuple[float, float, int] = (0.01, 0.1, 50)
    dgflow: tuple[float, float, int] = (0.1, 0.01, 25)
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ROWS

    def prior(self) -> Prior:
        """Of the latents."""
        return fr.Normal(self.latent) if self.network == "sngan" else fr.Uniform(self.latent)

    def networks(self, seed: int) -> gan.Pair:
        """(G, D) untrained, on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        g, d = self.features
        makers: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
            "dcgan": (lambda: dcgan_generator(self.size, self.latent, g), lambda: dcgan_discriminator(self.size, d)),
            "sngan": (lambda: SNGANGenerator(self.size, self.latent, g), lambda: SNGANDiscriminator(d)),
        }
        generator, discriminator = makers[self.network]
        return build(generator, seed).to(device), build(discriminator, seed + 100).to(device)

    def trainer(self, data: Images, seed: int) -> gan.Trainer:
        """At step 0."""
        draw = gan.normal(self.latent) if self.network == "sngan" else gan.uniform(self.latent)
        return gan.Trainer(*self.networks(seed), gan.images_of(data.train), draw, self.training, seed)

    def ways(self) -> dict[str, Way]:
        """The rows by name; "refine, fixed steps" is the public code's: all K steps, the best of them kept."""
        refined = dict(at=self.at, max_steps=self.max_steps)
        (size, scale, length), (eta, gamma, count) = self.ddls, self.dgflow
        found = (
            Way("standard"), Way("DRS", select="drs"), Way("MH", select="mh"),
            Way("DDLS", fr.DDLS(size, scale), max_steps=length),
            Way("DGflow", fr.DGflow(eta, "KL", gamma), max_steps=count),
            Way("refine, fixed steps", fr.Collaborative(self.step_size, control="fixed"), keep="best", **refined),  # type: ignore[arg-type]
            Way("refine", fr.Collaborative(self.step_size), stop="median", **refined),  # type: ignore[arg-type]
            Way("collaborative", fr.Collaborative(self.step_size), stop="median", select="mh", **refined),  # type: ignore[arg-type]
        )  # fmt: skip
        return {way.name: way for way in found}


_ADAM = gan.Training(64, "adam", (2e-4, 2e-4), (0.5, 0.999), bfloat16=True)
FULL = Recipe(
    "dcgan", 32, 100, (32, 32), _ADAM, 12_000, classifier_width=32, classifier_steps=3000,
    protocol=Protocol(samples=5000, chain_length=5, num_slots=100), at="2",
)  # fmt: skip
REDUCED = (
    "32 features in place of 64, batches of 64 in place of 100, 12,000 iterations in place of 30,000",
    "300 iterations of shaping on batches of 64 in place of an epoch; 50 steps of DDLS",
    "5,000 samples a row (1,000 chains for the collaborative one) in place of 50,000",
    "a classifier trained here in place of Inception-v3, on JPEG copies of the images",
)
DCGAN = replace(
    FULL, features=(64, 64), training=replace(_ADAM, batch_size=100, bfloat16=False), steps=30_000, step_size=0.1,
    shaping_iterations=500, shaping_batch=100, ddls=(0.01, 0.1, 1000),
    protocol=Protocol(samples=50_000, chain_length=5, num_slots=1000),
)  # fmt: skip
SNGAN = replace(
    DCGAN, network="sngan", latent=128, features=(256, 128), training=gan.Training(64, "adam", (2e-4, 2e-4), (0.0, 0.9)),
    steps=100_000, at="blocks.0",
)  # fmt: skip
QUICK = Recipe(
    "dcgan", 8, 16, (24, 24), replace(_ADAM, batch_size=32, rates=(1e-3, 1e-3), bfloat16=False), 70, classifier_width=8,
    classifier_steps=40, protocol=Protocol(samples=150, chain_length=4, reference=150, num_slots=50), at="0", step_size=1.0,
    max_steps=8, shaping_iterations=15, shaping_batch=30, shaping_rate=1e-3, ddls=(0.01, 0.1, 5), dgflow=(0.1, 0.01, 5),
    rows=(("own", ("standard", "DRS", "MH", "refine")), ("tuned", ("DDLS", "DGflow")), ("shaped", ("refine", "collaborative"))),
)  # fmt: skip


def run(
    outdir: Path, *, seeds: tuple[int, ...], quick: bool = False, data: Path | None = None, recipe: Recipe | None = None
) -> dict[str, Any]:
    """The experiment; quick: on scikit-learn's digits in colour. recipe: another one than FULL or QUICK."""
    started, recipe = time.perf_counter(), recipe or (QUICK if quick else FULL)
    cells = Cells(outdir / ("cells-quick" if quick else f"cells-{recipe.network}"), recipe)
    rows: list[Row] = []
    accuracies = {}
    with settings.threads_for(flops=0.0):
        images = coloured_digits() if data is None or quick else load_cifar10(data)
        for seed in seeds:
            table, g, discriminators = prepare(cells, recipe, images, seed)
            accuracies[seed] = table.judge.accuracy
            ways = recipe.ways()
            for name, wanted in recipe.rows:
                d = discriminators[name]
                rows += table.rows({"discriminator": name}, g, d, lambda d=d: d, [ways[row] for row in wanted])  # type: ignore[misc]
        draw(outdir / "cifar10.png", table, recipe.ways()["refine"], g, discriminators["shaped"])
    reduced = recipe not in (DCGAN, SNGAN)
    return result_file.write(
        outdir, "cifar10", rows=rows + not_run(recipe, seeds), seeds=list(seeds), recipe=asdict(recipe), reduced=reduced,
        reductions=REDUCED if recipe == FULL else (), classifier_accuracy=accuracies, claims=claims(rows),
        comparison=comparison(rows), seconds=time.perf_counter() - started,
    )  # fmt: skip


def prepare(cells: Cells, recipe: Recipe, data: Images, seed: int) -> tuple[ImageTable, nn.Module, dict[str, nn.Module]]:
    """(table, G, D by name), trained, or read where they were trained before."""
    judge = training.trained_judge(
        cells, lambda: PictureClassifier(recipe.size, recipe.classifier_width), data, seed=seed,
        steps=recipe.classifier_steps, batch_size=100, noise=0.05,
    )  # fmt: skip
    pairs = training.checkpoints(cells, f"gan-{seed}", lambda: recipe.trainer(data, seed), (recipe.steps,))
    g, d = pairs[recipe.steps]
    table = ImageTable(cells, recipe.protocol, judge, recipe.prior(), data.train, seed)
    refiner = table.refiner(recipe.ways()["refine"], g, d)

    def trained(how: Any) -> nn.Module:
        r = recipe
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fr.FastrefineWarning)  # of a D that is only becoming one
            return how(refiner, data.train, r.shaping_iterations, r.shaping_batch, r.shaping_rate, seed=seed, progress=None)

    found = {"own": d}
    for name, how in (("tuned", fr.tune_discriminator), ("shaped", fr.shape_discriminator)):
        found[name] = cells.network(f"{name}-{seed}", recipe.networks(seed)[1], lambda how=how: trained(how))  # type: ignore[misc]
    return table, g, found


def export(
    outdir: Path, row: str, discriminator: str, n: int, *, data: Path | None, seed: int = 0, recipe: Recipe = FULL
) -> Path:
    """Writes ``n`` samples of a row that was run into ``outdir`` as PNG files; returns their folder.

    row: one that selects nothing; discriminator: "own" | "tuned" | "shaped".
    """
    way = recipe.ways()[row]
    if way.select:
        raise fr.InputError(f"{row} selects: export refined samples, and choose among them with fr.metropolis_hastings")
    cells = Cells(outdir / ("cells-quick" if recipe == QUICK else f"cells-{recipe.network}"), recipe)
    table, g, found = prepare(cells, recipe, coloured_digits() if data is None else load_cifar10(data), seed)
    folder = outdir / f"{row}-{discriminator}-{seed}"
    stream = table.refiner(way, g, found[discriminator]).stream(n, seed=seed)
    picture_files.write_folder(folder, (part.images for part in stream))
    return folder


def coloured_digits() -> Images:
    """scikit-learn's digits (N, 3, 8, 8), each in a colour of its own on black: pictures for a quick run."""
    data, random = load_digits(), torch.Generator().manual_seed(0)

    def dyed(grey: Tensor) -> Tensor:
        return (grey + 1) * (0.4 + 0.6 * torch.rand(len(grey), 3, 1, 1, generator=random)) - 1

    return Images(dyed(data.train), dyed(data.test), data.train_labels, data.test_labels)


def claims(rows: list[Row]) -> list[Row]:
    """What [CS] and [DDLS] claim of CIFAR-10, on means over seeds, of the rows that were run."""
    means = {}
    for row in rows:
        where = {"name": row["name"], "discriminator": row["discriminator"]}
        means[row["name"], row["discriminator"]] = tuple(
            result_file.mean(rows, key, **where) for key in ("frechet_distance", "classifier_score")
        )
    found, best = [], means["refine", "shaped"]
    for (name, discriminator), other in means.items():
        if name in ("standard", "DRS", "MH"):
            label = name if name == "standard" else f"{name} with the {discriminator} D"
            text = f"refine (shaped) has a lower Frechet distance and a higher classifier score than {label}"
            found.append(result_file.claim(text, best[0] < other[0] and best[1] > other[1], ours=best, other=other))
    raw = means["standard", "own"]
    for (name, discriminator), ours in means.items():
        if name in ("DDLS", "DGflow", "refine", "refine, fixed steps"):
            text = f"{name} with the {discriminator} D has a lower Frechet distance than the generator"
            found.append(result_file.claim(text, ours[0] < raw[0], standard=raw, ours=ours))
    return found


def comparison(rows: list[Row]) -> list[Row]:
    """Ratios to the generator's own figures beside those of [CS] Figure 6, [DDLS] Table 2 and the MH-GAN paper's scores."""
    small = next(key for key in rows[0] if key.startswith("frechet_distance_"))

    def ratio(key: str, name: str, discriminator: str) -> list[float]:
        base = small if (key, name) == ("frechet_distance", "collaborative") else key  # of as many samples
        ours = result_file.pick(rows, key, name=name, discriminator=discriminator)
        raw = result_file.pick(rows, base, name="standard", discriminator="own")
        return [a / b for a, b in zip(ours, raw, strict=False)]

    cases = (
        ("[CS] DCGAN: refine (shaped)", "refine", "shaped", 43 / 50, 7.24 / 5.85, True),
        ("[CS] DCGAN: collaborative", "collaborative", "shaped", 41 / 50, 7.24 / 5.85, True),
        ("[CS] DCGAN: DRS, D as it is", "DRS", "own", 51.5 / 50, None, False),
        ("[CS] DCGAN: MH, D as it is", "MH", "own", 50.4 / 50, None, False),
        ("MH-GAN's DCGAN: DRS, D tuned", "DRS", "tuned", None, 3.07 / 2.88, False),
        ("MH-GAN's DCGAN: MH, D tuned", "MH", "tuned", None, 3.38 / 2.88, False),
        ("[DDLS] SNGAN: DDLS, D as it is", "DDLS", "own", 15.76 / 21.7, 9.05 / 8.22, False),
        ("[DDLS] SNGAN: DDLS, D tuned", "DDLS", "tuned", 15.42 / 21.7, 9.09 / 8.22, False),
        ("DGflow (KL), D tuned", "DGflow", "tuned", None, None, False),
    )
    found = []
    for case, name, discriminator, distance, score, headline in cases:
        if ours := ratio("frechet_distance", name, discriminator):
            scores = ratio("classifier_score", name, discriminator)
            found += [
                result_file.against(case, "distance / generator's", distance, ours, "lower", headline=headline),
                result_file.against(case, "score / generator's", score, scores, "higher"),
            ]
    return found


def not_run(recipe: Recipe, seeds: tuple[int, ...]) -> list[Row]:
    """A row for each published network that this run leaves out."""
    missing = [(name, r) for name, r in (("DCGAN", DCGAN), ("SNGAN", SNGAN)) if r != recipe]
    return [
        {"seed": seed, "name": name, "status": "not run", "wants": "a GPU", "recipe": f"cifar10.{name}", "steps": r.steps}
        for seed in seeds for name, r in missing
    ]  # fmt: skip


def draw(path: Path, table: ImageTable, way: Way, g: nn.Module, shaped: nn.Module) -> None:
    """The first samples: raw, refined with D as it is, refined with the shaped one; below, its logit of the last ones."""
    shown = [
        (label, table.images({"discriminator": d}, name)[:SHOWN])
        for label, d, name in (("generator", "own", "standard"), ("refined", "own", "refine"), ("shaped", "shaped", "refine"))
    ]
    logits = table.refiner(way, g, shaped).score(shown[-1][1])
    picture.comparison(
        path, [(label, picture.pixels(x)) for label, x in shown], [f"{float(v):.1f}" for v in logits],
        "same latents: as generated, refined with D as it is, refined with D shaped", 48,
    )  # fmt: skip
    picture_files.shrink(path)
