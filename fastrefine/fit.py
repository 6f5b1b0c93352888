"""Whether the arguments of a Refiner fit together: where it refines, what D returns, what the sampler needs."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import FastrefineWarning, InputError
from fastrefine.priors import Prior
from fastrefine.samplers.base import Latent, Sampler
from fastrefine.split import Split
from fastrefine.stopping import FixedSteps

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner


def check_parts(generator: Any, discriminator: Any, sampler: Any, at: Any, prior: Any) -> None:
    """InputError unless these are what a Refiner is made of."""
    if not isinstance(sampler, Sampler):
        raise InputError(f"sampler is {sampler!r}; wanted a sampler such as fastrefine.Collaborative(step_size=0.1)")
    if not isinstance(discriminator, nn.Module):
        raise InputError(f"discriminator is a {type(discriminator).__name__}; wanted a torch.nn.Module")
    if generator is not None and not isinstance(generator, nn.Module | Split):
        raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module, a Split or None")
    if isinstance(generator, Split) and at != "input":
        raise InputError(f"a Split is cut already: leave at='input', got {at!r}")
    if generator is None and at != "output":
        raise InputError(f"without a generator only images can be refined: pass at='output', not {at!r}")
    if not isinstance(at, str):
        raise InputError(f"at is {at!r}; wanted 'input', 'output' or the name of a module")
    if prior is not None and not isinstance(prior, Prior):
        raise InputError(f"prior is {prior!r}; wanted a prior such as fastrefine.Normal(64)")


def check_options(generator_kwargs: Any, discriminator_kwargs: Any, output_key: Any, callback: Any) -> None:
    """InputError unless the extra arguments of the networks, the output's key and the callback are of their types."""
    for name, kwargs in (("generator_kwargs", generator_kwargs), ("discriminator_kwargs", discriminator_kwargs)):
        if kwargs is not None and not isinstance(kwargs, dict):
            raise InputError(f"{name} is {kwargs!r}; wanted a dict of arguments or None")
    if output_key is not None and not isinstance(output_key, str | int) and not callable(output_key):
        raise InputError(f"output_key is {output_key!r}; wanted a key, an index, a callable or None")
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {callback!r}; wanted a callable or None")


def check(refiner: Refiner) -> None:
    """InputError where the sampler cannot do what it promises, a warning where it does something else."""
    sampler, name = refiner.sampler, type(refiner.sampler).__name__
    if refiner.scale == "critic" and sampler.loss in ("nonsaturating", "minimax"):
        _warn(f"the {sampler.loss} loss reads D as a logit, but discriminator_output='critic' was declared; use 'wasserstein'")
    steps = sampler.traits.transition_steps
    if refiner.max_steps % steps:
        fits = refiner.max_steps // steps * steps
        raise InputError(
            f"max_steps is {refiner.max_steps}, but one transition of {name} takes {steps} steps; wanted a multiple, {fits} or "
            f"{fits + steps}"
        )
    if not sampler.traits.targets_density:
        return
    if not refiner.refines_latents:
        where = "a Split" if refiner.at == "input" else f"at={refiner.at!r}"
        raise InputError(
            f"{name} samples p0(z) exp(d(G(z))), a law of the latent: it needs a generator and at='input', got {where}; "
            "Collaborative, DGflow and DOT refine any activation"
        )
    if refiner.prior is None:
        raise InputError(f"{name} samples p0(z) exp(d(G(z))): pass prior=, e.g. fastrefine.Normal(64)")
    if not isinstance(refiner.stop, FixedSteps) or refiner.keep == "best":
        _warn(f"{name} keeps its law only with stop=None and keep='last': what this run returns is not exact")
    if refiner.max_grad_norm is not None and not sampler.traits.needs_last_gradient:  # a Metropolis test makes up for it
        _warn(f"{name} with max_grad_norm samples another law, for the gradient it clips is the law's: this run is not exact")


def latent(refiner: Refiner) -> Latent:
    """The prior as a table that samplers read; InputError where it is none."""
    prior = refiner.prior
    assert prior is not None
    try:
        table = prior.table().to(refiner.device, refiner.dtype).contiguous()
    except NotImplementedError:
        name = type(refiner.sampler).__name__
        raise InputError(f"{prior!r} has no table(), by which {name} reads a prior; see fastrefine/priors.py") from None
    if table.shape != (3, prior.numel):
        raise InputError(f"table() of {prior!r} has shape {tuple(table.shape)}; wanted (3, {prior.numel})")
    low, high = table[1:]
    if bool((torch.isfinite(low) != torch.isfinite(high)).any() | (low >= high).any()):
        raise InputError(f"table() of {prior!r} must give each element two finite bounds, low < high, or -inf and inf")
    return Latent(table)


def check_latents(refiner: Refiner, latents: Tensor) -> None:
    """InputError where given latents (N, ...) are not of the prior that the sampler targets."""
    prior = refiner.prior
    if prior is None or not refiner.sampler.traits.reads_prior or not refiner.refines_latents:
        return
    if latents.shape[1:].numel() != prior.numel:
        raise InputError(f"latents of shape {tuple(latents.shape)} do not fit {prior}, which has {prior.numel} elements each")


def snapshots(steps: Sequence[int], max_steps: int) -> tuple[int, ...]:
    """The numbers of steps in order, each once; InputError for one that is not in 0 ... max_steps."""
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise InputError(f"snapshots is {steps!r}; wanted numbers of steps, e.g. (0, 10, 25, 50)")
    return tuple(sorted({checks.count("snapshots", step, 0, max_steps) for step in steps}))


def _warn(text: str) -> None:
    warnings.warn(text, FastrefineWarning, stacklevel=4)


class Weights:
    """A module's parameters and buffers as they are now; unequal once one was updated in place, or replaced.

    An update by way of ``.data`` leaves a tensor's version as it is, so that the content is summed up too, in two ways.
    """

    def __init__(self, module: nn.Module | None):
        self.tensors = () if module is None else (*module.parameters(), *module.buffers())  # held: an id is not used again
        self.versions = [0 if t.is_inference() else t._version for t in self.tensors]
        self.sums: list[bytes] = []
        with torch.no_grad():
            for device in dict.fromkeys(t.device for t in self.tensors):  # one wait for each
                here = [t for t in self.tensors if t.device == device and t.numel()]
                sums = [part for t in here for part in _sums(t)]
                self.sums.append(torch.stack(sums).cpu().numpy().tobytes() if sums and device.type != "meta" else b"")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        same = len(self.tensors) == len(other.tensors) and all(map(operator.is_, self.tensors, other.tensors))
        return same and self.versions == other.versions and self.sums == other.sums

    __hash__ = None  # type: ignore[assignment]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sums(t: Tensor) -> list[Tensor]:
    """Int64 scalars where ``t`` lies, of its bits: equal whatever the number of threads. Of sparse and quantized ones none."""
    if t.layout is not torch.strided or t.is_quantized:
        return []
    t = torch.view_as_real(t) if t.is_complex() else t
    bits = t.view(_BITS[t.element_size()]).reshape(-1)
    return [bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)]  # the other half alone: for what was swapped


def device_of(*modules: Any) -> torch.device:
    """Where the first of the modules with any tensor has it."""
    for module in modules:
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                return tensor.device
    return torch.device("cpu")
