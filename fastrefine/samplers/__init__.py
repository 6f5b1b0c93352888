"""The samplers: one file each, beside its paper; ``base`` says what a sampler is."""

from fastrefine.samplers.base import Evaluation, Kernel, Latent, Networks, Sample, Sampler, State, Traits
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.samplers.ddls import DDLS
from fastrefine.samplers.dgflow import DGflow
from fastrefine.samplers.dot import DOT
from fastrefine.samplers.hmc import HMC
from fastrefine.samplers.mala import MALA
from fastrefine.samplers.named import as_sampler, described
from fastrefine.samplers.pcn import PCN

__all__ = [
    "DDLS", "DOT", "HMC", "MALA", "PCN", "Collaborative", "DGflow", "Evaluation", "Kernel", "Latent", "Networks", "Sample",
    "Sampler", "State", "Traits", "as_sampler", "described",
]  # fmt: skip
