"""[CS] Figures 3 and 4a-c: the imbalanced ring of eight Gaussians, a GAN at five checkpoints, every way to sample from it.

Each stage of [CS] with the arg-max over K steps, as in its public code, and with the stop rule of its text (the median real
logit); selection with the logits as they are and with calibrated ones. A control shows what the components that the GAN has
lost cost: half of the proposals are the first checkpoint's generator's. ``MixtureTable`` serves [CS]'s 25 Gaussians too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import plots
from benchmarks.papers.cells import Cells, checkpoints
from benchmarks.papers.plane import IMBALANCED8, LATENT_DIM, RING, Mixture, Plane
from benchmarks.papers.result_file import Row, against, claim, mean, pick, spread
from benchmarks.papers.run import Fresh, Made, Recipe, Run, Table
from fastrefine.demo.gan import Pair, Training

Proposals = Callable[[], tuple[Tensor, Tensor]]  # samples (n, 2), logits (n,)
REAL = 12345  # seeds the real samples that stop, score and calibrate: never those of a training
PART = 100_000  # refined proposals in memory at once
# Of [CS] on the imbalanced ring. Shaping is by SGD, batches refined like the samples and left at a uniformly drawn step.
# step_size: of "ladam", in data space. One chain of Metropolis-Hastings for each sample.
FULL = Recipe(
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
        return checkpoints(self.cells, f"gan-{seed}", lambda: plane.trainer(draw, seed), self.recipe.checkpoints)

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
        yield self._row(checkpoint, "refine, unshaped", lambda: _moved(self.refiner(g, d, "arg-max").sample(n, seed=self.seed)))
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
        yield self._row(checkpoint, f"refine{suffix}", lambda: _moved(refiner.sample(n, seed=self.seed)))
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


def _moved(out: fr.Result) -> tuple[Tensor, Row]:
    return out.images, {"mean_steps": float(out.steps.double().mean()), "backend": out.report["backend"]}


QUICK = replace(  # a small pair that learns fast: what shows its direction within seconds
    FULL, plane=Plane((64,) * 3, False, Training(256, "adam", (2e-3, 2e-3))), checkpoints=(250,), shaping_iterations=100,
    shaping_batch=128, shaping_rate=5e-2, max_steps=12, samples=400, chain_length=3, reference=400, num_slots=128,
)  # fmt: skip
REDUCTIONS = ()
FIGURES = ("good", "kl", "js")
LIMIT = 9.0
CONTROLLED = (5000, 9000)  # where the GAN has lost components: of the first seed, with proposals that cover them
COVERED = "collaborative, covering proposals"
SELECTED = ("DRS", "MH", "DRS, tuned D", "MH, tuned D")
COLLABORATIVE = ("collaborative", "collaborative, median stop", "collaborative, calibrated, median stop")
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {  # [CS] Figure 4a-c, read off the plot (about +-.004 good, +-.003 KL, JS)
    "standard": {"good": (0.20, 0.82, 0.906, 0.917, 0.97), "kl": (0.255, 0.088, 0.087, 0.094, 0.106),
                 "js": (0.44, 0.092, 0.061, 0.059, 0.043)},
    "DRS": {"good": (0.86, 0.915, 0.957, 0.95, 0.975), "kl": (0.068, 0.058, 0.055, 0.068, 0.10),
            "js": (0.071, 0.046, 0.031, 0.037, 0.040)},
    "MH": {"good": (0.88, 0.925, 0.955, 0.95, 0.97), "kl": (0.079, 0.059, 0.058, 0.075, 0.092),
           "js": (0.065, 0.045, 0.031, 0.038, 0.040)},
    "refine": {"good": (0.915, 0.955, 0.98, 0.987, 0.994), "kl": (0.051, 0.023, 0.029, 0.061, 0.100),
               "js": (0.042, 0.021, 0.017, 0.025, 0.038)},
    "collaborative": {"good": (0.962, 0.966, 0.970, 0.966, 0.962), "kl": (0.019, 0.014, 0.013, 0.019, 0.073),
                      "js": (0.018, 0.016, 0.014, 0.016, 0.037)},
}  # fmt: skip
# Row of [CS] -> ours. DRS and MH with a D tuned on raw samples as long as ours is shaped: as it is, D gains far less there.
OURS = {name: f"{name}, tuned D" if name in ("DRS", "MH") else name for name in PUBLISHED} | {
    "collaborative, median stop": "collaborative, median stop"
}


def rows(run: Run, seed: int) -> Iterator[Row]:
    """The table of a seed, then the controls of the first one."""
    table = _table(run, seed)
    yield from table.rows()
    for checkpoint in CONTROLLED if seed == run.seeds[0] and not run.quick else ():
        yield from table.covered(checkpoint)


def _table(run: Run, seed: int) -> MixtureTable:
    return MixtureTable(run.cells(), run.recipe, seed, IMBALANCED8)


def claims(rows: Sequence[Row]) -> list[Row]:
    """Of means over seeds, for every checkpoint."""
    found = []
    for k in dict.fromkeys(row["checkpoint"] for row in rows):

        def at(name: str, key: str, k: int = k) -> float:
            return mean(rows, key, checkpoint=k, name=name)

        for name in ("refine", "refine, median stop"):
            ours, others = at(name, "good"), {other: at(other, "good") for other in ("standard", "refine, unshaped")}
            text = f"{k} iterations: {name} by a shaped D gives more good samples than no refinement and than D as it is"
            found.append(claim(text, ours > max(others.values()), ours=ours, **others))
        for key in ("kl", "js"):
            for name in COLLABORATIVE:
                ours, others = at(name, key), {other: at(other, key) for other in SELECTED}
                text = f"{k} iterations: {name} has a lower {key.upper()} than DRS and MH, with D as it is and tuned"
                found.append(claim(text, ours < min(others.values()), ours=ours, **others))
    if all(k in FULL.checkpoints for k in dict.fromkeys(row["checkpoint"] for row in rows)):
        found += _published_claims(rows)
    return found


def _published_claims(rows: Sequence[Row]) -> list[Row]:
    found = []
    for index, k in enumerate(FULL.checkpoints):
        goal = {key: values[index] for key, values in PUBLISHED["collaborative"].items()}
        for name in (*COLLABORATIVE, *[COVERED] * bool(pick(rows, "good", checkpoint=k, name=COVERED))):
            ours = {key: mean(rows, key, checkpoint=k, name=name) for key in FIGURES}
            holds = ours["good"] >= goal["good"] - 0.01 and ours["kl"] <= goal["kl"] and ours["js"] <= goal["js"]
            text = f"{k} iterations: {name} is as good as published or better (good within .01, KL and JS)"
            found.append(claim(text, holds, ours=ours, published=goal))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """Every published figure beside ours."""
    found = []
    for name, figures in PUBLISHED.items():
        for key in FIGURES:
            for k, published in zip(FULL.checkpoints, figures[key], strict=True):
                case = f"{name}, {k} iterations"
                headline = name == "collaborative" and k in (3000, 9000) and key != "good"
                better = "higher" if key == "good" else "lower"
                values = pick(rows, key, checkpoint=k, name=OURS[name])
                found.append(against(case, key, published, values, better, headline=headline))
    return found


def draw(run: Run, rows: Sequence[Row]) -> None:
    """Densities of the first seed, and the figures over the training, published ones dashed."""
    shown = ("standard", "DRS, tuned D", "MH, tuned D", "refine", "collaborative, median stop")
    table, checkpoints = _table(run, run.seeds[0]), run.recipe.checkpoints
    panels = {(f"{k} its", name): table.points(k, name) for k in checkpoints for name in shown}
    plots.densities(run.outdir / "densities.png", panels, LIMIT)
    lines: dict[str, dict[str, Any]] = {}
    for i, (name, ours) in enumerate(OURS.items()):
        spreads = {key: [spread(pick(rows, key, checkpoint=k, name=ours)) for k in checkpoints] for key in FIGURES}
        means: dict[str, Any] = {key: [m for m, _ in values] for key, values in spreads.items()}
        sd = {key: [s or 0.0 for _, s in values] for key, values in spreads.items()}
        lines[ours] = {"x": checkpoints, **means, "sd": sd, "style": {"color": f"C{i}"}}
        if name in PUBLISHED and not run.quick:
            style = {"color": f"C{i}", "linestyle": "--", "marker": ""}
            lines[f"{name}, published"] = {"x": checkpoints, **PUBLISHED[name], "style": style}
    plots.curves(run.outdir / "curves.png", FIGURES, lines, "iterations of the GAN")
