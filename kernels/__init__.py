"""The backend "triton": the ops as Triton kernels, imported as ``fastrefine.kernels``, never as ``kernels``."""

from .follow import follow
from .launch import refine_step
from .metropolis import metropolis
from .philox import normal, uniform
from .rules import RULES as _RULES

RULES = frozenset(_RULES)

__all__ = ["RULES", "follow", "metropolis", "normal", "refine_step", "uniform"]
