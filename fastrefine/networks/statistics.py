"""Statistics that a network carries along: those of BatchNorm and the vectors of spectral norm. Are they what training left?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastrefine.errors import FastrefineWarning, InputError, warn
from fastrefine.networks.copies import twin, unwrap

_UNLIKE = 4.0  # factor between a carried variance and that of a probe batch from which it is doubted


class StatisticsWarning(FastrefineWarning):
    """A network carries statistics that are not what training left."""


def check(what: str, given: nn.Module, own: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Warn where a network's statistics are doubtful. given: the caller's; own: our copy, which ``run`` evaluates."""
    for doubt in (*_doubts_of_spectral_norm(unwrap(given)), *_doubts_of_batch_norm(own, run)):
        warn(StatisticsWarning(f"{what}: {doubt}"))


def _doubts_of_batch_norm(network: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
    fresh = {
        name: module for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
        and not (module.running_mean.any() and module.running_var.any())
    }  # fmt: skip
    given_others = _given_others(network, fresh, run)
    unlike = [name for name in fresh if name in given_others]
    if not unlike:
        return []
    return [
        f"{_some('BatchNorm', unlike)} carries statistics that were never updated (mean 0), and is given others: missing from "
        "the checkpoint, or not copied to the averaged weights? In Python fastrefine.recalibrate_batch_norm(network, batches) "
        "takes them anew"
    ]


def _some(kind: str, names: list[str]) -> str:
    return f"{kind} {names[0]!r}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _given_others(network: nn.Module, norms: Mapping[str, nn.Module], run: Callable[[nn.Module], Any]) -> set[str]:
    """The norms whose inputs have other moments than they carry."""
    found: set[str] = set()
    handles = []
    for name, norm in norms.items():

        def compare(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1)
            if x.shape[1] < 2:
                return
            variance = x.var(1).clamp(min=1e-12)
            shift = ((x.mean(1) - module.running_mean).square() / variance).mean().sqrt()
            ratio = (module.running_var.clamp(min=1e-12) / variance).log().abs().mean()
            if float(shift) > 1 or float(ratio) > math.log(_UNLIKE):
                found.add(name)

        handles.append(norm.register_forward_pre_hook(compare))
    try:
        with torch.no_grad():
            run(network)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _doubts_of_spectral_norm(network: nn.Module) -> list[str]:
    names = [name for name, vectors in _spectral_vectors(network) if any(abs(float(v.norm()) - 1) > 0.01 for v in vectors)]
    if not names:
        return []
    return [
        f"{_some('spectral norm', names)} has vectors whose length is not 1, so the weights are scaled wrongly: averaged over "
        "training (EMA)? Put back the vectors of the network in training, or divide each by its length"
    ]


def _spectral_vectors(network: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    for name, module in network.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        for key in (key for key in buffers if key.endswith("_u")):
            if key == "_u" or f"{key[:-2]}_orig" in module._parameters:
                pair = buffers[key], buffers.get(f"{key[:-2]}_v")
                yield name.partition(".parametrizations.")[0], [v for v in pair if v is not None and v.numel()]


def recalibrate_batch_norm(network: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """A copy of a network, in eval mode, whose BatchNorms carry the statistics of these batches.

    For a generator with averaged weights (EMA) whose BatchNorm buffers were not averaged, or are missing. batches: of
    what the network is called with, a tensor (N, ...) or a tuple of arguments each; all count alike. A few thousand samples
    are enough. The network itself stays as it is. Raises InputError where it has no BatchNorm, or where there is no batch.

    Example: ``fr.recalibrate_batch_norm(g, (torch.randn(64, 128) for _ in range(50)))``
    """
    with torch.inference_mode(False), torch.no_grad():
        own = twin(unwrap(network)).eval()
        norms = [module for module in own.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        if not norms:
            raise InputError(f"{type(network).__name__} has no BatchNorm with running statistics")
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            own(*(batch if isinstance(batch, tuple | list) else (batch,)))
        if not count:
            raise InputError("there is no batch to take the statistics from")
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return own.eval()
