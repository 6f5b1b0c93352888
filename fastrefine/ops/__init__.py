"""The ops of the step: one public entry each, the PyTorch reference here, other backends by name (see ``registry``)."""

from fastrefine.ops.noise import Noise, Stream, normal, philox, uniform
from fastrefine.ops.refine_step import baked, refine_step
from fastrefine.ops.registry import available, choose, use_backend

__all__ = [
    "Noise", "Stream", "available", "baked", "choose", "normal", "philox", "refine_step", "uniform", "use_backend",
]  # fmt: skip
