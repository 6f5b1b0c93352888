"""Adam (Kingma & Ba 2015) for samples that are at different steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrefine.samplers.base import State, per_slot

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MOMENTS = ("first_moment", "second_moment")  # (S, F) each, 0 at first


def adam(g: Tensor, state: State, step: Tensor, step_size: float) -> tuple[Tensor, State]:
    """(what Adam takes off (S, F), both moments) for gradients g (S, F); bias correction by each sample's own step (S,)."""
    m = BETA1 * state["first_moment"] + (1 - BETA1) * g
    v = BETA2 * state["second_moment"] + (1 - BETA2) * g * g
    count = (step + 1).double()  # in float32, 1 - BETA2**1 would keep only four digits
    scale, correction = step_size / (1 - BETA1**count), 1 - BETA2**count
    spread = torch.sqrt(v / per_slot(correction.to(g.dtype))) + EPSILON
    return per_slot(scale.to(g.dtype)) * m / spread, {"first_moment": m, "second_moment": v}
