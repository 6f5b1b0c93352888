"""The rows of the experiment on 25 Gaussians: every way to sample, measured beside the law that it aims at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers.cells import Cells
from benchmarks.papers.latent_law import Energy, LatentGrid, Law, evaluate
from benchmarks.papers.plane import at_random25, earth_mover, quality25
from benchmarks.papers.result_file import Row
from benchmarks.papers.run import Recipe, Table

PRIOR = fr.Normal(2)
Drawn = tuple[list[Tensor], Row, Any]  # samples (n, 2) of each sampling seed, figures, points of the mixing curve by K


@dataclass(frozen=True)
class Setting:
    """A gradient sampler's row: sampler(w) is its sampler with the logit's weight w.

    energy: name of the energy whose logit it follows. chain: whether it is a Markov chain of that energy's law.
    start: "prior" | "warm", after a warm-up from the prior | "mh", from the latents that Metropolis-Hastings chose.
    last: K, steps of a warm-up not counted. network: the discriminator, where it is not the energy's. select: as many
    proposals for each sample as Metropolis-Hastings has, which then chooses by the refined logits. stop: at the median
    logit of real samples.
    """

    energy: str
    at: str
    sampler: Callable[[float], Any]
    chain: bool = False
    start: str = "prior"
    last: int = 100
    network: str = ""
    select: bool = False
    stop: bool = False


def _warm_up(weight: float, steps: int) -> fr.MALA:
    """Step sizes of each chain's own bring it off the walls between modes, where one for all would leave it stuck."""
    return fr.MALA(0.005, logit_scale=weight, adapt=steps)


# Chains that are to reach the law have one step size for all after the warm-up. Adapted ones keep a bias for very long:
# those that adapted in a wide mode make steps with which they hardly enter a narrow one.
SETTINGS = {
    "DDLS (ULA), eps .001": Setting("fitted", "input", lambda w: fr.DDLS(0.001, logit_scale=w), True, last=1000),
    "DDLS (ULA), eps .0002": Setting("fitted", "input", lambda w: fr.DDLS(0.0002, logit_scale=w), True, last=1000),
    "MALA": Setting("fitted", "input", lambda w: fr.MALA(0.02, logit_scale=w), True, "warm", 1000),
    "HMC": Setting("fitted", "input", lambda w: fr.HMC(0.1, leapfrog=2, jitter=0, logit_scale=w), True, "warm", 1000),
    "MALA, step sizes adapted": Setting("fitted", "input", lambda w: _warm_up(w, 50), True),
    "MH, then MALA": Setting("fitted", "input", lambda w: fr.MALA(0.02, logit_scale=w), True, "mh"),
    "DGflow KL, latent": Setting("fitted", "input", lambda w: fr.DGflow(0.0002), last=50),
    "DGflow KL, data": Setting("fitted", "output", lambda w: fr.DGflow(0.0001), last=50),
    "DOT, latent": Setting("fitted", "input", lambda w: fr.DOT(0.01), last=50),
    "DOT, data": Setting("fitted", "output", lambda w: fr.DOT(0.01), last=50),
    "refine, D as it is": Setting("fitted", "output", lambda w: fr.Collaborative(0.0003), last=50, stop=True),
    "refine, shaped D": Setting("fitted", "output", lambda w: fr.Collaborative(0.0003), last=50, stop=True, network="shaped"),
    "collaborative": Setting(
        "fitted", "output", lambda w: fr.Collaborative(0.0003), last=50, stop=True, network="shaped", select=True
    ),
    "DDLS (ULA) on the critic, eps .1": Setting("critic", "input", lambda w: fr.DDLS(0.1), True, last=50),
    "MALA on the critic": Setting("critic", "input", lambda w: fr.MALA(0.1), True, last=50),
}


class Rows(Table):
    """Every row of the table, the mixing curve of those that move the latent, and the first sampling seed's samples.

    seed: of the training. networks: "fitted", "shaped", "critic".
    """

    def __init__(
        self, cells: Cells, recipe: Recipe, seed: int, g: nn.Module, networks: Mapping[str, nn.Module],
        energies: Mapping[str, Energy], laws: Mapping[str, Law], grid: LatentGrid,
    ):  # fmt: skip
        super().__init__(cells, recipe, seed)
        self.g, self.networks, self.energies, self.laws, self.grid = g, networks, energies, laws, grid
        self.judge = _Judge(recipe)
        self.table: list[Row] = []
        self.curves: dict[str, dict[str, Any]] = {"fitted": {}, "critic": {}}
        self.panels: dict[str, Tensor] = {}
        self.warmed: dict[int, Tensor] = {}

    def make(self) -> None:
        """Fill ``table``, ``curves`` and ``panels``."""
        recipe, laws, isotonic = self.recipe, self.laws, self.energies["isotonic"].logits
        more_real = self.judge.more_real()
        ids = torch.arange(recipe.samples * recipe.chain_length)
        raw = {seed: evaluate(self.g, PRIOR.sample(ids, seed)) for seed in recipe.sampling_seeds}
        self._add("real data", "none", lambda: (more_real, {}, None))
        self._add("generator", "none", lambda: ([x[: recipe.samples] for x in raw.values()], {}, None))
        for key, title in (("fitted", "the law, sampled"), ("critic", "the critic's law, sampled")):
            drawn = [laws[key].law.sample(recipe.samples, torch.Generator().manual_seed(s)) for s in recipe.sampling_seeds]
            self._add(title, key, lambda d=drawn: ([self.grid.images[one] for one in d], {}, None))  # type: ignore[misc]
        self._add("DRS", "isotonic", lambda: _rejected(raw, isotonic, recipe.samples))
        chosen = {s: fr.metropolis_hastings(isotonic(x), recipe.chain_length, seed=s) for s, x in raw.items()}
        facts = {"acceptance": float(np.mean([c.acceptance_rate for c in chosen.values()])), "steps": recipe.chain_length}
        self._add("MH", "isotonic", lambda: ([raw[s][c.indices] for s, c in chosen.items()], facts, None))
        for name in recipe.ways:
            setting = SETTINGS[name]
            indices = {s: c.indices for s, c in chosen.items()}
            self._add(name, setting.energy, lambda s=setting, i=indices: self._refined(s, i))  # type: ignore[misc]

    def _add(self, name: str, energy: str, make: Callable[[], Drawn]) -> None:
        law = self.laws["fitted" if energy == "none" else energy]

        def cell() -> Any:
            sets, facts, curve = make()
            self.cells.put(f"samples-{name}", {"samples": sets[0]})
            head = {"version": "[DDLS]", "name": name, "energy": energy, "markov_chain": False, "steps": 0}
            return [{**head, **facts, **self.judge(sets, law)}, curve]

        row, curve = self.cells.row(f"row-{name}", cell)
        self.table.append(row)
        self.panels[name] = self.cells.tensors(f"samples-{name}", dict)["samples"]
        if curve:
            self.curves[energy][name] = {int(k): point for k, point in curve.items()}

    def _refined(self, setting: Setting, indices: Mapping[int, Tensor]) -> Drawn:
        key, scale = setting.energy, self.energies[setting.energy].scale
        starts: Mapping[int, Tensor] = {}
        if setting.start == "mh":
            starts = {seed: PRIOR.sample(kept, seed) for seed, kept in indices.items()}
        elif setting.start == "warm":
            starts = self._warm_starts(scale)
        outs = self._run(setting, scale, starts)
        facts: Row = {
            "at": setting.at, "steps": setting.last, "markov_chain": setting.chain, "start": setting.start,
            "backend": outs[0].report["backend"],
        }  # fmt: skip
        if outs[0].snapshots:
            facts["steps"] = max(outs[0].snapshots)
        accepted = [float(out.acceptance.mean()) for out in outs if out.acceptance is not None]
        if accepted:
            facts["acceptance"] = float(np.mean(accepted))
        if setting.select:
            chosen = [
                fr.metropolis_hastings(out.logits, self.recipe.chain_length, initial_logits=out.real_logits, seed=seed)
                for seed, out in zip(self.recipe.sampling_seeds, outs, strict=True)
            ]
            facts["acceptance"] = float(np.mean([c.acceptance_rate for c in chosen]))
            return [out.images[c.indices] for out, c in zip(outs, chosen, strict=True)], facts, None
        curve = None
        if setting.at == "input":
            snapshots = [out.snapshots for out in outs]
            curve = {k: _point([s[k] for s in snapshots], self.laws[key], scale) for k in snapshots[0]}
        return [out.images for out in outs], facts, curve

    def _warm_starts(self, scale: float) -> dict[int, Tensor]:
        if not self.warmed:
            warm = Setting("fitted", "input", lambda w: _warm_up(w, self.recipe.warm_up), last=self.recipe.warm_up)
            outs = self._run(warm, scale, {})
            self.warmed = {seed: out.latents for seed, out in zip(self.recipe.sampling_seeds, outs, strict=True)}
        return self.warmed

    def _run(self, setting: Setting, weight: float, starts: Mapping[int, Tensor]) -> list[fr.Result]:
        """A result for each seed, of latents with snapshots at the recipe's steps, rounded up to whole transitions."""
        recipe, sampler, is_critic = self.recipe, setting.sampler(weight), setting.energy == "critic"
        whole = sampler.traits.transition_steps
        steps = sorted({-(-k // whole) * whole for k in recipe.steps if k <= setting.last})
        refiner = fr.Refiner(
            self.g, self.networks[setting.network or setting.energy], sampler, at=setting.at, prior=PRIOR,
            max_steps=steps[-1], num_slots=recipe.num_slots, discriminator_output="critic" if is_critic else "logit",
            stop=fr.stopping.MedianOfReal() if setting.stop else None, real=self.judge.real[0] if setting.stop else None,
        )  # fmt: skip
        seeds = recipe.critic_seeds if is_critic else recipe.sampling_seeds
        snapshots = steps if setting.at == "input" else []
        if starts:  # noise of its own: the warm-up's, under the same seed, would come again
            return [refiner.refine(starts[seed], seed=seed + 1000, snapshots=snapshots) for seed in seeds]
        n = recipe.samples * (recipe.chain_length if setting.select else 1)
        return [refiner.sample(n, seed=seed, snapshots=snapshots) for seed in seeds]


def _point(snapshots: list[Any], law: Law, scale: float) -> dict[str, float]:
    """A point of the mixing curve, mean over the seeds."""
    measured = [quality25(s.images) for s in snapshots]
    energies = [0.5 * s.activations.double().square().sum(1) - scale * s.logits.double() for s in snapshots]
    return {
        "high_quality": float(np.mean([m["high_quality"] for m in measured])),
        "share_distance": float(np.mean([law.distance(m["shares"]) for m in measured])),
        "mean_energy": float(np.mean([float(e.mean()) for e in energies])),
    }


class _Judge:
    """Measures sets of samples, one for each seed, against the law and against real samples (the same for every row).

    Figures are means over the seeds, which hold equally many samples where DRS accepts enough; distances are of the means.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.random = [torch.Generator().manual_seed(10_000 + seed) for seed in recipe.sampling_seeds]
        self.real = self.more_real()

    def more_real(self) -> list[Tensor]:
        """Real samples that nothing else has: the second time, the floor of the earth mover's distance."""
        return [at_random25(self.recipe.samples, random) for random in self.random]

    def __call__(self, sets: list[Tensor], law: Law) -> Row:
        found = [quality25(x) for x in sets]
        n = min(self.recipe.emd_samples, *(len(x) for x in sets))
        emd = [earth_mover(x[:n], real[:n]) for x, real in zip(sets, self.real, strict=False)]
        shares = np.mean([m["shares"] for m in found], 0).tolist()
        return {
            "samples": [len(x) for x in sets], "high_quality": sum(shares),
            "high_quality_by_seed": [m["high_quality"] for m in found],
            "high_quality_distance": abs(sum(shares) - law.high_quality), "share_distance": law.distance(shares),
            "share_distance_by_seed": [law.distance(m["shares"]) for m in found], "modes": min(m["modes"] for m in found),
            "shares": shares, "std": float(np.mean([m["std"] for m in found])), "emd": float(np.mean(emd)), "emd_by_seed": emd,
            "emd_samples": n,
        }  # fmt: skip


def _rejected(raw: Mapping[int, Tensor], logits: Callable[[Tensor], Tensor], n: int) -> Drawn:
    """DRS of the proposals, as many as the other rows have where so many are accepted; and the accepted share."""
    kept = {seed: fr.rejection_sample(logits(x), seed=seed) for seed, x in raw.items()}
    efficiency = sum(map(len, kept.values())) / sum(map(len, raw.values()))
    return [raw[seed][indices[:n]] for seed, indices in kept.items()], {"efficiency": efficiency}, None
