"""The ops of the step: one public entry each, the PyTorch reference here, other backends by name (see ``registry``)."""

from fastrefine.ops.follow import follow
from fastrefine.ops.refine_step import baked, refine_step
from fastrefine.ops.registry import available, choose, use_backend

__all__ = ["available", "baked", "choose", "follow", "refine_step", "use_backend"]
