"""Quality for a budget on colour images: as ``budget``, for one CIFAR-10 DCGAN, with tuned samplers and two judges.

The DCGAN is that of ``cifar10``, but with normal latents (PCN is for these) and in float32. Judges: the classifier that is
trained here ("value"), and EfficientNet-Lite0, which was trained on ImageNet (``EFFICIENTNET``, of the budgets in
``judged_twice``). D is built on neither. Both compare with the test set; "real" in the record is what as many training images
have.

Nothing is chosen by what is reported. A second classifier, narrower and of another seed, compares with training images, on
seeds from 1,000,000 on. It chooses among ``shapings``, each of which goes on in rounds until it gets no better, and with that
the place of refinement. One of them begins with a D that is fitted first (``FITTED``), the others with that of the GAN. And
``fr.tune_sampler`` chooses by its features the step sizes of all methods but Barzilai-Borwein, which finds its own: with D as
it is, and shaped. What was tried is told in "shaping" and "tuning". Fixed steps, backtracking, Adam and Barzilai-Borwein refine
at the chosen place until the median real logit; the samplers move the latent, without a stop rule. Their row at the budget of
tuning has the tuned number of steps; that at ``longer`` has the same setting and all steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import ex2mcmc_rows
from benchmarks.papers.budget import (
    ADAM,
    BACKTRACKING,
    CURVATURE,
    DISTILLED,
    FRECHET,
    GENERATOR,
    JUDGE,
    METHODS,
    NOISE,
    OWN,
    SAMPLERS,
    SHAPED,
    Curves,
    Pair,
    Part,
    draw,
    tuning_claims,
)
from benchmarks.papers.cells import Cells, checkpoints, trained_judge
from benchmarks.papers.cifar10 import FULL as DCGAN
from benchmarks.papers.cifar10 import QUICK as SMALL
from benchmarks.papers.cifar10 import coloured_digits
from benchmarks.papers.image_networks import HingeTrainer, PictureClassifier, networks_of
from benchmarks.papers.pictures import load_cifar10
from benchmarks.papers.result_file import Row, against, claim, pick
from benchmarks.papers.run import Recipe, Run, Table
from fastrefine.datasets import Images
from fastrefine.demo import gan
from fastrefine.demo.gan import build
from fastrefine.demo.judge import Judge
from fastrefine.metrics import frechet_distance
from fastrefine.models import default_discriminator
from fastrefine.models.digits import classify
from fastrefine.models.pretrained import EFFICIENTNET as BACKBONE
from fastrefine.production.evaluation import given_features
from fastrefine.production.tuning import FIRST_SEED

__all__ = ["FULL", "QUICK", "REDUCTIONS", "claims", "comparison", "draw", "rows"]
EFFICIENTNET = "frechet_distance_efficientnet"
FITTED = "fitted"  # a D without BatchNorm, trained from the beginning on real images against raw samples
GOALS = {"the best method": 0.6, "DDLS": 0.75}  # of the generator's distance


@dataclass(frozen=True)
class Shaping:
    """A way to shape D: at a place, on samples that a method refined by at most so many steps, for at most so many rounds.

    uniform: samples leave at a uniformly drawn step, else at the median real logit. start: which D is shaped.
    """

    at: str
    method: str
    most: int
    rate: float
    rounds: int = 1
    uniform: bool = False
    start: str = OWN

    @property
    def name(self) -> str:
        left = "a uniform step" if self.uniform else "the median"
        text = f"{self.method} at {self.at}, {self.most} steps, left at {left}, rate {self.rate:g}"
        return text if self.start == OWN else f"D {self.start}, {text}"


# chooser: (width, features, training steps) of the classifier that chooses. held_out: (samples, numbers of steps) of a choice.
# samplers: by discriminator; longer: further budgets of theirs; peers: those of ex2mcmc. tuning: budget of
# ``fr.tune_sampler``. catch_up: further updates of D alone at the end. fitted: width and iterations of that D. part.shaping:
# but for the rate. The 12,000 iterations of the GAN took 29 minutes of one shared core.
FULL = Recipe(
    network=DCGAN.network, size=DCGAN.size, latent=DCGAN.latent, features=DCGAN.features, checkpoints=DCGAN.checkpoints,
    training=replace(DCGAN.training, bfloat16=False), classifier_width=32, classifier_steps=1500, reference=500, num_slots=100,
    own=dict(
        methods=METHODS, samplers={OWN: tuple(SAMPLERS), SHAPED: ("DDLS", "DGflow", "DOT")},
        budgets=(0, 1, 2, 5, 10, 25, 50), further=(0, 1, 2, 5, 10),
        judged_twice=(0, 25, 50, 200), reference_twice=5000, tuning=25, longer={OWN: (50, 200), SHAPED: (50,)},
        peers=(25, 50, 200), adam=0.1, resamples=20,
        chooser=(16, 32, 1000), catch_up=0, held_out=(500, (4, 9, 19, 49)), fitted=(32, 3000),
        shapings=(
            Shaping("5", ADAM, 9, 5e-4, uniform=True), Shaping("8", ADAM, 9, 5e-4, uniform=True),
            Shaping("5", CURVATURE, 9, 5e-4, uniform=True), Shaping("2", BACKTRACKING, 20, 2e-4, uniform=True),
            Shaping("8", CURVATURE, 9, 1e-4, rounds=2), Shaping("8", CURVATURE, 20, 1e-4, rounds=4, start=FITTED),
            Shaping("5", CURVATURE, 20, 1e-4, start=FITTED),
        ),
        part=Part(1000, 0.3, (250, 64, 2e-4), (9, 9), dict(pairs=4000, rounds=1, iterations=600, batch_size=64)),
    ),
)  # fmt: skip
QUICK = replace(
    FULL, size=SMALL.size, latent=SMALL.latent, features=SMALL.features, checkpoints=SMALL.checkpoints,
    training=SMALL.training, classifier_width=8, classifier_steps=40, reference=150, num_slots=50,
).but(
    methods=(BACKTRACKING, CURVATURE), samplers={OWN: ("MALA",), SHAPED: ("DDLS",)}, budgets=(0, 1, 4, 10),
    further=(0, 1), judged_twice=(0, 10), tuning=10, longer={OWN: (12,), SHAPED: (12,)}, peers=(10,), resamples=5,
    reference_twice=100, chooser=(4, 8, 40), held_out=(60, (3, 9)), fitted=(8, 30),
    shapings=(
        Shaping("0", CURVATURE, 4, 1e-3, rounds=2), Shaping("3", BACKTRACKING, 8, 1e-3, uniform=True),
        Shaping("3", CURVATURE, 4, 1e-3, start=FITTED),
    ),
    part=Part(60, 1.0, (10, 30, 1e-3), (4, 8), dict(pairs=100, rounds=1, iterations=40)),
)  # fmt: skip
REDUCTIONS = ()


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Of the pair, then of the package ex2mcmc where it is installed."""
    recipe, table = run.recipe, Table(run.cells(), run.recipe, seed)
    data = coloured_digits() if run.data is None or run.quick else load_cifar10(run.data)
    cells = run.cells(replace(recipe, name="networks", own={}))
    (width, features, steps), wide = recipe.chooser, recipe.classifier_width
    judge = _judge(run, cells, data, JUDGE, "judges", recipe.classifier_steps, width=wide)
    chooser = _judge(run, cells, data, JUDGE + 1, "chooses", steps, width=width, features=features)
    pair = _pair(recipe, table, cells, data, judge, chooser)
    real = data.train[: recipe.part.samples]
    run.extra["real"] = table.cells.row("real", lambda: pair.measured(real, recipe.resamples) | pair.also(0, real))
    curves = _Curves(run, table, pair, _Chosen(run, table, pair))
    yield from curves.rows()
    yield from ex2mcmc_rows.rows(curves, curves.sizes["MALA", OWN], recipe.peers)


def _judge(run: Run, cells: Cells, data: Images, seed: int, what: str, steps: int, **sizes: int) -> Judge:
    def make() -> PictureClassifier:
        return PictureClassifier(run.recipe.size, bfloat16=False, **sizes)

    judge = trained_judge(cells, make, data, seed=seed, steps=steps, batch_size=100, noise=0.05)
    run.judged(what, judge.accuracy)
    return judge


def _pair(recipe: Recipe, table: Table, cells: Cells, data: Images, judge: Judge, chooser: Judge) -> Pair:
    seed, backbone = table.seed, given_features(BACKBONE)

    def trainer() -> gan.Trainer:
        pair = networks_of(recipe, seed)
        for network in pair:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return (HingeTrainer if recipe.network == "sngan" else gan.Trainer)(
            *pair, gan.images_of(data.train), gan.normal(recipe.latent), recipe.training, seed
        )

    (steps,) = recipe.checkpoints
    g, d = checkpoints(cells, f"gan-{seed}", trainer, (steps,))[steps]
    if recipe.catch_up:
        own = HingeTrainer(g, d, gan.images_of(data.train), gan.normal(recipe.latent), recipe.training, seed)
        d = cells.network(f"caught-up-{seed}", networks_of(recipe, seed)[1], lambda: own.catch_up(recipe.catch_up))
    kept = cells.tensors("efficientnet", lambda: {"features": backbone(data.test[: recipe.reference_twice])[0]})

    def also(budget: int, images: Tensor) -> Row:
        if budget not in recipe.judged_twice:
            return {}
        return {EFFICIENTNET: frechet_distance(backbone(images)[0], kept["features"])}

    return Pair(
        "CIFAR-10", g, d, lambda: networks_of(recipe, seed)[1], recipe.shapings[0].at, fr.Normal(recipe.latent), data.train,
        recipe.reference, recipe.num_slots, dict(betas=(0.5, 0.9)), FRECHET, "own classifier, penultimate layer",
        lambda x: classify(judge.classifier, x)[0], lambda x: frechet_distance(x, judge.reference),
        lambda x: classify(chooser.classifier, x)[0], also,
    )  # fmt: skip


class _Chosen:
    """What is chosen by the classifier that reports nothing."""

    def __init__(self, run: Run, table: Table, pair: Pair):
        self.run, self.table, self.pair = run, table, pair

    def discriminator(self) -> tuple[Shaping, nn.Module]:
        """The best way to shape D, and the shaped one."""
        tried: list[tuple[float, Shaping, nn.Module]] = []
        wanted = self.pair.choose(self.pair.real[:5000])
        for shaping in self.run.recipe.shapings:
            tried += self._rounds(shaping, wanted)
        return min(tried, key=lambda one: one[0])[1:]

    def _unfitted(self) -> nn.Module:
        return build(lambda: default_discriminator(tuple(self.pair.real.shape[1:]), self.run.recipe.fitted[0]), self.table.seed)

    def fitted(self) -> nn.Module:
        """D fitted to raw samples."""
        table, pair, started = self.table, self.pair, time.perf_counter()
        d = table.cells.network(f"{table.seed}-fitted", self._unfitted(), lambda: fr.fit_discriminator(
            pair.generator, pair.real, self.run.recipe.fitted[1], prior=pair.prior, discriminator=self._unfitted(),
            check_every=250, patience=4, seed=table.seed,
        ))  # fmt: skip
        self._tell("fitting", table.cells.row(f"fitted-{table.seed}", lambda: {"seconds": time.perf_counter() - started}))
        return d

    def _rounds(self, shaping: Shaping, wanted: Tensor) -> Iterator[tuple[float, Shaping, nn.Module]]:
        """(distance, shaping, D) after each round, as long as the distance falls."""
        recipe, table, best = self.run.recipe, self.table, math.inf
        d, empty = self.pair.discriminator, self.pair.empty
        if shaping.start == FITTED:
            d, empty = self.fitted(), self._unfitted
        (iterations, batch, _), (samples, numbers) = recipe.part.shaping, recipe.held_out
        refiner = replace(self.pair, at=shaping.at).refiner(shaping.method, recipe.part, recipe.adam, shaping.most)
        for number in range(shaping.rounds):
            key, started = f"{shaping.name}, round {number + 1}", time.perf_counter()
            d = table.trained(
                key, empty(), refiner.with_discriminator(d), self.pair.real, iterations=iterations, batch=batch,
                rate=shaping.rate, stop=None if shaping.uniform else refiner.stop, seed=table.seed + number,
                **self.pair.shaping,
            )  # fmt: skip

            def measured(d: nn.Module = d, started: float = started) -> Row:
                one = refiner.with_discriminator(d).replaced(max_steps=max(numbers))
                out = one.sample(samples, seed=FIRST_SEED, snapshots=numbers)
                found = {k: frechet_distance(self.pair.choose(out.snapshots[k].images), wanted) for k in numbers}
                return {
                    "distance": min(found.values()), "of_steps": list(found.values()), "seconds": time.perf_counter() - started,
                }  # fmt: skip

            row = table.cells.row(f"held out, {key}", measured)
            self._tell("shaping", {"what": shaping.name, "round": number + 1, **row})
            yield row["distance"], shaping, d
            if row["distance"] >= best:
                return
            best = row["distance"]

    def _tell(self, what: str, facts: Row) -> None:
        self.run.extra.setdefault(what, []).append({"seed": self.table.seed, **facts})


class _Curves(Curves):
    """The rows: as of the other pairs, with one shaped D and tuned step sizes, and those of the samplers."""

    def __init__(self, run: Run, table: Table, pair: Pair, chosen: _Chosen):
        shaping, self.best = chosen.discriminator()
        part: Part = run.recipe.part
        part = replace(part, shaping=(*part.shaping[:2], shaping.rate), shaping_most=(shaping.most, shaping.most))
        super().__init__(run, table, replace(pair, at=shaping.at), part)

    def rows(self) -> Iterator[Row]:
        recipe, most = self.run.recipe, max(self.run.recipe.budgets) - 1
        yield from self.curve(GENERATOR, "none", self.refiner(BACKTRACKING, 0), (0,))
        for name, d in ((OWN, self.pair.discriminator), (SHAPED, self.best)):
            for method in recipe.methods:
                one = self.refiner(method, most).with_discriminator(d)
                if method != CURVATURE:
                    one = one.replaced(sampler=self.tuned(one, method, name)[0])
                yield from self.curve(method, name, one, recipe.budgets[1:])
                if method == CURVATURE:
                    yield from self.curve(DISTILLED, name, partial(self.distilled, name, one), recipe.further)
                    self.tell(f"distilled, D {name}")
            yield from self.samplers(name, d)


def comparison(rows: Sequence[Row]) -> list[Row]:
    """The greatest budget's distance relative to the generator's, beside the papers' FID of other networks and more steps."""
    (raw,), found = pick(rows, "value", method=GENERATOR), []
    for case, method, discriminator, published in (
        ("[CS] DCGAN: refine (shaped)", BACKTRACKING, SHAPED, 43 / 50), ("[DDLS] SNGAN: DDLS", "DDLS", OWN, 15.76 / 21.7),
        ("[Ex2] DCGAN: MALA", "MALA", OWN, 23.4 / 28.4),
    ):  # fmt: skip
        ours = [value / raw for value in pick(rows, "value", method=method, discriminator=discriminator)[-1:]]
        found.append(against(case, "distance / generator's", published, ours, "lower"))
    return found


def claims(rows: Sequence[Row]) -> list[Row]:
    """The goals with at most 50 evaluations, by both judges, and what ``budget`` claims."""
    found = []
    few = [row for row in rows if row["budget"] <= 50]
    for key, judge in (("value", "own classifier"), (EFFICIENTNET, "EfficientNet-Lite0")):
        (raw,) = pick(rows, key, method=GENERATOR)
        judged = [row for row in few if key in row and row["method"] != GENERATOR]
        for name, goal in GOALS.items():
            ours = [row for row in judged if not row["method"].startswith(ex2mcmc_rows.PEER)]
            best = min((row for row in ours if name in ("the best method", row["method"])), key=lambda row: row[key])
            found.append(claim(
                f"{judge}: within 50 evaluations {name} lowers the distance by {1 - goal:.0%}", best[key] <= goal * raw,
                ours=best[key], theirs=raw, lowered_by=1 - best[key] / raw, evaluations=best["evaluations"],
                by=f"{best['method']}, D {best['discriminator']}",
            ))  # fmt: skip
        for (name, d), last in {(row["method"], row["discriminator"]): row for row in judged}.items():
            text = f"{judge}: {name}, D {d}, lowers the distance by more than {NOISE:.0%}"
            holds = last[key] < (1 - NOISE) * raw
            found.append(claim(text, holds, ours=last[key], theirs=raw, evaluations=last["evaluations"]))
    return found + tuning_claims(rows)
