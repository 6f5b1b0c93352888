"""The backend "cpu": the ops in C++ (csrc/), built as ``fastrefine._native``; specification: the ops' docstrings."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrefine.errors import BackendError
from fastrefine.ops.copy_context import copy_context
from fastrefine.ops.registry import Absent
from fastrefine.ops.slots import Outputs, Pool, Rule, Slots
from fastrefine.samplers.base import Evaluation

# ``copy_context`` is PyTorch's here too: C++ has nothing to add to copies of rows.
__all__ = ["RULES", "copy_context", "refine_step"]

RULES = frozenset(
    {
        "sgd", "backtracking", "barzilai_borwein", "adaptive", "momentum", "adam", "ladam", "ddls", "mala", "pcn", "hmc",
        "dot_adam", "dot_sgd",
    }
)  # fmt: skip


def _load() -> Any:
    name = "fastrefine._native"
    if os.environ.get("FASTREFINE_BUILD") == "none":  # a build of before may still lie in the checkout
        raise Absent("FASTREFINE_BUILD=none")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if cause.name == name:
            raise Absent(f"{name} is not built; FASTREFINE_BUILD=cpu pip install says why") from None
        raise
    except ImportError as cause:
        raise BackendError(f"{name} exists but does not load: {cause}") from cause


_native = _load()


@dataclass(eq=False)
class _Bound:
    """The C++ view of a run's tensors, which must be written in place from here on, and what it was made from."""

    params: Any
    tables: tuple[Tensor | None, Tensor | None]  # the sampler's, which lie where the addresses say while they are held
    pool: Pool
    outputs: Outputs
    rule: Rule

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Addresses do not survive a copy of the tensors: a copy binds anew."""


def refine_step(slots: Slots, evaluation: Evaluation | None, pool: Pool, outputs: Outputs, rule: Rule) -> None:
    """As ``ops.refine_step``, on CPU tensors, for the rules in ``RULES``."""
    bound = slots.cache.get("cpu")
    if not isinstance(bound, _Bound) or (bound.pool, bound.outputs, bound.rule) != (pool, outputs, rule):
        bound = _Bound(*_params(slots, pool, outputs, rule), pool, outputs, rule)
        slots.cache["cpu"] = bound
    if evaluation is None:
        _native.refine_step(bound.params, 0, 0, 0, 1)
        return
    assert evaluation.grad is not None or not rule.sampler.traits.needs_last_gradient, rule.sampler
    s, f = slots.activation.shape
    dtype = slots.activation.dtype
    logit, loss = evaluation.logit.contiguous(), evaluation.loss.contiguous()
    grad = None if evaluation.grad is None else evaluation.grad.contiguous()
    at = _address(logit, dtype, s), _address(loss, dtype, s), _address(grad, dtype, s, f)
    _native.refine_step(bound.params, *at, torch.get_num_threads())


def _address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int:
    """Where a contiguous CPU tensor of this type and shape lies; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.device.type == "cpu" and tensor.dtype == dtype, (tensor.device, tensor.dtype, dtype)
    assert tensor.shape == shape and tensor.is_contiguous(), (tensor.shape, tensor.stride(), shape)
    return tensor.data_ptr()


def _params(slots: Slots, pool: Pool, outputs: Outputs, rule: Rule) -> tuple[Any, tuple[Tensor | None, Tensor | None]]:
    assert slots.view is None, "the networks read the activation itself on a CPU"
    kernel = rule.sampler.kernel()
    assert kernel is not None and kernel.rule in RULES, kernel
    real, long, integer = slots.activation.dtype, torch.int64, torch.int32
    assert real in (torch.float32, torch.float64), real
    (s, f), rows, window = slots.activation.shape, len(pool.threshold), len(outputs.status)
    state, count = slots.state, (len(kernel.scalars), len(kernel.vectors))
    names = slots.scalar_names, slots.vector_names
    assert names == (kernel.scalars, kernel.vectors), (names, kernel)
    length = 0 if kernel.schedule is None else kernel.schedule.shape[1]
    fields: dict[str, Any] = {
        "real64": real == torch.float64,
        "num_slots": s,
        "features": f,
        "pool_rows": rows,
        "output_rows": window - 1,
        "rule": kernel.rule,
        "hyper": (*kernel.hyper, *[0.0] * (8 - len(kernel.hyper))),
        "scalars": _address(slots.scalars, real, count[0], s),
        "vectors": _address(slots.vectors, real, count[1], s, f),
        "num_scalars": count[0],
        "num_vectors": count[1],
        "position": _address(state["position"], real, s, f),
        "logit": _address(state["logit"], real, s),
        "noise": kernel.noise,
        "latent": _address(kernel.latent, real, 3, f),
        "schedule": _address(kernel.schedule, real, 2, length),
        "schedule_length": length,
        "max_grad_norm": -1.0 if rule.max_grad_norm is None else rule.max_grad_norm,
        "clamp": kernel.clamp is not None,
        "lockstep": rule.lockstep,
        "seed": rule.seed & (2**64 - 1),
        "counters": _address(pool.counters, long, 8),
    }
    if kernel.clamp is not None:
        fields["low"], fields["high"] = kernel.clamp
    for name in ("threshold", "reference_logit", "initial_logit", "grad_peak", "best_logit"):
        fields[name] = _address(getattr(slots, name), real, s)
    for name, dtype in (("sample_id", long), ("source", long), ("step", integer), ("last_step", integer)):
        fields[name] = _address(getattr(slots, name), dtype, s)
    fields["logit_falls"] = _address(slots.logit_falls, integer, s)
    for name in ("activation", "best"):
        fields[name] = _address(getattr(slots, name), real, s, f)
    for name, dtype in (("threshold", real), ("reference_logit", real), ("last_step", integer)):
        fields[f"pool_{name}"] = _address(getattr(pool, name), dtype, rows)
    for name, dtype in (("logit", real), ("initial_logit", real), ("steps", integer), ("logit_falls", integer)):
        fields[f"output_{name}"] = _address(getattr(outputs, name), dtype, window)
    fields["output_status"] = _address(outputs.status, integer, window)
    fields["pool_activation"] = _address(pool.activation, real, rows, f)
    fields["output_activation"] = _address(outputs.activation, real, window, f)
    fields["output_scalars"] = _address(outputs.scalars, real, count[0], window)

    params = _native.Params()
    for name, value in fields.items():
        setattr(params, name, value)
    return params, (kernel.latent, kernel.schedule)
