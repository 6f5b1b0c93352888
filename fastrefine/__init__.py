"""fastrefine: refine the samples of a trained GAN with its own discriminator."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the Triton kernels stand beside the package (kernels/), installed they stand in it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_HOMES = {
    "refiner": ("Refiner",),
    "errors": (
        "BackendError", "CouplingError", "FastrefineError", "FastrefineWarning", "GradientError", "InputError",
        "NonFiniteError", "SplitError",
    ),
    "diagnosis.check": ("Check",),
    "diagnosis.calibration": ("Calibration", "Diagnosis", "calibrate", "diagnose"),
    "training.composed": ("NoisyOutput", "SumDiscriminator"),
    "training.corrector": ("fit_corrector",),
    "networks.statistics": ("recalibrate_batch_norm",),
    "training.distil": ("distil",),
    "training.distilled": ("DistilledGenerator",),
    "training.fit": ("fit_discriminator",),
    "ops": ("use_backend",),
    "production.checkpoints": ("import_pair",),
    "production.hub": ("push_pair",),
    "production.saved_pair": ("Pair", "load_pair", "save_pair"),
    "production.tuning": ("TunedSampler", "tune_sampler"),
    "priors": ("Normal", "Product", "TruncatedNormal", "Uniform"),
    "diagnosis.reliability": ("reliability_plot",),
    "result": ("Result", "Snapshot", "Status"),
    "samplers": ("DDLS", "DOT", "HMC", "MALA", "PCN", "Collaborative", "DGflow"),
    "selection": ("MHResult", "best_of_n", "budgeted_rejection", "metropolis_hastings", "rejection_sample"),
    "training.shape": ("shape_discriminator", "tune_discriminator"),
    "networks.cut": ("layers",),
    "networks.split": ("Split",),
    "diagnosis.step_size": ("StepDiagnosis", "diagnose_steps"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("metrics", "models", "ops", "ray", "samplers", "stopping")

__all__ = sorted([*_HOME, "stopping"])

if TYPE_CHECKING:
    from fastrefine import stopping as stopping
    from fastrefine.diagnosis.calibration import Calibration as Calibration
    from fastrefine.diagnosis.calibration import Diagnosis as Diagnosis
    from fastrefine.diagnosis.calibration import calibrate as calibrate
    from fastrefine.diagnosis.calibration import diagnose as diagnose
    from fastrefine.diagnosis.check import Check as Check
    from fastrefine.diagnosis.reliability import reliability_plot as reliability_plot
    from fastrefine.diagnosis.step_size import StepDiagnosis as StepDiagnosis
    from fastrefine.diagnosis.step_size import diagnose_steps as diagnose_steps
    from fastrefine.networks.cut import layers as layers
    from fastrefine.networks.split import Split as Split
    from fastrefine.networks.statistics import recalibrate_batch_norm as recalibrate_batch_norm
    from fastrefine.ops import use_backend as use_backend
    from fastrefine.priors import Normal as Normal
    from fastrefine.priors import Product as Product
    from fastrefine.priors import TruncatedNormal as TruncatedNormal
    from fastrefine.priors import Uniform as Uniform
    from fastrefine.production.checkpoints import import_pair as import_pair
    from fastrefine.production.hub import push_pair as push_pair
    from fastrefine.production.saved_pair import Pair as Pair
    from fastrefine.production.saved_pair import load_pair as load_pair
    from fastrefine.production.saved_pair import save_pair as save_pair
    from fastrefine.production.tuning import TunedSampler as TunedSampler
    from fastrefine.production.tuning import tune_sampler as tune_sampler
    from fastrefine.refiner import Refiner as Refiner
    from fastrefine.result import Result as Result
    from fastrefine.result import Snapshot as Snapshot
    from fastrefine.result import Status as Status
    from fastrefine.samplers import DDLS as DDLS
    from fastrefine.samplers import DOT as DOT
    from fastrefine.samplers import HMC as HMC
    from fastrefine.samplers import MALA as MALA
    from fastrefine.samplers import PCN as PCN
    from fastrefine.samplers import Collaborative as Collaborative
    from fastrefine.samplers import DGflow as DGflow
    from fastrefine.selection import MHResult as MHResult
    from fastrefine.selection import best_of_n as best_of_n
    from fastrefine.selection import budgeted_rejection as budgeted_rejection
    from fastrefine.selection import metropolis_hastings as metropolis_hastings
    from fastrefine.selection import rejection_sample as rejection_sample
    from fastrefine.training.composed import NoisyOutput as NoisyOutput
    from fastrefine.training.composed import SumDiscriminator as SumDiscriminator
    from fastrefine.training.corrector import fit_corrector as fit_corrector
    from fastrefine.training.distil import distil as distil
    from fastrefine.training.distilled import DistilledGenerator as DistilledGenerator
    from fastrefine.training.fit import fit_discriminator as fit_discriminator
    from fastrefine.training.shape import shape_discriminator as shape_discriminator
    from fastrefine.training.shape import tune_discriminator as tune_discriminator


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``import fastrefine`` and ``--help`` cost no import of torch."""
    if name in _MODULES:
        return importlib.import_module(f"fastrefine.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"fastrefine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastrefine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
