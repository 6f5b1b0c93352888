"""25 Gaussians, twice: the grid of [DOT] and [DDLS] with every sampler beside its exact law, and the grid of [CS].

The first is a WGAN-GP on the grid of [DOT], its laws known by quadrature; the second the GAN of [CS] 4.1 with its table of
standard, DRS, MH, refined and collaborative samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import gaussians25_rows, imbalanced8, plots
from benchmarks.papers.cells import Cells, checkpoints
from benchmarks.papers.gaussians25_rows import SETTINGS, Rows
from benchmarks.papers.latent_law import Energy, LatentGrid, Law, evaluate, law_of
from benchmarks.papers.plane import DOT25, GAUSSIANS25, GRID, LATENT_DIM, WganTrainer, at_random25, evenly25, ratio
from benchmarks.papers.result_file import Row, against, claim, pick
from benchmarks.papers.run import Fresh, Recipe, Run
from fastrefine.demo.gan import build

TOLERANCE = 0.02
# The grid of [DOT]. It was fixed on seed 0 of the training. fit: (iterations, batch size, learning rate) of each call of
# fit_discriminator, the next one starting from the last one's weights. real, calibration: samples that D is fitted and
# calibrated on. grid: points per axis; the law is compared with that of half as many. samples: for each sampling seed.
# critic_seeds: of the rows on the critic, which costs more. steps: chains are recorded after each of these, up to their own K
# (Setting.last).
FULL = Recipe(
    checkpoints=(12_000,), samples=3400, chain_length=20, num_slots=500, shaping_iterations=500, shaping_batch=500,
    shaping_rate=1e-4,
    own=dict(
        fit=((3000, 256, 1e-3), (2000, 256, 3e-4), (1000, 512, 1e-4)), real=200_000, calibration=50_000, grid=1000,
        emd_samples=2000, sampling_seeds=(0, 1, 2), critic_seeds=(0,), steps=(0, 10, 25, 50, 100, 300, 1000), warm_up=50,
        ways=tuple(SETTINGS),
    ),
)  # fmt: skip
QUICK = FULL.but(
    checkpoints=(25,), fit=((60, 64, 3e-3),), real=2000, calibration=1000, grid=60, samples=200, emd_samples=200,
    sampling_seeds=(0,), steps=(0, 20, 50), warm_up=20, chain_length=2, num_slots=200, shaping_iterations=2, shaping_batch=50,
    ways=("DDLS (ULA), eps .0002", "MALA, step sizes adapted", "collaborative"),
)  # fmt: skip
# [CS] published 5,000 iterations of shaping, and batches of 1,000 on the ring; its figures at 100,000 iterations.
CS_PUBLISHED = replace(
    imbalanced8.FULL, name="cs", plane=GRID, checkpoints=(100_000, 300_000, 500_000, 700_000, 900_000), shaping_rate=1e-2,
    step_size=0.05,
)  # fmt: skip
CS_FULL = replace(
    CS_PUBLISHED, plane=GRID.smaller(500), checkpoints=(100_000,), shaping_iterations=2000, shaping_batch=500
)  # fmt: skip
CS_QUICK = replace(
    CS_FULL, plane=replace(GRID.smaller(50), hidden=(32,) * 3), checkpoints=(5,), shaping_iterations=1, shaping_batch=20,
    max_steps=2, samples=50, chain_length=2, reference=50, num_slots=50,
)  # fmt: skip
REDUCTIONS = ("one training seed", *(
    f"[CS] {f.name.replace('_', ' ')}: {getattr(CS_FULL, f.name)}, published {getattr(CS_PUBLISHED, f.name)}"
    for f in fields(Recipe) if getattr(CS_FULL, f.name) != getattr(CS_PUBLISHED, f.name)
))  # fmt: skip
CS_FIGURES = {  # [CS] Figure 4d-f at 100,000 iterations
    "standard": {"good": 0.405, "kl": 0.077, "js": 0.283}, "DRS": {"good": 0.60, "js": 0.192},
    "MH": {"good": 0.48, "js": 0.243}, "refine": {"good": 0.865, "kl": 0.016, "js": 0.051},
    "collaborative": {"good": 0.87, "kl": 0.013, "js": 0.049},
}  # fmt: skip
DDLS_FIGURES = (  # [DDLS] Table 1 and 2
    ("generator", "high_quality", 0.70, "higher"), ("DRS", "high_quality", 0.90, "higher"),
    ("DDLS (ULA), eps .0002", "high_quality", 0.98, "higher"), ("DDLS (ULA), eps .0002", "modes", 24.8, "higher"),
    ("generator", "emd", 0.043, "lower"), ("DOT, latent", "emd", 0.052, "lower"),
    ("DDLS (ULA), eps .0002", "emd", 0.036, "lower"),
)  # fmt: skip


def rows(run: Run, seed: int) -> Iterator[Row]:
    """Of the first training seed alone: the grid of [DOT], then that of [CS], whose training takes an hour."""
    if seed != run.seeds[0]:
        return
    found, extra = _against_laws(run, seed)
    run.extra |= {**extra, "seeds": {"training": [seed], "sampling": list(run.recipe.sampling_seeds)}, "curves": found.curves}
    run.claims += law_claims(found.table, found.laws, found.curves)
    yield from found.table
    run.left_out = [{"version": "[CS]", "status": "not run", "wants": "an hour of training"}]
    run.save()  # what stands until the long training of [CS] is done
    run.left_out = []
    for row in _cs_table(run).rows():
        yield {"version": "[CS]", **row}


def _cs_table(run: Run) -> imbalanced8.MixtureTable:
    recipe = CS_QUICK if run.quick else CS_FULL
    return imbalanced8.MixtureTable(run.cells(recipe), recipe, run.seeds[0], GAUSSIANS25)


def draw(run: Run, rows: Sequence[Row]) -> None:
    """Samples and mixing of the grid of [DOT], densities of that of [CS]."""
    names, cells = [row["name"] for row in rows if row["version"] == "[DDLS]"], run.cells()
    _samples(run.outdir / "samples.png", {n: cells.tensors(f"samples-{n}", dict)["samples"] for n in names})
    titles = {"fitted": "calibrated logit of fit_discriminator", "critic": "raw WGAN critic"}
    _mixing(run.outdir / "mixing.png", titles, run.extra["curves"], run.extra["laws"])
    table, shown = _cs_table(run), ("standard", "DRS", "MH", "refine", "collaborative", "collaborative, median stop")
    panels = {(f"{k} its", n): table.points(k, n) for k in table.recipe.checkpoints for n in shown}
    plots.densities(run.outdir / "densities.png", panels, 2.6)


def _against_laws(run: Run, seed: int) -> tuple[Rows, dict[str, Any]]:
    """Train, fit, calibrate, integrate, sample."""
    cells, recipe = run.cells(), run.recipe
    (steps,) = recipe.checkpoints
    pairs = checkpoints(cells, f"wgan-{seed}", lambda: WganTrainer(evenly25, steps, seed, not run.quick), (steps,))
    g, critic = pairs[steps]
    d = _fitted(cells, recipe, seed, g)
    energies, facts = calibrated(g, d, critic, recipe, seed)
    grid, half = LatentGrid(g, recipe.grid), LatentGrid(g, recipe.grid // 2)
    modes, _ = DOT25.modes_of(grid.images)
    laws = {name: law_of(grid, modes, energy) for name, energy in energies.items()}
    laws["generator"] = law_of(grid, modes, Energy(lambda x: torch.zeros(len(x))))
    coarse = law_of(half, DOT25.modes_of(half.images)[0], energies["fitted"])
    networks = {"fitted": d, "critic": critic}
    made = Rows(cells, recipe, seed, g, networks, energies, laws, grid)
    networks["shaped"] = _shaped(made, d)
    made.make()
    described = {name: repr(setting.sampler(energies["fitted"].scale)) for name, setting in SETTINGS.items()}
    return made, {
        "laws": {name: law.facts() for name, law in laws.items()}, "calibration": facts,
        "grid_halved_changes_a_share_by": coarse.distance(laws["fitted"].shares.tolist()),
        "recipe": {
            "[DDLS]": recipe.facts() | {"samplers": described}, "[CS]": (CS_QUICK if run.quick else CS_FULL).facts(),
        },
    }  # fmt: skip


def _fitted(cells: Cells, recipe: Recipe, seed: int, g: nn.Module) -> nn.Module:
    """The logit of fit_discriminator."""

    def fit() -> nn.Module:
        real = at_random25(recipe.real, torch.Generator().manual_seed(seed + 1))
        d: nn.Module = build(ratio, seed)
        for stage, (iterations, batch, rate) in enumerate(recipe.fit):
            d = fr.fit_discriminator(
                g, real, iterations, prior=fr.Normal(LATENT_DIM), discriminator=d, batch_size=batch,
                learning_rate=rate, check_every=max(iterations // 4, 1), seed=seed + stage, progress=None,
            )  # fmt: skip
        return d

    return cells.network(f"ratio-{seed}", build(ratio, seed), fit)


def _shaped(made: Rows, d: nn.Module) -> nn.Module:
    """The fitted logit, shaped for refinement in data space."""
    recipe, setting, seed = made.recipe, SETTINGS["refine, shaped D"], made.seed
    refiner = fr.Refiner(
        made.g, d, setting.sampler(1.0), at=setting.at, prior=gaussians25_rows.PRIOR, max_steps=setting.last,
        real=at_random25(recipe.samples, torch.Generator().manual_seed(seed + 3)), stop=fr.stopping.MedianOfReal(),
        num_slots=recipe.num_slots,
    )  # fmt: skip
    fresh = Fresh(at_random25, recipe.shaping_batch, seed + 3)
    return made.trained("shaped", build(ratio, seed), refiner, fresh, stop=refiner.stop)


def calibrated(
    g: nn.Module, d: nn.Module, critic: nn.Module, recipe: Recipe, seed: int
) -> tuple[dict[str, Energy], dict[str, Any]]:
    """The energies whose laws are sampled, and their diagnosis on images that neither D nor the calibration has seen.

    "fitted": Platt's w d (its b cancels), the one that a sampler can differentiate; "isotonic": for selection only;
    "critic": the raw score, as it is.
    """
    random = torch.Generator().manual_seed(seed + 2)
    score: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):  # to fit on, to judge on
        fake = evaluate(g, torch.randn(recipe.calibration, LATENT_DIM, generator=random))
        score.append((evaluate(d, at_random25(recipe.calibration, random)), evaluate(d, fake)))
    maps = {method: fr.calibrate(*score[0], method) for method in ("platt", "isotonic")}
    ends = maps["platt"](torch.tensor([0.0, 1.0], dtype=torch.float64))
    weight = float(ends[1] - ends[0])
    facts: dict[str, Any] = {"platt_weight": weight, "platt_constant": float(ends[0])}
    judged: dict[str, Callable[[Tensor], Tensor]] = {"uncalibrated": lambda x: x, **maps}
    for name, apply in judged.items():
        found = fr.diagnose(apply(score[1][0]), apply(score[1][1]))
        facts[name] = {"brier": found.brier, "ece": found.ece, "z": found.z}
    energies = {
        "fitted": Energy(lambda x: evaluate(d, x), weight),
        "isotonic": Energy(lambda x: maps["isotonic"](evaluate(d, x))),
        "critic": Energy(lambda x: evaluate(critic, x)),
    }
    return energies, facts


def law_claims(table: list[Row], laws: Mapping[str, Law], curves: Mapping[str, Any]) -> list[Row]:
    """The claims on the grid of [DOT], each with its figures and whether it holds."""
    by_name = {row["name"]: row for row in table}
    law, base, sampled = laws["fitted"], by_name["generator"], by_name["the law, sampled"]
    found = [
        claim(
            "the law of the calibrated logit has high quality of at least .95 and all 25 modes",
            law.high_quality >= 0.95 and sampled["modes"] == 25,
            high_quality=law.high_quality, smallest_share=float(law.shares.min()), modes=sampled["modes"],
        )
    ]  # fmt: skip
    for key, title in (("fitted", "the calibrated logit"), ("critic", "the raw critic")):
        for row in (row for row in table if row["energy"] == key and row["markov_chain"]):
            quality, share = row["high_quality_distance"], row["share_distance"]
            text = f"{row['name']} is within {TOLERANCE} of the law of {title} in high quality and every mode share"
            found.append(claim(text, max(quality, share) <= TOLERANCE, high_quality_distance=quality, share_distance=share))
    for key, of in curves.items():
        for name in (name for name in of if SETTINGS[name].chain and SETTINGS[name].start == "prior"):
            steps, energy = sorted(of[name]), laws[key].energy
            away = [abs(of[name][k]["mean_energy"] - energy) for k in (steps[0], steps[-1])]
            text = f"{name}: the chains' mean energy comes nearer to the law's"
            found.append(claim(text, away[1] < away[0], law=energy, away_at_first=away[0], away_at_last=away[1]))
    for row in table:
        if row["energy"] != "none":
            text = f"{row['name']}: lower EMD than the generator"
            found.append(claim(text, row["emd"] < base["emd"], emd=row["emd"], generator=base["emd"]))
    return found


def claims(rows: Sequence[Row]) -> list[Row]:
    """The claims on the grid of [CS]."""
    by_name = {row["name"]: row for row in rows if row["version"] == "[CS]"}
    found: list[Row] = []
    for name in ("refine", "collaborative") if by_name else ():
        for key, better in (("good", 1), ("js", -1)):
            ours, others = by_name[name][key], {other: by_name[other][key] for other in ("standard", "DRS", "MH")}
            holds = all(better * ours > better * value for value in others.values())
            found.append(claim(f"[CS] {name}: better {key} than standard, DRS and MH", holds, ours=ours, **others))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """Every published figure beside ours; of sampling seeds on one training."""
    found = []
    for name, key, published, better in DDLS_FIGURES:
        headline, ours = name.startswith("DDLS") and key == "high_quality", pick(rows, key, name=name, version="[DDLS]")
        found.append(against(f"[DDLS] {name}", key, published, ours, better, headline=headline))
    law = pick(rows, "high_quality", name="the law, sampled")
    found.append(against("[DDLS] the exact law of the logit", "high_quality", None, law, "near", headline=True))
    for name, figures in CS_FIGURES.items():
        for key, published in figures.items():
            better, headline = "higher" if key == "good" else "lower", name == "collaborative" and key == "good"
            ours = pick(rows, key, name=name, version="[CS]")
            found.append(against(f"[CS] {name}, 100,000 iterations", key, published, ours, better, headline=headline))
    return found


def _samples(path: Path, panels: Mapping[str, Tensor]) -> None:
    """Small multiples, one for each name -> samples (n, 2); the first 3,000 of each are drawn."""
    columns = min(5, len(panels))
    figure, axes = plots.subplots(-(-len(panels) // columns), columns, 1.8, 2.0)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, x) in zip(axes.flat, panels.items(), strict=False):
        plots.points(axis, x[:3000], 1.8, name)
    figure.tight_layout(pad=0.4)
    plots.save(figure, path)


def _mixing(path: Path, titles: Mapping[str, str], curves: Mapping[str, Any], laws: Mapping[str, Any]) -> None:
    """Against K: high quality and mean energy, the law's dashed, and how far the mode shares are from the law's (0).

    A row for each law and its chains.
    """
    panels = {
        "high_quality": "high quality", "mean_energy": "mean energy", "share_distance": "largest distance of a mode's share"
    }  # fmt: skip
    figure, axes = plots.subplots(len(titles), len(panels), 3.2, 2.5)
    for line, (key, title) in zip(axes, titles.items(), strict=True):
        for axis, (quantity, label) in zip(line, panels.items(), strict=True):
            for name, curve in curves[key].items():
                steps = sorted(curve)
                axis.plot(steps, [curve[k][quantity] for k in steps], marker=".", linewidth=1, markersize=4, label=name)
            axis.axhline(laws[key].get(quantity, 0.0), color="black", linestyle="--", linewidth=1, label="the law")
            axis.set_xscale("symlog", linthresh=10)
            plots.plain(axis, title, "K", label)
            shown: list[int] = []
            for k in sorted({k for curve in curves[key].values() for k in curve}):
                if not shown or k > 1.6 * shown[-1]:  # nearer ones would be printed over each other
                    shown.append(k)
            axis.set_xticks(shown, [str(k) for k in shown], fontsize=7)
            axis.minorticks_off()
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    plots.save(figure, path)
