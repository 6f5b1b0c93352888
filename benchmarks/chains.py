"""``python -m benchmarks.chains [FOLDER]``: DDLS against torchebm's LangevinDynamics on the same frozen networks, on a CPU.

Both make K steps of Langevin dynamics on the latents of all chains, and then the images. They run in one process in turn, in
one thread; figures are medians of CPU time, ours at the better of two numbers of slots. That both compute the same is tried
before, with next to no noise. FOLDER holds public checkouts (``zoo_pairs``); the networks of ``fastrefine.models`` need none.
Needs ``pip install torchebm``.
"""

from __future__ import annotations

import copy
import datetime
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.machine import RESULTS, arithmetic, facts, write_json
from benchmarks.zoo import WrongResults, best, clock, ratio
from benchmarks.zoo_pairs import OURS, PUBLIC, ZooPair

KIND = "fastrefine chains"
ROWS = (  # pair, chains, steps
    ("mlp2d", 8, 100), ("mlp2d", 64, 100), ("mlp2d", 2048, 100), ("dcgan16", 8, 100), ("dcgan16", 64, 50),
    ("PyTorch-GAN wgan_gp", 64, 50), ("PyTorch-GAN wgan_gp", 1024, 20), ("examples dcgan", 64, 20), ("mimicry sngan", 64, 20),
    ("sngan32, a quarter as wide", 64, 20), ("stylegan2-ada", 8, 20),
)  # fmt: skip
EPS = 0.01  # DDLS's step size; torchebm's is half of it
QUIET = 1e-12  # noise scale at which the two must agree
WRONG = 1e-2


def peer(pair: ZooPair, networks: tuple[nn.Module, nn.Module], noise: float) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """torchebm's sampler on a pair: (latents, steps) -> (latents, images)."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    generator, discriminator = (network.requires_grad_(False) for network in copy.deepcopy(networks))

    class Energy(BaseModel):  # type: ignore[misc]
        def forward(self, z: Tensor) -> Tensor:
            logits = pair.logits(discriminator, pair.generate(generator, z))
            return z.flatten(1).square().sum(1) / 2 - logits.flatten()

    sampler = LangevinDynamics(Energy(), step_size=EPS / 2, noise_scale=noise, device="cpu")

    def run(z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = sampler.sample(x=z.clone(), n_steps=steps)
            return found, pair.generate(generator, found)

    return run


def ours(pair: ZooPair, networks: tuple[nn.Module, nn.Module], noise: float, steps: int) -> fr.Refiner:
    """DDLS on the same pair."""
    return fr.Refiner(
        *networks, fr.DDLS(EPS, noise), prior=fr.Normal(*pair.latent), max_steps=steps, generate=pair.generate,
        discriminate=pair.discriminate, discriminator_output=pair.output,
    )  # fmt: skip


def row(pair: ZooPair, networks: tuple[nn.Module, nn.Module], n: int, steps: int, rounds: int) -> dict[str, Any]:
    """The two in turn; WrongResults where they do not compute the same."""
    z = pair.latents(n)
    wanted, found = peer(pair, networks, QUIET)(z, 10)[0], ours(pair, networks, QUIET, 10).refine(z).latents
    off, moved = ((other - wanted).abs().max() for other in (found, z * (1 - EPS / 2) ** 10))  # the prior alone
    off = float(off / moved)
    if not off <= WRONG:
        raise WrongResults(f"latents differ after 10 steps by {off:.1e} of what the networks moved them")
    theirs, mine = peer(pair, networks, 1.0), ours(pair, networks, 1.0, steps)
    sizes = {size: mine.replaced(num_slots=size) for size in ((256, 1024) if n >= 1024 else (None,))}
    for refiner in sizes.values():
        refiner.refine(z)
    slots = best(sizes, lambda refiner: refiner.refine(z))
    runs: dict[str, Callable[[], Any]] = {"torchebm": lambda: theirs(z, steps), "ours": lambda: sizes[slots].refine(z)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    runs["torchebm"]()
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(clock(run)[0])
    return {
        "pair": pair.name, "chains": n, "num_slots": slots or n, "K": steps, "off": off,
        "ratio": ratio(seconds["torchebm"], seconds["ours"]),
        "chain_steps_per_second": n * steps / statistics.median(seconds["ours"]), "seconds": seconds,
    }  # fmt: skip


@click.command()
@click.argument("zoo", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "chains-cpu.json")
def main(zoo: Path | None, rounds: int, output: Path) -> None:
    """Chain steps per second of DDLS against torchebm, a line for each row as it comes."""
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", "benchmarks.chains", *("ZOO" if part == str(zoo) else part for part in sys.argv[1:])])
    record: dict[str, Any] = {
        "kind": KIND, "machine": facts(torch.device("cpu")), "torchebm": version("torchebm"), "command": command,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": [],
    }  # fmt: skip
    pairs = {pair.name: pair for pair in (*OURS, *(PUBLIC if zoo else ()))}
    for name, n, steps in ROWS:
        if name not in pairs:
            continue
        with warnings.catch_warnings(), arithmetic("float32"):
            warnings.simplefilter("ignore")
            found = row(pairs[name], pairs[name].load(zoo), n, steps, rounds)
        record["rows"].append(found)
        click.echo(f"{name:<28} {n:>5} chains  {found['ratio']:5.2f}x torchebm  off {found['off']:.0e}")
        write_json(output, record)


if __name__ == "__main__":
    main()
