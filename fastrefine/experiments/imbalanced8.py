"""[CS] Figures 3 and 4a-c: the imbalanced ring of eight Gaussians, a GAN at five checkpoints, five ways to sample from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastrefine import settings
from fastrefine.experiments import plane_rows, result_file
from fastrefine.experiments.cells import Cells
from fastrefine.experiments.mixtures import IMBALANCED8
from fastrefine.experiments.plane import RING, smaller
from fastrefine.experiments.plane_rows import Recipe, Row, Table

FULL = Recipe(RING, (1000, 3000, 5000, 7000, 9000), 5000, 1000, 8e-3, 0.1)
QUICK = Recipe(smaller(RING, 100), (20,), 5, 50, 8e-3, 0.1, samples=300, chain_length=3, real=300, num_slots=100)
