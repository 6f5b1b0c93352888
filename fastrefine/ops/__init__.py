"""The ops of the step: one public entry each, the PyTorch reference here, other backends by name (see ``registry``)."""

from fastrefine.ops.follow import follow
from fastrefine.ops.metropolis import metropolis
from fastrefine.ops.noise import Noise, Stream, normal, philox, uniform
from fastrefine.ops.refine_step import baked, refine_step
from fastrefine.ops.registry import available, choose, serving, use_backend

__all__ = [
    "Noise", "Stream", "available", "baked", "choose", "follow", "metropolis", "normal", "philox", "refine_step",
    "serving", "uniform", "use_backend",
]  # fmt: skip
