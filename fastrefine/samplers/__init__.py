"""The samplers: one family, one file each; they import torch and ``base`` only."""

from fastrefine.samplers.base import Evaluation, Kernel, Sample, Sampler, State
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.samplers.dgflow import DGflow

__all__ = ["Collaborative", "DGflow", "Evaluation", "Kernel", "Sample", "Sampler", "State"]
