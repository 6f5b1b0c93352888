"""[CS] Table 1, Figure 4d: which score of a discriminator tells what Metropolis-Hastings gains with it.

One generator, the imbalanced ring's after 3,000 iterations, and discriminators that learn it from nothing: tuned on its raw
samples, taken out at iterations that grow by a constant factor: by SGD, and by Adam, with which they get much further. Each
is diagnosed on held-out real and raw samples and is then the density ratio of Metropolis-Hastings. Gains are differences to
the raw proposals: of "good" positive is better, of KL and JS negative. The Brier score is lower for the better
discriminator, so that it should go against the gain in good and with those in KL and JS. z is signed, as in [CS]; |z| is
here a score of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import nn

import fastrefine as fr
from benchmarks.papers import plots
from benchmarks.papers.cells import Cells, checkpoints
from benchmarks.papers.plane import IMBALANCED8, LATENT_DIM, RING
from benchmarks.papers.result_file import Row, against, claim, pick
from benchmarks.papers.run import Fresh, Made, Recipe, Run, Table
from fastrefine.errors import InputError

SCORES, GAINS = ("z", "abs_z", "ece", "brier"), ("good", "kl", "js")
REAL, FRESH = 23456, 1000  # seeds the held-out real samples, and added to the seed of a discriminator at its start
LABELS = {"z": "Z", "abs_z": "|Z|", "ece": "ECE", "brier": "Brier"}
PUBLISHED = {"z": (0.02, 0.15, 0.07), "ece": (-0.18, 0.32, 0.31), "brier": (-0.68, 0.51, 0.77)}  # [CS] Table 1, by GAINS


# checkpoints: updates of the GAN. tuned: iterations after which a discriminator is taken out. ladders: by which optimizer and
# learning rate. samples: chains, and the real and the raw samples of a diagnosis.
FULL = Recipe(
    plane=RING, checkpoints=(3000,), shaping_batch=RING.training.batch_size, samples=10_000, chain_length=20,
    own=dict(
        tuned=(10, 16, 25, 40, 63, 100, 158, 251, 398, 631, 1000, 1585, 2512, 3981), ladders=(("sgd", 8e-3), ("adam", 1e-3))
    ),
)  # fmt: skip
QUICK = FULL.but(
    plane=RING.smaller(200), checkpoints=(250,), shaping_batch=200, tuned=(5, 15, 40, 100, 160), ladders=(("sgd", 2.5e-2),),
    samples=1000, chain_length=10,
)  # fmt: skip
REDUCTIONS = ()


class Ladder(Table):
    """A seed's generator, its proposals and the discriminators that learn it."""

    def __init__(self, cells: Cells, recipe: Recipe, seed: int):
        super().__init__(cells, recipe, seed)
        draw, (steps,) = IMBALANCED8.draw, recipe.checkpoints
        pairs = checkpoints(cells, f"gan-{seed}", lambda: recipe.plane.trainer(draw, seed), (steps,))
        self.generator = pairs[steps][0]
        self.real = draw(recipe.samples, torch.Generator().manual_seed(REAL))
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.held_out, self.proposals = (
                self.generator(torch.randn(n, LATENT_DIM, generator=random))
                for n in (recipe.samples, recipe.samples * recipe.chain_length)
            )

    def rows(self) -> Iterator[Row]:
        """One for each discriminator, optimizer by optimizer, in the order of its training."""
        raw = IMBALANCED8.measure(self.proposals)
        for optimizer, rate in self.recipe.ladders:
            d: nn.Module = self.recipe.plane.networks(self.seed + FRESH)[1]
            done = 0
            for iterations in self.recipe.tuned:
                d = self._tuned(d, optimizer, rate, iterations, iterations - done)
                done = iterations
                facts = {"name": f"D tuned {iterations} iterations", "optimizer": optimizer, "iterations": iterations}
                yield self.kept(facts, lambda d=d: self._figures(d, raw))  # type: ignore[misc]

    def _tuned(self, d: nn.Module, optimizer: str, rate: float, iterations: int, more: int) -> nn.Module:
        batch, seed = self.recipe.shaping_batch, self.seed + iterations  # other samples in every stage
        refiner = fr.Refiner(
            self.generator, d, fr.Collaborative(0.1), at="output", prior=fr.Normal(LATENT_DIM), num_slots=batch
        )
        key, (_, empty) = f"D-{optimizer}-{iterations}", self.recipe.plane.networks(0)
        return self.trained(
            key, empty, refiner, Fresh(IMBALANCED8.draw, batch, seed), "tuned", iterations=more, rate=rate, seed=seed,
            optimizer=optimizer,
        )  # fmt: skip

    def _figures(self, d: nn.Module, raw: Row) -> Made:
        with torch.no_grad():
            real, fake, proposed = (d(x) for x in (self.real, self.held_out, self.proposals))
        report = fr.diagnose(real, fake)
        chosen = fr.metropolis_hastings(proposed, self.recipe.chain_length, initial_logits=real, seed=self.seed)
        found = IMBALANCED8.measure(self.proposals[chosen.indices])
        return {}, {
            "brier": report.brier, "z": report.z, "abs_z": abs(report.z), "ece": report.ece,
            **{f"gain_{key}": found[key] - raw[key] for key in GAINS}, **{key: found[key] for key in GAINS},
            **{f"standard_{key}": raw[key] for key in GAINS}, "acceptance": chosen.acceptance_rate,
        }  # fmt: skip


def rows(run: Run, seed: int) -> Iterator[Row]:
    """The ladders of a seed; the correlations over all seeds go into the record."""
    found = list(Ladder(run.cells(), run.recipe, seed).rows())
    run.extra["correlations"] = correlations([*run.rows, *found])
    yield from found


def correlations(rows: Sequence[Row]) -> list[Row]:
    """Of every score with every gain, by optimizer, for each seed and over all ("pooled"): coefficients, two-sided p-values."""
    try:
        from scipy import stats
    except ImportError as error:
        raise InputError("the diagnosis needs SciPy for its p-values: pip install scipy") from error
    found = []
    for optimizer, seed in dict.fromkeys((row["optimizer"], seed) for row in rows for seed in (*_seeds(rows), "pooled")):
        mine = [row for row in rows if row["optimizer"] == optimizer and seed in ("pooled", row["seed"])]
        for score in SCORES:
            for gain in GAINS:
                x, y = pick(mine, score), pick(mine, f"gain_{gain}")
                pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
                found.append({
                    "optimizer": optimizer, "seed": seed, "score": score, "gain": gain, "discriminators": len(mine),
                    "pearson": float(pearson.statistic), "pearson_p": float(pearson.pvalue),
                    "spearman": float(spearman.statistic), "spearman_p": float(spearman.pvalue),
                })  # fmt: skip
    return found


def _seeds(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(row["seed"] for row in rows if row["seed"] != "pooled"))


def _optimizers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["optimizer"] for row in rows))


def claims(rows: Sequence[Row]) -> list[Row]:
    """That the Brier score tells more of each gain than Z and ECE: on the mean over seeds, and over all discriminators."""
    found, table = [], correlations(rows)
    for optimizer in _optimizers(table):
        mine = [row for row in table if row["optimizer"] == optimizer]
        for gain in GAINS:
            for where, of in (("on the mean over seeds", _seeds(table)), ("over all discriminators", ["pooled"])):
                mean = {
                    score: statistics.fmean(pick(mine, "pearson", score=score, gain=gain, seed=s)[0] for s in of)
                    for score in SCORES
                }
                right = mean["brier"] < 0 if gain == "good" else mean["brier"] > 0
                first = all(abs(mean["brier"]) > abs(mean[score]) for score in SCORES if score != "brier")
                sign = "against" if gain == "good" else "with"
                text = f"D by {optimizer}: the Brier score goes {sign} MH's gain in {gain}, more strongly than Z, |Z| and ECE"
                found.append(claim(f"{text} ({where})", right and first, **mean))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """[CS] Table 1 beside the mean over seeds."""
    table, found = correlations(rows), []
    by_seed = [row for row in table if row["seed"] != "pooled"]
    for optimizer in _optimizers(table):
        for score in SCORES:
            for index, gain in enumerate(GAINS):
                published = PUBLISHED[score][index] if score in PUBLISHED else None
                ours = pick(by_seed, "pearson", optimizer=optimizer, score=score, gain=gain)
                headline, case = score == "brier" and gain != "kl", f"{LABELS[score]}, D by {optimizer}"
                found.append(against(case, f"Pearson with MH's gain in {gain}", published, ours, "near", headline=headline))
    return found


def draw(run: Run, rows: Sequence[Row]) -> None:
    """A PNG like [CS] Figure 4d: every gain against every score, a colour for each seed, a marker for each optimizer."""
    figure, axes = plots.subplots(len(GAINS), len(SCORES), 2.0, 1.7)
    for line, gain in zip(axes, GAINS, strict=True):
        for axis, score in zip(line, SCORES, strict=True):
            for (i, seed), (k, optimizer) in product(enumerate(_seeds(rows)), enumerate(_optimizers(rows))):
                x, y = (pick(rows, key, seed=seed, optimizer=optimizer) for key in (score, f"gain_{gain}"))
                axis.scatter(x, y, s=9, color=f"C{i}", marker="o^"[k], label=f"seed {seed}, {optimizer}")
            plots.plain(axis, "", LABELS[score] if gain == GAINS[-1] else "", f"MH's gain in {gain}" if axis is line[0] else "")
    axes[0, -1].legend(fontsize=5)
    figure.tight_layout(pad=0.6)
    plots.save(figure, run.outdir / "scores.png")
