"""The experiments by name. Nothing here imports torch: the list and usage errors answer at once."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrefine.errors import InputError


@dataclass(frozen=True)
class Experiment:
    """One experiment: what the list says of it, and how it is run.

    seeds: of a full run; a quick one takes the first. data: what --data names, empty where none is taken; needs_data:
    whether a full run needs it (a quick one makes its own). minutes: of a full run on one core, about. module: where its code
    is, the one of its name unless given.
    """

    name: str
    title: str
    source: str
    minutes: int
    seeds: tuple[int, ...] = (0,)
    data: str = ""
    needs_data: bool = False
    module: str = ""

    def run(self, outdir: Path, *, seeds: Sequence[int] = (), quick: bool = False, data: Path | None = None) -> dict[str, Any]:
        """Run it into ``outdir``/name. Raises InputError where data is missing or not taken."""
        if data is not None and not self.data:
            raise InputError(f"{self.name} makes its data itself; leave --data out")
        if data is None and self.needs_data and not quick:
            raise InputError(f"{self.name} needs --data: {self.data}")
        from benchmarks.papers.run import run

        chosen = tuple(seeds) or (self.seeds[:1] if quick else self.seeds)
        return run(self.paper(), self.name, outdir / self.name, seeds=chosen, quick=quick, data=data)

    def paper(self) -> Any:
        """What makes its rows, see ``run``: the module of its name, or one of PAPERS in ``module``."""
        module = importlib.import_module(f"benchmarks.papers.{self.module or self.name}")
        return module.PAPERS[self.name] if self.module else module


_MNIST = "a folder with MNIST's four original .gz files"
_CIFAR10 = "a folder with cifar10-train.zip and cifar10-test.zip"
_FRESH = tuple(range(3, 13))  # ten seeds on which nothing of [CS0]'s recipes was chosen
_ALL = (
    Experiment("imbalanced8", "Imbalanced ring of 8 Gaussians over training", "[CS] Figures 3, 4a-c", 150, (0, 1, 2)),
    Experiment("gaussians25", "25 Gaussians, every sampler", "[CS] 4.1, [DDLS] 5.1, [DOT] 4.1", 90),
    Experiment("gaussians8", "8 Gaussians: shaping against tuning", "[CS0] Table 1, Figures 3-5", 130, _FRESH, module="cs0"),
    Experiment("swissroll", "Swiss roll: shaping against tuning", "[CS0] Table 1, Figures 3-4", 65, _FRESH, module="cs0"),
    Experiment("diagnosis", "Which score tells what Metropolis-Hastings gains", "[CS] Table 1, Figure 4d", 15, (0, 1, 2)),
    Experiment("mnist", "MNIST over training, layers, denoising", "[CS] 4.2; [CS0] Figures 6, 7, 9", 90, (0,), _MNIST, True),
    Experiment("cifar10", "CIFAR-10, every sampler", "[CS] 4.3, [DDLS] 5.2, [DGflow]", 60, (0,), _CIFAR10, True),
    Experiment("translation", "CycleGAN, refined by the target's PatchGAN", "[CS] 4.4", 20, (0,), _MNIST, True),
    Experiment("steps", "What stop rules save: quality against mean steps", "new", 15, (0, 1, 2)),
    Experiment(
        "folder", "The image protocol on a folder of pictures", "[CS] 4.3, SAGAN", 600, (0,), "a folder of pictures", True
    ),
    Experiment("step_control", "Backtracking against fixed step sizes", "new", 30, (0,), _MNIST + " (else without MNIST)"),
    Experiment("budget", "Quality for a budget of evaluations", "new", 110, (0, 1, 2), _MNIST + " (else digits and ring)"),
    Experiment("budget_cifar10", "Quality for a budget on colour images", "new", 150, (0,), _CIFAR10, True),
    Experiment("budget_sngan", "The same for an SNGAN", "new", 150, (0,), _CIFAR10, True),
    Experiment("corrector", "VAE and flow with a borrowed discriminator", "[DGflow] 4.3", 10, (0, 1, 2)),
    Experiment("fitted", "A generator that comes alone", "new", 10, (0,), _MNIST + " (else digits)"),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
