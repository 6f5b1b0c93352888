"""Rules by which each sample sets its own step size. None reads another sample, none costs an evaluation.

A step size stays between SMALLEST and LARGEST times the first one; under backtracking and Barzilai-Borwein it only stays below
the upper bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST, LARGEST = 1e-6, 1e6
GROW, SHRINK = 1.2, 0.5  # factors of backtracking
WIDEN, LEAST, MOST = 2.0, 0.2, 5.0  # Barzilai-Borwein: factor where the curvature is negative, bounds of all factors
ERRORS = 3.0  # rounding errors of the loss by which backtracking lets a trial be worse
DECAY = 0.6  # the k-th test of a chain adapts by a gain of k^-DECAY


def accepts(loss: Tensor, best_loss: Tensor, slack: float) -> Tensor:
    """Backtracking: whether a trial is accepted (S,), its loss being at most ``slack`` above the best so far; NaN is not."""
    return loss <= best_loss + slack


def backtracking(step_size: Tensor, accepted: Tensor, first: float) -> Tensor:
    """Step sizes (S,) after trials that were accepted, which grow, or rejected, which halve; ``first``: at the start."""
    grown = torch.clamp(step_size * GROW, max=LARGEST * first)
    return torch.where(accepted, grown, step_size * SHRINK)


def barzilai_borwein(step_size: Tensor, accepted: Tensor, moved: Tensor, bent: Tensor, first: float) -> Tensor:
    """Step sizes (S,) by the curvature along the last move (Barzilai & Borwein 1988), per sample.

    moved: s's, bent: s'y, both (S,) float64, with s the accepted move and y the change of the gradient. s's / s'y is the
    step that a quadratic with this curvature wants. It changes the step by a factor of LEAST to MOST; WIDEN where the
    curvature is not positive. A rejected trial halves the step.
    """
    size = step_size.double()
    known = (bent > 0) & bent.isfinite()
    fitted = torch.where(known, moved / torch.where(known, bent, 1.0), WIDEN * size)
    fitted = torch.minimum(torch.minimum(torch.maximum(fitted, LEAST * size), MOST * size), size.new_tensor(LARGEST * first))
    return torch.where(accepted, fitted, SHRINK * size).to(step_size.dtype)


def robbins_monro(
    step_size: Tensor, test: Tensor, log_ratio: Tensor, target: float, first: float, largest: float = LARGEST
) -> Tensor:
    """Step sizes (S,) after the k-th Metropolis test of each chain (Robbins & Monro 1951, on log eps).

    log eps += k^-DECAY (min(1, exp(log_ratio)) - target). test: (S,) whole numbers k, 0 counts as 1. log_ratio: (S,)
    float64, never NaN. target: wanted share of accepted trials. first: the step size at the start. largest: of the step
    sizes, as a multiple of the first.
    """
    gain = test.clamp(min=1).double() ** -DECAY * (torch.exp(log_ratio.clamp(max=0)) - target)
    return torch.clamp(step_size * torch.exp(gain).to(step_size.dtype), SMALLEST * first, largest * first)
