"""The samplers: one family, one file each; they import torch and ``base`` only."""

from fastrefine.samplers.base import Evaluation, Kernel, Latent, Sample, Sampler, State
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.samplers.ddls import DDLS
from fastrefine.samplers.dgflow import DGflow
from fastrefine.samplers.dot import DOT
from fastrefine.samplers.hmc import HMC
from fastrefine.samplers.mala import MALA

__all__ = [
    "DDLS", "DOT", "HMC", "MALA", "Collaborative", "DGflow", "Evaluation", "Kernel", "Latent", "Sample", "Sampler", "State",
]  # fmt: skip
