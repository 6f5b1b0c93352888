"""The backend "triton": the ops as Triton kernels, imported as ``fastrefine.kernels``, never as ``kernels``."""

from .launch import refine_step
from .philox import normal
from .rules import RULES as _RULES

RULES = frozenset(_RULES)

__all__ = ["RULES", "normal", "refine_step"]
