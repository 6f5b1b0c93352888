"""Do the latent samplers draw from their law? A WGAN-GP on the 25 Gaussians of [DOT], its law known by quadrature.

python -m fastrefine.experiments.gaussians25 --outdir DIR [--quick] [--seed S]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import fastrefine as fr
from fastrefine.experiments import gaussians25_plot as plot
from fastrefine.experiments import gaussians25_rows as rows
from fastrefine.experiments import toy_data, wgan
from fastrefine.experiments.demo import one_thread
from fastrefine.experiments.latent_law import LatentGrid, evaluate
from fastrefine.experiments.train import build

TOLERANCE = 0.02


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of but the seed; FULL was fixed on seed 0 of the training.

    fit: (iterations, batch size, learning rate) of each call of fit_discriminator, the next one starting from the last
    one's weights. steps: chains are recorded after each of these, up to their own K (Setting.last). grid: points per
    axis; the law is compared with that of half as many. critic_seeds: of the rows on the critic, which costs more.
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


FULL = Recipe()
QUICK = Recipe(
    gan_steps=30, fit=((20, 64, 1e-3),), real=2000, calibration=500, grid=80, samples=60, emd_samples=60, seeds=(0,),
    steps=(0, 2, 4), warm_up=4, chain_length=3, num_slots=60,
)  # fmt: skip


def run(outdir: Path, recipe: Recipe = FULL, seed: int = 0) -> dict[str, Any]:
    """Train, fit, calibrate, integrate, sample; writes result.json and two pictures into ``outdir``, returns the result.

    Trained networks are kept there as safetensors and taken up again by a later run of the same recipe and seed.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    with one_thread():
        g, critic = _gan(outdir, recipe, seed)
        d = _fitted(outdir, recipe, seed, g)
        energies, facts = calibrated(g, d, critic, recipe, seed)
        grid, half = LatentGrid(g, recipe.grid), LatentGrid(g, recipe.grid // 2)
        modes = toy_data.modes_of(grid.images)
        laws = {name: rows.law_of(grid, modes, energy) for name, energy in energies.items()}
        laws["generator"] = rows.law_of(grid, modes, rows.Energy(lambda x: torch.zeros(len(x))))
        coarse = rows.law_of(half, toy_data.modes_of(half.images), energies["fitted"])
        table, curves, panels = rows.all_rows(g, {"fitted": d, "critic": critic}, energies, laws, grid, recipe)
    claims = claims_of(table, laws)
    result = {
        "experiment": "gaussians25",
        "rows": table,
        "laws": {name: law.facts() for name, law in laws.items()},
        "grid_halved_changes_a_share_by": float((laws["fitted"].shares - coarse.shares).abs().max()),
        "calibration": facts,
        "curves": curves,
        "seeds": {"training": seed, "sampling": list(recipe.seeds)},
        "recipe": asdict(recipe) | {"samplers": rows.described(energies["fitted"].scale)},
        "reduced": recipe != FULL,
        "claims": claims,
        **rows.provenance(),
    }
    (outdir / "result.json").write_text(rows.text(result))
    plot.samples(outdir / "samples.png", panels)
    titles = {"fitted": "calibrated logit of fit_discriminator", "critic": "raw WGAN critic"}
    plot.mixing(outdir / "mixing.png", titles, curves, {name: law.facts() for name, law in laws.items()})
    return result


def _gan(outdir: Path, recipe: Recipe, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(G, critic), trained or from the cache."""

    def train() -> nn.ModuleList:
        with tqdm(total=recipe.gan_steps, desc="WGAN-GP", disable=None) as bar:
            return nn.ModuleList(
                wgan.train_wgan_gp(
                    toy_data.draw_evenly, steps=recipe.gan_steps, seed=seed, callback=lambda step, g: bar.update()
                )
            )

    empty = nn.ModuleList([build(wgan.generator, seed), build(wgan.critic, seed)])
    g, critic = _cached(outdir / f"wgan-{recipe.gan_steps}-{seed}.safetensors", empty, train)
    return g, critic


def _fitted(outdir: Path, recipe: Recipe, seed: int, g: nn.Module) -> nn.Module:
    """The logit of fit_discriminator, fitted or from the cache."""

    def fit() -> nn.Module:
        real = toy_data.draw(recipe.real, torch.Generator().manual_seed(seed + 1))
        d: nn.Module = build(wgan.ratio, seed)
        for stage, (iterations, batch, rate) in enumerate(recipe.fit):
            d = fr.fit_discriminator(
                g, real, iterations, prior=fr.Normal(wgan.LATENT_DIM), discriminator=d, batch_size=batch,
                learning_rate=rate, check_every=max(iterations // 4, 1), seed=seed + stage, progress=None,
            )  # fmt: skip
        return d

    stages = "-".join(str(iterations) for iterations, _, _ in recipe.fit)
    return _cached(outdir / f"ratio-{recipe.gan_steps}-{stages}-{seed}.safetensors", build(wgan.ratio, seed), fit)


def _cached(path: Path, empty: Any, make: Callable[[], Any]) -> Any:
    """The network at ``path``, loaded into ``empty``; else made, and kept there once it is complete."""
    if not path.exists():
        part = path.with_suffix(".part")
        save_file(make().state_dict(), part)
        part.replace(path)
    empty.load_state_dict(load_file(path))
    return empty.eval()


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


def claims_of(table: list[dict[str, Any]], laws: dict[str, rows.Law]) -> dict[str, Any]:
    """The claims of the experiment, each with its figures and whether it holds."""
    by_name = {row["name"]: row for row in table}
    law, base = laws["fitted"], by_name["generator"]
    sampled = by_name["the law, sampled"]
    claims = {
        "the law of the calibrated logit has high quality of at least .95 and all 25 modes": {
            "high_quality": law.high_quality, "smallest_share": float(law.shares.min()), "modes": sampled["modes"],
            "holds": law.high_quality >= 0.95 and sampled["modes"] == toy_data.MODES,
        }
    }  # fmt: skip
    for key, title in (("fitted", "the calibrated logit"), ("critic", "the raw critic")):
        chains = [row for row in table if row["energy"] == key and row["markov_chain"]]
        for row in chains:
            near = max(row["high_quality_distance"], row["share_distance"]) <= TOLERANCE
            claims[f"{row['name']} is within {TOLERANCE} of the law of {title} in high quality and every mode share"] = {
                "high_quality_distance": row["high_quality_distance"], "share_distance": row["share_distance"], "holds": near,
            }  # fmt: skip
    for row in table:
        if row["energy"] != "none":
            claims[f"{row['name']}: lower EMD than the generator"] = {
                "emd": row["emd"], "generator": base["emd"], "holds": row["emd"] < base["emd"],
            }  # fmt: skip
    return claims


@click.command()
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--quick", is_flag=True, help="A few steps of everything: says that it runs, nothing else.")
@click.option("--seed", default=0, show_default=True, help="Of the training; the sampling has three of its own.")
def main(outdir: Path, quick: bool, seed: int) -> None:
    """Latent samplers against their exact law on 25 Gaussians."""
    result = run(outdir, QUICK if quick else FULL, seed)
    for row in result["rows"]:
        click.echo(
            f"{row['name']:<34}K {row['steps']:>4}  HQ {row['high_quality']:.3f}  modes {row['modes']:>2}  "
            f"to law: HQ {row['high_quality_distance']:.3f}, share {row['share_distance']:.3f}  "
            f"std {row['std']:.4f}  EMD {row['emd']:.4f}"
        )
    for name, claim in result["claims"].items():
        click.echo(f"{'holds' if claim['holds'] else 'FAILS':<6} {name}")


if __name__ == "__main__":
    main()
