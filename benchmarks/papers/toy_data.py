"""The 25 Gaussians of [DOT] and [DDLS] (Tanaka 2019, Che et al. 2020), and what is measured of samples of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALE = 2.828  # [DOT] divides a grid of spacing 2 and a standard deviation of .05 by it
SIGMA = 0.05 / SCALE
RADIUS = 4 * SIGMA  # a sample nearer than this to a centre is of high quality
MODES = 25


def centres(dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres (25, 2), {-4, -2, 0, 2, 4}^2 / 2.828."""
    axis = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0], dtype=torch.float64) / SCALE
    return torch.cartesian_prod(axis, axis).to(dtype)


def draw(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2), each centre as likely as the others."""
    which = torch.randint(MODES, (n,), generator=random)
    return centres()[which] + SIGMA * torch.randn(n, 2, generator=random)


def draw_evenly(n: int, random: torch.Generator) -> Tensor:
    """Real samples (n, 2), n a multiple of 25: as many of each centre, in turn (the stratified batches of [CS] 4.1)."""
    return centres().repeat(n // MODES, 1) + SIGMA * torch.randn(n, 2, generator=random)


def modes_of(x: Tensor) -> Tensor:
    """Of samples (n, 2): the centre (n,) int64 they lie within 4 sigma of, -1 where there is none."""
    middle = centres(x.dtype).to(x.device)
    found = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    for part in torch.arange(len(x), device=x.device).split(1_000_000):
        nearest, which = torch.cdist(x[part], middle, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        found[part] = torch.where(nearest < RADIUS, which, -1)
    return found


def measure(x: Tensor) -> dict[str, Any]:
    """Of samples (n, 2): high_quality (share), modes (recovered), shares (25 of all samples) and std of the good ones.

    std: root mean square distance per axis of the high-quality samples from their centres; sigma is .0177.
    """
    which = modes_of(x)
    good = which >= 0
    away = x[good].double() - centres(torch.float64)[which[good]]
    shares = torch.bincount(which[good], minlength=MODES).double() / max(len(x), 1)
    return {
        "high_quality": float(shares.sum()),
        "modes": int((shares > 0).sum()),
        "shares": shares.tolist(),
        "std": float(away.square().mean().sqrt()) if len(away) else float("nan"),
    }


def earth_mover(x: Tensor, y: Tensor) -> float:
    """Earth mover's distance of equally many samples (n, 2) and (n, 2), Euclidean cost: POT, or SciPy without it."""
    a, b = x.double().numpy(), y.double().numpy()
    cost = np.linalg.norm(a[:, None] - b[None], axis=2)
    try:
        import ot  # type: ignore[import-untyped]
    except ImportError:
        from scipy.optimize import linear_sum_assignment

        return float(cost[linear_sum_assignment(cost)].mean())
    return float(ot.emd2([], [], cost, numItermax=10_000_000))
