"""The ops of the step: one public entry each, the PyTorch reference here, other backends by name (see ``registry``)."""

from fastrefine.ops.copy_context import copy_context
from fastrefine.ops.refine_step import refine_step
from fastrefine.ops.registry import available, baked, choose, use_backend

__all__ = ["available", "baked", "choose", "copy_context", "refine_step", "use_backend"]
