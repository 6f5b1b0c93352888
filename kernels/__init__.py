"""The backend "triton": the ops as Triton kernels, imported as ``fastrefine.kernels``, never as ``kernels``."""

from .copy_context import copy_context
from .launch import refine_step
from .rules import RULES as _RULES

RULES = frozenset(_RULES)

__all__ = ["RULES", "copy_context", "refine_step"]
