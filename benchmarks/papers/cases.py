"""Trained pairs that the experiments on steps refine: where, stopped by what, and how their samples are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers.cells import checkpoints
from benchmarks.papers.plane import IMBALANCED8, LATENT_DIM, RING, Plane, draw_roll, measure_roll
from benchmarks.papers.run import Table
from fastrefine.demo.gan import Draw, Training
from fastrefine.demo.judge import Judge
from fastrefine.demo.recipes import Recipe as ImageRecipe
from fastrefine.demo.recipes import embedded
from fastrefine.stopping import StopRule

QUICK_RING = replace(RING, hidden=(64,) * 3, training=Training(100, "adam", (2e-3, 2e-3)))  # in 250 steps half are good
CONTROLS = ("fixed", "backtracking")
REAL, NUM_REAL = 12345, 10_000  # seed and number of the points that stop and measure two-dimensional samples
POINT_SLOTS = 2500


@dataclass(frozen=True)
class Quality:
    """A figure of merit: its key in a row, and the difference below which two are called alike (`relative`: their ratio)."""

    key: str
    label: str
    alike: float
    higher: bool = False
    relative: bool = False

    def loss(self, value: float) -> float:
        """``value`` so that lower is better and differences count: logarithms where they are relative."""
        value = math.log(value) if self.relative else value
        return -value if self.higher else value

    @property
    def bound(self) -> float:
        """``alike`` as a difference of losses."""
        return math.log1p(self.alike) if self.relative else self.alike

    @property
    def margin(self) -> str:
        """``alike`` as text."""
        return f"{self.alike:.0%}" if self.relative else f"{self.alike:g}"

    @property
    def better(self) -> str:
        """ "higher" | "lower"."""
        return "higher" if self.higher else "lower"


@dataclass(frozen=True)
class Case:
    """A trained pair, the layer ``at`` which it is refined, and how its samples are measured."""

    name: str
    generator: nn.Module
    discriminator: nn.Module
    at: str
    latent: int
    real: Tensor
    measure: Callable[[Tensor], Mapping[str, float]]
    num_slots: int

    def refiner(self, control: str, step_size: float, max_steps: int, stop: StopRule | None) -> fr.Refiner:
        """Collaborative (nonsaturating, sgd) of a control and a step size, under a stop rule."""
        return fr.Refiner(
            self.generator, self.discriminator, fr.Collaborative(step_size, control=control), at=self.at,
            prior=fr.Normal(self.latent), real=self.real, stop=stop, max_steps=max_steps, num_slots=self.num_slots,
        )  # fmt: skip


def ring(table: Table, plane: Plane, steps: int) -> Case:
    """[CS]'s imbalanced ring in data space."""
    g, d, real = _trained(table, "ring", plane, IMBALANCED8.draw, steps)
    return Case("ring", g, d, "output", LATENT_DIM, real, IMBALANCED8.measure, POINT_SLOTS)


def swiss_roll(table: Table, plane: Plane, steps: int) -> Case:
    """[CS0]'s Swiss roll in data space."""
    g, d, real = _trained(table, "roll", plane, draw_roll, steps)
    return Case("Swiss roll", g, d, "output", LATENT_DIM, real, lambda x: measure_roll(x, real), POINT_SLOTS)


def images(recipe: ImageRecipe, real: Tensor, judge: Judge) -> Case:
    """The early-stopped GAN that the package carries, at its recipe's layer; real: training images (N, C, H, W)."""
    name = {"mnist": "MNIST"}.get(recipe.name, recipe.name)
    return Case(name, *embedded(recipe), recipe.at, recipe.latent, real[: recipe.reference], judge, recipe.num_slots)


def shaped_points(table: Table, key: str, name: str, case: Case, stop: StopRule | None) -> Case:
    """A two-dimensional case whose D is shaped by SGD, on samples that leave by a stop rule, or at a uniform step."""
    recipe = table.recipe
    refiner = case.refiner("backtracking", recipe.step_size, recipe.shaping_steps, stop)
    (_, empty), real = recipe.ring.networks(0), case.real
    return replace(case, name=name, discriminator=table.trained(key, empty, refiner, real, stop=stop, optimizer="sgd"))


def curve(rows: Sequence[Mapping[str, Any]], x: str, key: str, **where: Any) -> dict[float | None, float]:
    """Of the rows that match: values of column ``x`` in order of their appearance -> mean of a column over their rows."""
    mine = [row for row in rows if all(row[name] == value for name, value in where.items())]
    found: dict[float | None, list[float]] = {}
    for row in mine:
        found.setdefault(row[x], []).append(row[key])
    return {value: sum(ys) / len(ys) for value, ys in found.items()}


def _trained(table: Table, name: str, plane: Plane, draw: Draw, steps: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """(G, D, real samples)."""
    seed = table.seed
    pairs = checkpoints(table.cells, f"{name}-{seed}", lambda: plane.trainer(draw, seed), (steps,))
    return *pairs[steps], draw(NUM_REAL, torch.Generator().manual_seed(REAL))
