"""How far a discriminator may be trusted as a density ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.result import Result
from fastrefine.selection import logits_of


@dataclass(frozen=True)
class Diagnosis:
    """Calibration of s(d) as the probability of being real, on as many real as generated images as were given.

    brier: mean squared error of the probability, 0 best (Brier 1950) = reliability - resolution + uncertainty up to the
    spread within bins (Murphy 1973). z: sum(y - p) / sqrt(sum p (1 - p)), standard normal when calibrated ([MHGAN] 3.2).
    ece, mce: mean (weighted) and largest |mean p - share of real| over equal-width bins (Guo et al. 2017).
    """

    brier: float
    z: float
    ece: float
    mce: float
    reliability: float
    resolution: float
    uncertainty: float
    num_real: int
    num_fake: int


def diagnose(real_logits: Tensor | Result, fake_logits: Tensor | Result, *, bins: int = 10) -> Diagnosis:
    """Diagnose logits (N,) of real and (M,) of generated images; use held-out real images and equal counts.

    Raises InputError for empty or non-finite logits, and for the scores of a critic.
    """
    checks.count("bins", bins, 1)
    real, fake = logits_of(real_logits, "diagnose"), logits_of(fake_logits, "diagnose").to("cpu")
    real = real.to("cpu")
    if not len(real) or not len(fake):
        raise InputError(f"diagnose wants real and generated logits, got {len(real)} and {len(fake)}")
    p = torch.sigmoid(torch.cat([real, fake]))
    if not bool(torch.isfinite(p).all()):
        raise InputError("diagnose wants logits without NaN")
    y = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    which = (p * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, which, torch.ones_like(p))
    mean_p = torch.zeros(bins, dtype=torch.float64).index_add(0, which, p) / count.clamp(min=1)
    mean_y = torch.zeros(bins, dtype=torch.float64).index_add(0, which, y) / count.clamp(min=1)
    weight, gap, base = count / len(p), (mean_p - mean_y).abs(), y.mean()
    variance = float((p * (1 - p)).sum())
    excess = float((y - p).sum())
    return Diagnosis(
        brier=float(((p - y) ** 2).mean()),
        z=excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0,
        ece=float((weight * gap).sum()),
        mce=float(gap.max()),
        reliability=float((weight * gap**2).sum()),
        resolution=float((weight * (mean_y - base) ** 2).sum()),
        uncertainty=float(base * (1 - base)),
        num_real=len(real),
        num_fake=len(fake),
    )
