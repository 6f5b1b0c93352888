"""25 Gaussians, twice: the grid of [DOT] and [DDLS] with every sampler beside its exact law, and the grid of [CS].

The first is a WGAN-GP on the grid of [DOT], its laws known by quadrature; the second the GAN of [CS] 4.1 with its table of
standard, DRS, MH, refined and collaborative samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrefine as fr
from benchmarks.papers import gaussians25_plot as plot
from benchmarks.papers import gaussians25_rows as rows
from benchmarks.papers import plane_plot, plane_rows, result_file, toy_data, wgan
from benchmarks.papers.cells import Cells
from benchmarks.papers.latent_law import LatentGrid, evaluate
from benchmarks.papers.mixtures import GAUSSIANS25
from benchmarks.papers.plane import GRID, Fresh, smaller
from benchmarks.papers.result_file import Row, against, claim, pick
from fastrefine import settings
from fastrefine.demo.gan import build

TOLERANCE = 0.02
# [CS] published 5,000 iterations of shaping, and batches of 1,000 on the ring; its figures at 100,000 iterations.
CS_PUBLISHED = plane_rows.Recipe(GRID, (100_000, 300_000, 500_000, 700_000, 900_000), 5000, 1000, 1e-2, 0.05)
CS_FULL = plane_rows.Recipe(smaller(GRID, 500), (100_000,), 2000, 500, 1e-2, 0.05)
CS_QUICK = plane_rows.Recipe(
    replace(smaller(GRID, 50), hidden=(32,) * 3), (5,), 1, 20, 1e-2, 0.05, max_steps=2, samples=50, chain_length=2, real=50,
    num_slots=50,
)  # fmt: skip
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


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of but the seed; FULL was fixed on seed 0 of the training.

    fit: (iterations, batch size, learning rate) of each call of fit_discriminator, the next one starting from the last
    one's weights. shaping: the same of shape_discriminator. steps: chains are recorded after each of these, up to their
    own K (Setting.last). grid: points per axis; the law is compared with that of half as many. critic_seeds: of the rows
    on the critic, which costs more.
    """

    gan_steps: int = 12_000
    fit: tuple[tuple[int, int, float], ...] = ((3000, 256, 1e-3), (2000, 256, 3e-4), (1000, 512, 1e-4))
    real: int = 200_000
    calibration: int = 50_000
    grid: int = 1000
    samples: int = 3400  # for each seed: 10,200 in all
    emd_samples: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    critic_seeds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (0, 10, 25, 50, 100, 300, 1000)
    warm_up: int = 50
    chain_length: int = 20
    num_slots: int = 500
    shaping: tuple[int, int, float] = (500, 500, 1e-4)
    ways: tuple[str, ...] = tuple(rows.SETTINGS)


FULL = Recipe()
QUICK = Recipe(
    gan_steps=25, fit=((60, 64, 3e-3),), real=2000, calibration=1000, grid=60, samples=200, emd_samples=200, seeds=(0,),
    steps=(0, 20, 50), warm_up=20, chain_length=2, num_slots=200, shaping=(2, 50, 1e-4),
    ways=("DDLS (ULA), eps .0002", "MALA, step sizes adapted", "collaborative"),
)  # fmt: skip


def run(outdir: Path, *, seeds: tuple[int, ...], quick: bool, data: Path | None) -> dict[str, Any]:
    """The experiment for one training seed, the first; writes result.json and pictures into ``outdir``, returns the record."""
    seed, recipe, cs = seeds[0], QUICK if quick else FULL, CS_QUICK if quick else CS_FULL
    suffix = "-quick" if quick else ""
    with settings.threads_for(flops=0.0):  # these networks are small
        found = _against_laws(Cells(outdir / f"cells{suffix}", recipe), recipe, seed)
        # what stands until the long training of [CS] is done
        _write(outdir, recipe, cs, found, [], pictures=not quick)
        table = plane_rows.Table(Cells(outdir / f"cells-cs{suffix}", cs), cs, GAUSSIANS25, seed)
        cs_rows = []
        for row in table.rows():
            cs_rows.append({"version": "[CS]", **row})
            plane_rows.show(row)
    record = _write(outdir, recipe, cs, found, cs_rows)
    names = ("standard", "DRS", "MH", "refine", "collaborative", "collaborative, median stop")
    panels = {(f"{k} its", name): table.points(k, name) for k in cs.checkpoints for name in names}
    plane_plot.densities(outdir / "densities.png", panels, 2.6)
    return record


def _write(
    outdir: Path, recipe: Recipe, cs: plane_rows.Recipe, found: _Found, cs_rows: list[Row], pictures: bool = True
) -> dict[str, Any]:
    """result.json and the pictures of the grid of [DOT]; without rows of [CS] one says that they were not run."""
    laws = {name: law.facts() for name, law in found.laws.items()}
    left_out = [] if cs_rows else [{"version": "[CS]", "status": "not run", "wants": "an hour of training"}]
    record = result_file.write(
        outdir, "gaussians25", rows=found.table + cs_rows + left_out, laws=laws, curves=found.curves, **found.facts,
        seeds={"training": [found.seed], "sampling": list(recipe.seeds)}, reduced=True,
        recipe={"[DDLS]": asdict(recipe) | {"samplers": rows.described(found.energies["fitted"].scale)}, "[CS]": asdict(cs)},
        reductions=["one training seed", *(f"[CS] {text}" for text in plane_rows.reductions(cs, CS_PUBLISHED))],
        claims=claims_of(found.table, found.laws, found.curves) + cs_claims(cs_rows),
        comparison=[] if recipe == QUICK else comparison(found.table, cs_rows),
    )  # fmt: skip
    if pictures:
        plot.samples(outdir / "samples.png", found.panels)
        titles = {"fitted": "calibrated logit of fit_discriminator", "critic": "raw WGAN critic"}
        plot.mixing(outdir / "mixing.png", titles, found.curves, laws)
    return record


@dataclass(frozen=True)
class _Found:
    seed: int
    table: list[Row]
    laws: dict[str, rows.Law]
    energies: dict[str, rows.Energy]
    curves: dict[str, Any]
    panels: dict[str, Any]
    facts: dict[str, Any]


def _against_laws(cells: Cells, recipe: Recipe, seed: int) -> _Found:
    """Train, fit, calibrate, integrate, sample."""
    g, critic = _gan(cells, recipe, seed)
    d = _fitted(cells, recipe, seed, g)
    networks = {"fitted": d, "critic": critic, "shaped": _shaped(cells, recipe, seed, g, d)}
    energies, facts = calibrated(g, d, critic, recipe, seed)
    grid, half = LatentGrid(g, recipe.grid), LatentGrid(g, recipe.grid // 2)
    modes = toy_data.modes_of(grid.images)
    laws = {name: rows.law_of(grid, modes, energy) for name, energy in energies.items()}
    laws["generator"] = rows.law_of(grid, modes, rows.Energy(lambda x: torch.zeros(len(x))))
    coarse = rows.law_of(half, toy_data.modes_of(half.images), energies["fitted"])
    made = rows.Rows(cells, g, networks, energies, laws, grid, recipe)
    made.make()
    changed = float((laws["fitted"].shares - coarse.shares).abs().max())
    told = {"grid_halved_changes_a_share_by": changed, "calibration": facts}
    return _Found(seed, made.table, laws, energies, made.curves, made.panels, told)


def _gan(cells: Cells, recipe: Recipe, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(G, critic)."""

    def train() -> nn.ModuleList:
        with tqdm(total=recipe.gan_steps, desc="WGAN-GP", disable=None) as bar:
            return nn.ModuleList(
                wgan.train_wgan_gp(
                    toy_data.draw_evenly, steps=recipe.gan_steps, seed=seed, callback=lambda step, g: bar.update()
                )
            )

    empty = nn.ModuleList([build(wgan.generator, seed), build(wgan.critic, seed)])
    pair = cells.network(f"wgan-{seed}", empty, train)
    return cast("tuple[nn.Sequential, nn.Sequential]", tuple(pair))


def _fitted(cells: Cells, recipe: Recipe, seed: int, g: nn.Module) -> nn.Module:
    """The logit of fit_discriminator."""

    def fit() -> nn.Module:
        real = toy_data.draw(recipe.real, torch.Generator().manual_seed(seed + 1))
        d: nn.Module = build(wgan.ratio, seed)
        for stage, (iterations, batch, rate) in enumerate(recipe.fit):
            d = fr.fit_discriminator(
                g, real, iterations, prior=fr.Normal(wgan.LATENT_DIM), discriminator=d, batch_size=batch,
                learning_rate=rate, check_every=max(iterations // 4, 1), seed=seed + stage, progress=None,
            )  # fmt: skip
        return d

    return cells.network(f"ratio-{seed}", build(wgan.ratio, seed), fit)


def _shaped(cells: Cells, recipe: Recipe, seed: int, g: nn.Module, d: nn.Module) -> nn.Module:
    """The fitted logit, shaped for refinement in data space."""

    def shape() -> nn.Module:
        iterations, batch, rate = recipe.shaping
        setting = rows.SETTINGS["refine, shaped D"]
        real = toy_data.draw(recipe.samples, torch.Generator().manual_seed(seed + 3))
        refiner = fr.Refiner(
            g, d, setting.sampler(1.0), at=setting.at, prior=rows.PRIOR, max_steps=setting.last, real=real,
            stop=fr.stopping.MedianOfReal(), num_slots=recipe.num_slots,
        )  # fmt: skip
        fresh = Fresh(toy_data.draw, batch, seed + 3)
        return fr.shape_discriminator(refiner, fresh, iterations, batch, rate, stop=refiner.stop, seed=seed, progress=None)

    return cells.network(f"shaped-{seed}", build(wgan.ratio, seed), shape)


def calibrated(
    g: nn.Module, d: nn.Module, critic: nn.Module, recipe: Recipe, seed: int
) -> tuple[dict[str, rows.Energy], dict[str, Any]]:
    """The energies whose laws are sampled, and their diagnosis on images that neither D nor the calibration has seen.

    "fitted": Platt's w d (its b cancels), the one that a sampler can differentiate; "isotonic": for selection only;
    "critic": the raw score, as it is.
    """
    random = torch.Generator().manual_seed(seed + 2)
    score: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):  # to fit on, to judge on
        fake = evaluate(g, torch.randn(recipe.calibration, wgan.LATENT_DIM, generator=random))
        score.append((evaluate(d, toy_data.draw(recipe.calibration, random)), evaluate(d, fake)))
    maps = {method: fr.calibrate(*score[0], method) for method in ("platt", "isotonic")}
    ends = maps["platt"](torch.tensor([0.0, 1.0], dtype=torch.float64))
    weight = float(ends[1] - ends[0])
    facts: dict[str, Any] = {"platt_weight": weight, "platt_constant": float(ends[0])}
    judged: dict[str, Callable[[Tensor], Tensor]] = {"uncalibrated": lambda x: x, **maps}
    for name, apply in judged.items():
        found = fr.diagnose(apply(score[1][0]), apply(score[1][1]))
        facts[name] = {"brier": found.brier, "ece": found.ece, "z": found.z}
    energies = {
        "fitted": rows.Energy(lambda x: evaluate(d, x), weight),
        "isotonic": rows.Energy(lambda x: maps["isotonic"](evaluate(d, x))),
        "critic": rows.Energy(lambda x: evaluate(critic, x)),
    }
    return energies, facts


def claims_of(table: list[Row], laws: dict[str, rows.Law], curves: dict[str, Any]) -> list[Row]:
    """The claims on the grid of [DOT], each with its figures and whether it holds."""
    by_name = {row["name"]: row for row in table}
    law, base, sampled = laws["fitted"], by_name["generator"], by_name["the law, sampled"]
    found = [
        claim(
            "the law of the calibrated logit has high quality of at least .95 and all 25 modes",
            law.high_quality >= 0.95 and sampled["modes"] == toy_data.MODES,
            high_quality=law.high_quality, smallest_share=float(law.shares.min()), modes=sampled["modes"],
        )
    ]  # fmt: skip
    for key, title in (("fitted", "the calibrated logit"), ("critic", "the raw critic")):
        for row in (row for row in table if row["energy"] == key and row["markov_chain"]):
            quality, share = row["high_quality_distance"], row["share_distance"]
            text = f"{row['name']} is within {TOLERANCE} of the law of {title} in high quality and every mode share"
            found.append(claim(text, max(quality, share) <= TOLERANCE, high_quality_distance=quality, share_distance=share))
    for key, of in curves.items():
        for name in (name for name in of if rows.SETTINGS[name].chain and rows.SETTINGS[name].start == "prior"):
            steps, energy = sorted(of[name]), laws[key].energy
            away = [abs(of[name][k]["mean_energy"] - energy) for k in (steps[0], steps[-1])]
            text = f"{name}: the chains' mean energy comes nearer to the law's"
            found.append(claim(text, away[1] < away[0], law=energy, away_at_first=away[0], away_at_last=away[1]))
    for row in table:
        if row["energy"] != "none":
            text = f"{row['name']}: lower EMD than the generator"
            found.append(claim(text, row["emd"] < base["emd"], emd=row["emd"], generator=base["emd"]))
    return found


def cs_claims(table: list[Row]) -> list[Row]:
    """The claims on the grid of [CS]."""
    by_name = {row["name"]: row for row in table}
    found: list[Row] = []
    for name in ("refine", "collaborative") if table else ():
        for key, better in (("good", 1), ("js", -1)):
            ours, others = by_name[name][key], {other: by_name[other][key] for other in ("standard", "DRS", "MH")}
            holds = all(better * ours > better * value for value in others.values())
            found.append(claim(f"[CS] {name}: better {key} than standard, DRS and MH", holds, ours=ours, **others))
    return found


def comparison(table: list[Row], cs_table: list[Row]) -> list[Row]:
    """Every published figure beside ours; of sampling seeds on one training."""
    found = []
    for name, key, published, better in DDLS_FIGURES:
        headline = name.startswith("DDLS") and key == "high_quality"
        found.append(against(f"[DDLS] {name}", key, published, pick(table, key, name=name), better, headline=headline))
    law = pick(table, "high_quality", name="the law, sampled")
    found.append(against("[DDLS] the exact law of the logit", "high_quality", None, law, "near", headline=True))
    for name, figures in CS_FIGURES.items():
        for key, published in figures.items():
            better = "higher" if key == "good" else "lower"
            headline = name == "collaborative" and key == "good"
            case = f"[CS] {name}, 100,000 iterations"
            if cs_table:
                found.append(against(case, key, published, pick(cs_table, key, name=name), better, headline=headline))
    return found
