"""The backend "triton": the ops as Triton kernels, imported as ``fastrefine.kernels``, never as ``kernels``."""

from .follow import follow
from .launch import refine_step
from .rules import RULES as _RULES

RULES = frozenset(_RULES)

__all__ = ["RULES", "follow", "refine_step"]
