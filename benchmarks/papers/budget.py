"""Quality for a budget: distance to the real data against evaluations of D for each image. No paper shows it.

Collaborative refinement (nonsaturating) of trained pairs, stopped at the median real logit or after at most K steps, which
with the evaluation of the proposal are K + 1 evaluations: a budget. A budget of 1 scores an image and leaves it as it is. An
evaluation is a forward pass; "gradients" are those whose gradient moved the sample. Not counted: the threshold of the stop
rule (D of the real images) and the first step of Barzilai-Borwein (an evaluation for each slot), both once for each pair.
Pairs: the demo's digits and MNIST at their recipe's layer, and [CS]'s imbalanced ring in data space.

Methods: fixed steps and backtracking with the recipe's step size, Adam with one for all, Barzilai-Borwein with the scale that
it finds by itself; and the generator that was distilled from the last, alone and with steps after it. Of images also the
samplers that move the latent, without a stop rule: as given, and as ``fr.tune_sampler`` sets them by the features of a second
classifier, on training images and other seeds. The row at the budget of tuning has the tuned number of steps; those at
``longer`` have the same setting and all steps.

Discriminators: as it is, and shaped: with backtracking for the first three methods and the samplers, with Barzilai-Borwein for
the others, and for a distilled generator also on what it gives. What shaping and distilling cost, once for each pair, is told
in "training". Seeds are training seeds: of the GAN, of shaping, distilling and sampling.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import cases, plots
from benchmarks.papers.cells import checkpoints, trained_judge
from benchmarks.papers.plane import IMBALANCED8, RING
from benchmarks.papers.result_file import Row, claim, mean, pick
from benchmarks.papers.run import Recipe, Run, Table
from fastrefine.demo.gan import Trainer, Training, build, images_of, normal
from fastrefine.demo.recipes import DIGITS, MNIST, embedded
from fastrefine.demo.recipes import Recipe as Demo
from fastrefine.metrics import frechet_distance
from fastrefine.models.digits import classify
from fastrefine.samplers import Sampler
from fastrefine.training.distil import refiner_of

FRECHET, JS = "frechet_distance", "jensen_shannon"
GENERATOR, FIXED, BACKTRACKING, ADAM = "generator", "fixed steps", "backtracking", "Adam"
CURVATURE, DISTILLED = "Barzilai-Borwein", "distilled"
METHODS = (FIXED, BACKTRACKING, ADAM, CURVATURE)
OWN, SHAPED = "as it is", "shaped"
JUDGE = 0  # seeds the one classifier that judges a data set; the next seed that which chooses
GLOBAL = "MALA, every 5th from the prior"
SAMPLERS: dict[str, Sampler] = {  # the search for a step size begins at theirs
    "DDLS": fr.DDLS(0.01, 0.1), "MALA": fr.MALA(0.01), GLOBAL: fr.MALA(0.01, global_every=5), "PCN": fr.PCN(0.01),
    "DGflow": fr.DGflow(0.1), "DOT": fr.DOT(0.1),
}  # fmt: skip
GIVEN = " as given"  # behind the name of a sampler that was not tuned
NOISE = 0.02  # of a distance; less is taken for noise


@dataclass(frozen=True)
class Part:
    """What belongs to one pair. seeds: of training, empty for all of the run. samples: of a row.

    step_size: of fixed steps and backtracking. shaping_*: iterations, batch, learning rate; shaping_most: the most steps of a
    batch that D is shaped on, by Barzilai-Borwein and by backtracking, the former also of what is learned. distil: arguments
    of ``fr.distil``. tuned_by: samples that ``fr.tune_sampler`` begins with.
    """

    samples: int
    step_size: float
    shaping: tuple[int, int, float]
    shaping_most: tuple[int, int]
    distil: dict[str, Any]
    seeds: tuple[int, ...] = ()
    tuned_by: int = 50


def _of_images(demo: Demo, samples: int, most: int, distil: dict[str, Any], **changes: Any) -> Part:
    shaping = (demo.shaping_iterations, demo.shaping_batch, demo.shaping_rate)
    return Part(samples, demo.step_size, shaping, (most, demo.max_steps), distil, **changes)


_DIGITS = dict(pairs=20_000, rounds=2, iterations=4000)
_MNIST = dict(pairs=6000, rounds=1, iterations=1500, batch_size=64)
# budgets: evaluations of D for each image, at most; further: those after a distilled generator. adam: its step size, not
# tuned. ring_steps: as in `steps`. judged_after: training steps of the classifiers. parts: the pairs by name. samplers: by
# discriminator; tuning: budget of ``fr.tune_sampler``; longer: further budgets of the tuned, by discriminator.
FULL = Recipe(
    plane=RING,
    own=dict(
        methods=METHODS, budgets=(0, 1, 2, 3, 4, 5, 10, 25, 50), further=(0, 1, 2, 3, 4, 5), adam=0.1, resamples=40,
        samplers={OWN: tuple(SAMPLERS), SHAPED: ("DDLS", GLOBAL, "DGflow")}, tuning=25,
        longer={OWN: (50,), SHAPED: (50,)},
        ring_steps=3000, judged_after={"digits": DIGITS.classifier_steps, "mnist": MNIST.classifier_steps},
        parts={
            "digits": _of_images(DIGITS, 4000, 4, _DIGITS, tuned_by=200),
            "ring": Part(5000, 1.0, (300, 500, 8e-3), (4, 20), dict(pairs=5000, rounds=2, iterations=1500)),
            "MNIST": _of_images(MNIST, 1000, 9, _MNIST),
            "digits, converged": _of_images(DIGITS, 4000, 4, _DIGITS, tuned_by=200),
            "MNIST, converged": _of_images(MNIST, 1000, 9, _MNIST, seeds=(0,)),
        },
    ),
)  # fmt: skip
QUICK = FULL.but(
    methods=(BACKTRACKING, CURVATURE), budgets=(0, 1, 4, 31), further=(0, 1), resamples=5, judged_after={"digits": 100},
    samplers={OWN: ("DDLS",), SHAPED: ("DDLS",)}, tuning=10, longer={OWN: (12,), SHAPED: (12,)},
    parts={"digits": Part(150, DIGITS.step_size, (12, 128, 1e-4), (3, 30), dict(pairs=300, rounds=1, iterations=40))},
)  # fmt: skip
REDUCTIONS = ()


@dataclass(frozen=True)
class Pair:
    """A trained pair, where and by what it is refined, and how its samples are measured."""

    name: str
    generator: nn.Module
    discriminator: nn.Module
    empty: Callable[[], nn.Module]
    at: str
    prior: fr.Normal
    real: Tensor
    reference: int  # real samples whose logits stop
    num_slots: int
    shaping: dict[str, Any]
    metric: str
    features: str
    embed: Callable[[Tensor], Tensor]  # samples -> what the metric reads
    distance: Callable[[Tensor], float]
    choose: Callable[[Tensor], Tensor] = lambda samples: samples  # what a choice is made by
    also: Callable[[int, Tensor], Row] = lambda budget, samples: {}  # further figures of a point

    def refiner(self, method: str, part: Part, adam: float, steps: int) -> fr.Refiner:
        """The pair refined by a method with D as it is."""
        if method in SAMPLERS:
            return fr.Refiner(
                self.generator, self.discriminator, SAMPLERS[method], at="input", prior=self.prior, max_steps=steps,
                num_slots=self.num_slots,
            )  # fmt: skip
        samplers = {
            FIXED: fr.Collaborative(part.step_size, control="fixed"), ADAM: fr.Collaborative(adam, optimizer="adam"),
            BACKTRACKING: fr.Collaborative(part.step_size), CURVATURE: fr.Collaborative(),
        }  # fmt: skip
        return fr.Refiner(
            self.generator, self.discriminator, samplers[method], at=self.at, prior=self.prior, max_steps=steps,
            real=self.real[: self.reference], stop=fr.stopping.MedianOfReal(), num_slots=self.num_slots,
        )  # fmt: skip

    def measured(self, samples: Tensor, resamples: int) -> Row:
        """The distance, and its 5 % and 95 % quantile over resampled samples, shifted by the bias of resampling."""
        x, random = self.embed(samples), torch.Generator().manual_seed(0)
        value = self.distance(x)
        drawn = torch.tensor([
            self.distance(x[torch.randint(len(x), (len(x),), generator=random)]) for _ in range(resamples)
        ], dtype=torch.float64)  # fmt: skip
        low, high = (value + float(q - drawn.mean()) for q in drawn.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)))
        return {"features": self.features, "metric": self.metric, "value": value, "low": low, "high": high}


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Of every pair; those of MNIST where its folder is given."""
    for name, part in run.recipe.parts.items():
        if (part.seeds and seed not in part.seeds) or (name.startswith("MNIST") and run.data is None):
            continue
        table = Table(run.cells(), run.recipe, seed)
        yield from Curves(run, table, _ring(table) if name == "ring" else _images(run, table, name), part).rows()


class Curves:
    """The rows of one pair and training seed."""

    def __init__(self, run: Run, table: Table, pair: Pair, part: Part):
        self.run, self.table, self.pair, self.part, self.raw = run, table, pair, part, 0.0
        self.shaped: dict[str, nn.Module] = {}
        self.sizes: dict[tuple[str, str], float] = {}  # tuned step sizes by sampler and discriminator

    def rows(self) -> Iterator[Row]:
        recipe = self.run.recipe
        yield from self.curve(GENERATOR, "none", self.refiner(BACKTRACKING, 0), (0,))
        for method in recipe.methods:
            own = self.refiner(method, max(recipe.budgets) - 1)
            shaped = self._shaped(CURVATURE if method == CURVATURE else BACKTRACKING)
            for name, one in ((OWN, own), (SHAPED, own.with_discriminator(shaped))):
                yield from self.curve(method, name, one, recipe.budgets[1:])
                if method == CURVATURE:
                    make = functools.partial(self.distilled, name, one)
                    yield from self.curve(DISTILLED, name, make, recipe.further)
                    self.tell(f"distilled, D {name}")
        if self.pair.metric == FRECHET:
            yield from self.samplers(OWN, self.pair.discriminator)
            yield from self.samplers(SHAPED, self._shaped(BACKTRACKING))

    def samplers(self, name: str, discriminator: nn.Module) -> Iterator[Row]:
        """Of the samplers that move the latent, tuned and not."""
        recipe = self.run.recipe
        budget = recipe.tuning
        for method in recipe.samplers[name]:
            one = self.refiner(method, budget - 1).with_discriminator(discriminator)
            yield from self.curve(method + GIVEN, name, one, (budget,))
            sampler, steps = self.tuned(one, method, name)
            further = {number: number - 1 for number in recipe.longer[name]}
            yield from self.curve(method, name, one.replaced(sampler=sampler), {budget: steps, **further})

    def tuned(self, refiner: fr.Refiner, method: str, discriminator: str) -> tuple[Sampler, int]:
        """The tuned sampler of a refiner, and its number of steps."""
        budget, real, choose = self.run.recipe.tuning, self.pair.real[:5000], self.pair.choose

        def tune() -> Row:
            tuned = fr.tune_sampler(refiner, real, budget, samples=self.part.tuned_by, seed=self.table.seed, features=choose)
            mine = {f.name: getattr(tuned.sampler, f.name) for f in fields(tuned.sampler)}  # type: ignore[arg-type]
            return {
                "setting": {key: value for key, value in mine.items() if value != getattr(refiner.sampler, key)},
                "steps": tuned.max_steps, "quality": tuned.quality, "evaluations": tuned.evaluations, "seconds": tuned.seconds,
            }  # fmt: skip

        row = self.table.cells.row(f"tuned {self.pair.name} {self.table.seed} {method}, D {discriminator}", tune)
        facts = {"pair": self.pair.name, "seed": self.table.seed, "method": method, "discriminator": discriminator}
        self.run.extra.setdefault("tuning", []).append(facts | row)
        sampler = replace(refiner.sampler, **row["setting"])  # type: ignore[type-var]
        self.sizes[method, discriminator] = sampler.step_size  # type: ignore[attr-defined]
        return sampler, row["steps"]

    def refiner(self, method: str, steps: int) -> fr.Refiner:
        return self.pair.refiner(method, self.part, self.run.recipe.adam, steps)

    def curve(
        self, method: str, name: str, refiner: fr.Refiner | Callable[[], fr.Refiner], budgets: Sequence[int] | Mapping[int, int]
    ) -> list[Row]:
        """The distance at each budget, from one run. budgets: with their numbers of steps, where these are not one less."""
        facts = {"pair": self.pair.name, "method": method, "discriminator": name}
        steps = budgets if isinstance(budgets, Mapping) else {budget: max(budget - 1, 0) for budget in budgets}
        numbers, found = sorted({*steps.values()}), {}

        def make() -> tuple[dict[str, Tensor], Row]:
            one = refiner if isinstance(refiner, fr.Refiner) else refiner()
            out = one.replaced(max_steps=numbers[-1]).sample(self.part.samples, seed=self.table.seed, snapshots=numbers)
            points = []
            for budget, k in steps.items():
                images = out.snapshots[k].images
                if k not in found:
                    found[k] = self.pair.measured(images, self.run.recipe.resamples)
                gradients = float(out.steps.clamp(max=k).double().mean())
                points.append({
                    "budget": budget, "most_steps": k, "evaluations": gradients + 1 if budget else 0.0, "gradients": gradients,
                    **found[k], **self.pair.also(budget, images),
                })  # fmt: skip
            return {}, {"points": points}

        points = self.table.kept(facts, make)["points"]
        self.raw = self.raw or points[0]["value"]
        return [{"seed": self.table.seed, **facts, **point, "relative": point["value"] / self.raw} for point in points]

    def _shaped(self, method: str) -> nn.Module:
        """D shaped with a method."""
        if method not in self.shaped:
            pair, (iterations, batch, rate), started = self.pair, self.part.shaping, time.perf_counter()
            few = self.refiner(method, self.part.shaping_most[method == BACKTRACKING])
            self.shaped[method] = self.table.trained(
                f"{pair.name}-{method}", pair.empty(), few, pair.real, iterations=iterations, batch=batch, rate=rate,
                stop=few.stop, **pair.shaping,
            )  # fmt: skip
            self._cost(f"D shaped by {method}", started, iterations * batch * (few.max_steps + 3))
            self.tell(f"D shaped by {method}")
        return self.shaped[method]

    def distilled(self, name: str, one: fr.Refiner) -> fr.Refiner:
        """The refiner of what a map gives that was learned from ``one``; as it is: D is not shaped afterwards,
        and one round of a quarter of the iterations shows it."""
        started, most = time.perf_counter(), self.part.shaping_most[0]
        iterations, batch, rate = self.part.shaping if name == SHAPED else (0, 1, 1.0)
        options = self.part.distil | (
            {} if name == SHAPED else {"rounds": 1, "iterations": self.part.distil["iterations"] // 4}
        )
        teacher = one.replaced(max_steps=most)
        g = fr.distil(
            teacher, seed=self.table.seed, real=self.pair.real, **options,
            shaping=dict(iterations=iterations, batch_size=batch, learning_rate=rate, **self.pair.shaping),
        )  # fmt: skip
        each = options["pairs"] * (most + 1) + iterations * batch * (most + 3)
        facts = {key: g.report[key] for key in ("width", "flops_share", "held_out_error")}
        self._cost(f"distilled, D {name}", started, options["rounds"] * each, **facts)
        return refiner_of(g, teacher)

    def _cost(self, what: str, started: float, evaluations: int, **facts: Any) -> None:
        """Keep what was made once for the pair: its seconds, and the most evaluations of D that it can have taken."""
        facts = {"evaluations_at_most": evaluations, "seconds": time.perf_counter() - started, **facts}
        self.table.cells.row(self._key(what), lambda: facts)

    def tell(self, what: str) -> None:
        facts = {"pair": self.pair.name, "seed": self.table.seed, "what": what}
        self.run.extra.setdefault("training", []).append(facts | self.table.cells.row(self._key(what), dict))

    def _key(self, what: str) -> str:
        return "-".join(("cost", str(self.table.seed), self.pair.name, what))


def _images(run: Run, table: Table, name: str) -> Pair:
    demo = MNIST if name.startswith("MNIST") else DIGITS
    data = demo.load(run.data if demo is MNIST else None)
    cells = run.cells(run.recipe.but(name=demo.name))  # each set has a classifier of its own
    judge, chooser = (
        trained_judge(cells, demo.classifier, data, seed=seed, steps=run.recipe.judged_after[demo.name])
        for seed in (JUDGE, JUDGE + 1)
    )
    run.judged(demo.name, judge.accuracy)
    steps = demo.converged_steps if name.endswith("converged") else demo.early_steps
    g, d = embedded(demo) if steps == demo.early_steps and table.seed == 0 else _trained(table, demo, data.train, steps)
    return Pair(
        name, g, d, lambda: build(demo.discriminator, 0), demo.at, fr.Normal(demo.latent), data.train, demo.reference,
        demo.num_slots, dict(betas=(0.5, 0.9)), FRECHET, "own classifier, penultimate layer",
        lambda x: classify(judge.classifier, x)[0], lambda x: frechet_distance(x, judge.reference),
        lambda x: classify(chooser.classifier, x)[0],
    )  # fmt: skip


def _ring(table: Table) -> Pair:
    case = cases.ring(table, table.recipe.plane, table.recipe.ring_steps)
    return Pair(
        case.name, case.generator, case.discriminator, lambda: table.recipe.plane.networks(0)[1], case.at,
        fr.Normal(case.latent), case.real, len(case.real), case.num_slots, dict(optimizer="sgd"), JS, "shares of components",
        lambda x: x, lambda x: IMBALANCED8.measure(x)["js"],
    )  # fmt: skip


def _trained(table: Table, demo: Demo, real: Tensor, steps: int) -> tuple[nn.Module, nn.Module]:
    """The pair of a training seed after so many steps."""
    seed, training = table.seed, Training(64, "adam", demo.learning_rate, r1=demo.r1)

    def make() -> Trainer:
        g, d = build(demo.generator, seed), build(demo.discriminator, seed + 100)
        return Trainer(g, d, images_of(real), normal(demo.latent), training, seed)

    return checkpoints(table.cells, f"{demo.name}-{seed}", make, (steps,))[steps]


def comparison(rows: Sequence[Row]) -> list[Row]:
    """No paper has these figures."""
    return []


def claims(rows: Sequence[Row]) -> list[Row]:
    """Of early-stopped pairs by shaped discriminators, against backtracking's greatest budget."""
    found = []
    for pair, most, share in (("digits", 5, 5), ("MNIST", 10, 2)):
        mine = [row for row in rows if row["pair"] == pair and row["discriminator"] != OWN]
        if not mine:
            continue

        def values(method: str, limit: float, key: str = "value", mine: list[Row] = mine) -> list[float]:
            """Of each seed, at the greatest budget within the limit."""
            budget = max(row["budget"] for row in mine if row["method"] == method and row["budget"] <= limit)
            return pick(mine, key, method=method, budget=budget)

        raw, full, few = values(GENERATOR, 0), values(BACKTRACKING, math.inf), values(CURVATURE, most)
        alone, after = values(DISTILLED, 0), values(DISTILLED, most)
        text = f"{pair}: {CURVATURE} within {most} evaluations"
        found += [
            _below(f"{text} is within 5 % of {BACKTRACKING} with the greatest budget, mean over seeds", few, full, 1.05),
            _below(f"{text} is within 10 % of it for every seed", few, full, 1.1, every=True),
            _below(
                f"{pair}: it costs at most 1/{share} of the evaluations", values(CURVATURE, most, "evaluations"),
                values(BACKTRACKING, math.inf, "evaluations"), 1 / share, quality="evaluations",
            ),
            _below(
                f"{pair}: a distilled generator alone keeps 90 % of {BACKTRACKING}'s gain, mean over seeds",
                [r - a for r, a in zip(raw, full, strict=True)], [r - a for r, a in zip(raw, alone, strict=True)], 1 / 0.9,
                quality="gain",
            ),
            _below(
                f"{pair}: with at most 4 steps after it, it is within 10 % of {BACKTRACKING} for every seed", after, full, 1.1,
                every=True,
            ),
        ]  # fmt: skip
    return found + tuning_claims(rows)


def tuning_claims(rows: Sequence[Row]) -> list[Row]:
    """Whether tuned samplers are better than those given on seeds that the search did not see, mean over training seeds.

    Of each sampler and D, and of each pair: the geometric mean of tuned / given over its samplers and seeds.
    """
    found, given = [], [row for row in rows if row["method"].endswith(GIVEN)]
    ratios: dict[str, list[float]] = {}
    for pair, name, d in dict.fromkeys((row["pair"], row["method"], row["discriminator"]) for row in given):
        budget, method = given[0]["budget"], name.removesuffix(GIVEN)
        ours, theirs = (pick(rows, "value", pair=pair, method=one, discriminator=d, budget=budget) for one in (method, name))
        text = f"{pair}: tuned {method}, D {d}, is better than as given, within {budget} evaluations"
        found.append(_below(text, ours, theirs, 1 - NOISE))
        ratios.setdefault(pair, []).extend(a / b for a, b in zip(ours, theirs, strict=True))
    for pair, mine in ratios.items():
        text = f"{pair}: tuned samplers are better than as given, geometric mean"
        ratio = geometric_mean(mine)
        found.append(claim(text, ratio < 1 - NOISE, ours=ratio, theirs=1.0, best=min(mine), worst=max(mine)))
    return found


def _below(text: str, ours: list[float], theirs: list[float], factor: float, every: bool = False, quality: str = "") -> Row:
    """Whether ours, of each seed, is at most ``factor`` times theirs: in the mean, or every one."""
    pairs = list(zip(ours, theirs, strict=True)) if every else [(fmean(ours), fmean(theirs))]
    holds = all(a <= factor * b for a, b in pairs)
    return claim(text, holds, quality=quality or "distance", ours=fmean(ours), theirs=fmean(theirs), of_seeds=[ours, theirs])


def draw(run: Run, rows: Sequence[Row]) -> None:
    """A panel for each pair, means over seeds."""
    panels = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axes = plots.subplots(1, len(panels) + 1, 3.0, 3.2)  # the last one is for the legend
    colours = dict(zip((*METHODS, DISTILLED), ("tab:grey", "tab:blue", "tab:green", "tab:red", "black"), strict=True))
    for axis, pair in zip(axes[0], panels, strict=False):
        for method, colour in colours.items():
            for name, style in ((SHAPED, "-"), (OWN, ":")):
                mine = [r for r in rows if (r["pair"], r["method"], r["discriminator"]) == (pair, method, name)]
                if not mine:
                    continue
                xs, ys = (list(cases.curve(mine, "budget", key).values()) for key in ("evaluations", "value"))
                axis.plot(xs, ys, style, color=colour, marker=".", linewidth=1.2, label=f"{method}, D {name}")
        axis.axhline(mean(rows, "value", pair=pair, method=GENERATOR), color="tab:orange", linewidth=0.8, label=GENERATOR)
        metric = next(row["metric"] for row in rows if row["pair"] == pair).replace("_", " ")
        plots.plain(axis, pair, "evaluations of D for each image", metric)
        axis.set_xscale("symlog", linthresh=5)
        axis.set_yscale("log")
        axis.set_xlim(-0.5, 55)
        axis.set_xticks(ticks := (0, 1, 2, 3, 4, 5, 10, 25, 50), map(str, ticks))
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted("{x:g}")
    axes[0, -1].axis("off")
    axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="center left")
    figure.tight_layout()
    plots.save(figure, run.outdir / "budget.png")
