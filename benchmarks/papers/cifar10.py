"""CIFAR-10 ([CS] 4.3, [DDLS] 5.2, [DGflow] 5.2): one GAN, every sampler, with its own, a tuned and the shaped discriminator.

Frechet distance and classifier score are on a classifier trained here (its accuracy stands in the record); the pictures are
JPEG copies: ratios compare with the published ones, values do not. FID itself, where Inception's weights are at hand:
``export`` writes a row's samples as PNG files for torch-fidelity.

The published networks want a GPU: ``run(cifar10, "cifar10", outdir, seeds=(0,), data=folder, recipe=DCGAN)``, or ``SNGAN``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import plots, result_file
from benchmarks.papers.cells import checkpoints, trained_judge
from benchmarks.papers.image_networks import PictureClassifier, latents_of, networks_of, prior_of
from benchmarks.papers.image_rows import ImageTable, Way
from benchmarks.papers.pictures import load_cifar10
from benchmarks.papers.result_file import Row, against, claim
from benchmarks.papers.run import Recipe, Run
from fastrefine import pictures
from fastrefine.datasets import Images, load_digits
from fastrefine.demo import gan

ROWS = (  # by discriminator
    ("own", ("standard", "DRS", "MH", "DDLS", "DGflow", "refine, fixed steps", "refine")),
    ("tuned", ("DRS", "MH", "DDLS", "DGflow", "refine")),
    ("shaped", ("DDLS", "DGflow", "refine, fixed steps", "refine", "collaborative")),
)
_ADAM = gan.Training(64, "adam", (2e-4, 2e-4), (0.5, 0.999), bfloat16=True)
# Collaborative refinement is by sgd with backtracking, stopped at the median real logit. Shaping: Adam, batches left at a
# uniformly drawn step; tuning: as many iterations on raw samples. ddls: (step size, noise scale, steps). dgflow: (step size,
# gamma, steps), KL, on the latent.
FULL = Recipe(
    "dcgan", network="dcgan", size=32, latent=100, features=(32, 32), training=_ADAM, checkpoints=(12_000,),
    classifier_width=32, classifier_steps=3000, samples=5000, chain_length=5, reference=1000, num_slots=100, at="2",
    step_size=0.3, max_steps=50, shaping_iterations=300, shaping_batch=64, shaping_rate=2e-4,
    own=dict(ddls=(0.01, 0.1, 50), dgflow=(0.1, 0.01, 25), rows=ROWS),
)  # fmt: skip
REDUCTIONS = (
    "32 features in place of 64, batches of 64 in place of 100, 12,000 iterations in place of 30,000",
    "300 iterations of shaping on batches of 64 in place of an epoch; 50 steps of DDLS",
    "5,000 samples a row (1,000 chains for the collaborative one) in place of 50,000",
    "a classifier trained here in place of Inception-v3, on JPEG copies of the images",
)
DCGAN = FULL.but(
    features=(64, 64), training=replace(_ADAM, batch_size=100, bfloat16=False), checkpoints=(30_000,), step_size=0.1,
    shaping_iterations=500, shaping_batch=100, ddls=(0.01, 0.1, 1000), samples=50_000, num_slots=1000,
)  # fmt: skip
SNGAN = replace(
    DCGAN, name="sngan", network="sngan", latent=128, features=(256, 128), checkpoints=(100_000,), at="blocks.0",
    training=gan.Training(64, "adam", (2e-4, 2e-4), (0.0, 0.9)),
)  # fmt: skip
QUICK = FULL.but(
    size=8, latent=16, features=(24, 24), training=replace(_ADAM, batch_size=32, rates=(1e-3, 1e-3), bfloat16=False),
    checkpoints=(70,), classifier_width=8, classifier_steps=40, samples=150, chain_length=4, reference=150, num_slots=50,
    at="0", step_size=1.0, max_steps=8, shaping_iterations=15, shaping_batch=30, shaping_rate=1e-3, ddls=(0.01, 0.1, 5),
    dgflow=(0.1, 0.01, 5),
    rows=(("own", ("standard", "DRS", "MH", "refine")), ("tuned", ("DDLS", "DGflow")), ("shaped", ("refine", "collaborative"))),
)  # fmt: skip


def ways(recipe: Recipe) -> dict[str, Way]:
    """The rows by name; "refine, fixed steps" is the public code's: all K steps, the best of them kept."""
    (size, scale, length), (eta, gamma, count) = recipe.ddls, recipe.dgflow
    refine = Way("refine", fr.Collaborative(recipe.step_size), recipe.at, recipe.max_steps, stop="median")
    fixed = fr.Collaborative(recipe.step_size, control="fixed")
    found = (
        Way("standard"), Way("DRS", select="drs"), Way("MH", select="mh"),
        Way("DDLS", fr.DDLS(size, scale), max_steps=length), Way("DGflow", fr.DGflow(eta, "KL", gamma), max_steps=count),
        replace(refine, name="refine, fixed steps", sampler=fixed, stop="none", keep="best"),
        refine, replace(refine, name="collaborative", select="mh"),
    )  # fmt: skip
    return {way.name: way for way in found}


class Discriminators(ImageTable):
    """The rows of one seed, with the generator and its discriminators by name."""

    def __init__(self, run: Run, seed: int):
        cells, recipe = run.cells(), run.recipe
        data = coloured_digits() if run.data is None or run.quick else load_cifar10(run.data)
        judge = trained_judge(
            cells, lambda: PictureClassifier(recipe.size, recipe.classifier_width), data, seed=seed,
            steps=recipe.classifier_steps, batch_size=100, noise=0.05,
        )  # fmt: skip
        super().__init__(cells, recipe, seed, judge, prior_of(recipe), data.train)

        def trainer() -> gan.Trainer:
            pair, real = networks_of(recipe, seed), gan.images_of(data.train)
            return gan.Trainer(*pair, real, latents_of(recipe), recipe.training, seed)

        (steps,) = recipe.checkpoints
        self.generator, own = checkpoints(cells, f"gan-{seed}", trainer, (steps,))[steps]
        refiner = self.refiner(ways(recipe)["refine"], self.generator, own)
        self.by_name: dict[str, nn.Module] = {"own": own} | {
            how: self.trained(f"D-{how}", networks_of(recipe, seed)[1], refiner, data.train, how) for how in ("tuned", "shaped")
        }


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Every way with each of the three discriminators."""
    table, known = Discriminators(run, seed), ways(run.recipe)
    run.judged(str(seed), table.judge.accuracy)
    run.left_out += not_run(run.recipe, seed)
    for name, wanted in run.recipe.rows:
        d = table.by_name[name]
        yield from table.rows({"discriminator": name}, table.generator, d, lambda d=d: d, [known[row] for row in wanted])  # type: ignore[misc]


def export(run: Run, row: str, discriminator: str, n: int) -> Path:
    """Writes ``n`` samples of a row of the run's first seed as folder/000000/000123.png; returns the folder.

    row: one that selects nothing; discriminator: "own" | "tuned" | "shaped". For FID with Inception weights:
    ``fidelity --gpu 0 --fid --isc --samples-find-deep --input1 FOLDER --input2 REAL``.
    """
    way, seed = ways(run.recipe)[row], run.seeds[0]
    if way.select:
        raise fr.InputError(f"{row} selects: export refined samples, and choose among them with fr.metropolis_hastings")
    table, folder = Discriminators(run, seed), run.outdir / f"{row}-{discriminator}-{seed}"
    for part in table.refiner(way, table.generator, table.by_name[discriminator]).stream(n, seed=seed):
        for number, image in zip(part.ids.tolist(), pictures.levels(part.images), strict=True):
            path = folder / f"{number - number % 1000:06d}" / f"{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pictures.png(image))
    return folder


def coloured_digits() -> Images:
    """scikit-learn's digits (N, 3, 8, 8), each in a colour of its own on black: pictures for a quick run."""
    data, random = load_digits(), torch.Generator().manual_seed(0)

    def dyed(grey: Tensor) -> Tensor:
        return (grey + 1) * (0.4 + 0.6 * torch.rand(len(grey), 3, 1, 1, generator=random)) - 1

    return Images(dyed(data.train), dyed(data.test), data.train_labels, data.test_labels)


def claims(rows: Sequence[Row]) -> list[Row]:
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
            found.append(claim(text, best[0] < other[0] and best[1] > other[1], ours=best, other=other))
    raw = means["standard", "own"]
    for (name, discriminator), ours in means.items():
        if name in ("DDLS", "DGflow", "refine", "refine, fixed steps"):
            text = f"{name} with the {discriminator} D has a lower Frechet distance than the generator"
            found.append(claim(text, ours[0] < raw[0], standard=raw, ours=ours))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
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
        ours, scores = (ratio(key, name, discriminator) for key in ("frechet_distance", "classifier_score"))
        found += [
            against(case, "distance / generator's", distance, ours, "lower", headline=headline),
            against(case, "score / generator's", score, scores, "higher"),
        ]
    return found


def not_run(recipe: Recipe, seed: int) -> list[Row]:
    """A row for each published network that this run leaves out."""
    missing = [(name, r) for name, r in (("DCGAN", DCGAN), ("SNGAN", SNGAN)) if r != recipe]
    head = {"seed": seed, "status": "not run", "wants": "a GPU"}
    return [{**head, "name": name, "recipe": f"cifar10.{name}", "steps": r.checkpoints[0]} for name, r in missing]


def draw(run: Run, rows: Sequence[Row]) -> None:
    """The first samples: raw, refined with D as it is, refined with the shaped one; below, its logit of the last ones."""
    table = Discriminators(run, run.seeds[0])
    wanted = {"generator": ("own", "standard"), "refined": ("own", "refine"), "shaped": ("shaped", "refine")}
    shown = {label: table.images({"discriminator": d}, name) for label, (d, name) in wanted.items()}
    refiner = table.refiner(ways(run.recipe)["refine"], table.generator, table.by_name["shaped"])
    title = "same latents: as generated, refined with D as it is, refined with D shaped"
    plots.tiles(run.outdir / "cifar10.png", shown, refiner.score(shown["shaped"]), title)
