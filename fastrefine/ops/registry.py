"""The table of backends: every op has one public entry, and its implementations are looked up by name."""

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch

from fastrefine.errors import BackendError
from fastrefine.ops.slots import Rule

BACKENDS = ("reference", "cpu", "triton", "cuda")
_MODULES = {"cpu": "fastrefine.ops.native", "triton": "fastrefine.kernels"}
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
_FORCED: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastrefine_backend", default=None)

R = TypeVar("R")


class Absent(Exception):
    """Raised by a backend's module on import when what it needs is not installed; its text is one line."""


@functools.cache
def _load(backend: str) -> ModuleType | str:
    """The backend's module, or the one line that says why it is absent."""
    if backend == "cuda":  # the name is kept for kernels to come
        return "this version holds no kernels in CUDA; 'triton' serves GPUs"
    try:
        return importlib.import_module(_MODULES[backend])
    except Absent as reason:
        return str(reason)
    except ModuleNotFoundError as reason:
        if reason.name in (_MODULES[backend], "triton"):
            return f"{reason.name} is not installed"
        raise


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend ("reference" | "cpu" | "triton" | "cuda") for every op inside the block.

    Raises BackendError at once when it is absent here: a backend asked for by name never falls back.
    """
    _require(backend)
    token = _FORCED.set(backend)
    try:
        yield
    finally:
        _FORCED.reset(token)


def _require(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if backend != "reference" and isinstance(reason := _load(backend), str):
        raise BackendError(f"backend {backend!r} is not available: {reason}")


def available() -> dict[str, str]:
    """Every backend with "ok", the reason of its absence or why it is broken (what ``fastrefine doctor`` prints)."""
    states = {"reference": "ok"}
    for name in BACKENDS[1:]:
        try:
            loaded = _load(name)
        except BackendError as broken:
            loaded = str(broken)
        states[name] = loaded if isinstance(loaded, str) else "ok"
    return states


def choose(device: torch.device, rule: str | None) -> str:
    """The backend for this device and fused rule (None: the sampler has no fused rule, only PyTorch formulas)."""
    forced = _FORCED.get() or os.environ.get("FASTREFINE_BACKEND")
    if forced is not None:
        _require(forced)
        home = {"cpu": "cpu", "triton": "cuda"}.get(forced, device.type)
        if device.type != home and not (forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise BackendError(f"backend {forced!r} runs on {home} tensors, these are on {device.type}")
        if forced != "reference" and not _has(_load(forced), rule):
            wanted = "this sampler with this prior" if rule is None else f"the rule {rule!r}"
            raise BackendError(f"backend {forced!r} has no kernel for {wanted}; use backend 'reference'")
        return forced
    for name in _PREFERRED.get(device.type, ("reference",)):
        if name == "reference" or _has(_load(name), rule):
            return name
    return "reference"


def _has(module: ModuleType | str, rule: str | None) -> bool:
    """Whether the backend is there and has a kernel for the rule."""
    return not isinstance(module, str) and rule in module.RULES


def op(reference: Callable[..., R]) -> Callable[..., R]:
    """Make the decorated PyTorch function an op: its signature is the schema, its docstring the specification.

    The caller passes ``backend=`` (from :func:`choose`); the implementation of that name gets the same arguments.
    """

    @functools.wraps(reference)
    def entry(*args: Any, backend: str = "reference", **kwargs: Any) -> R:
        if backend == "reference":
            return reference(*args, **kwargs)
        implementation: Callable[..., R] = getattr(_load(backend), reference.__name__)
        return implementation(*args, **kwargs)

    return entry


def baked(rule: Rule, backend: str) -> Hashable:
    """What a captured step has baked in: it serves another rule that has the same.

    The Triton kernels read hyper-parameters and the seed from device memory, which any later call with the other rule
    loads, so only what selects their code counts.
    """
    kernel = rule.sampler.kernel()
    if backend != "triton" or kernel is None:
        return rule
    options = kernel.noise, kernel.clamp is not None, rule.max_grad_norm is not None
    length = None if kernel.schedule is None else kernel.schedule.shape[1]
    tables = kernel.latent is not None, length
    return kernel.rule, kernel.scalars, kernel.vectors, *options, *tables, rule.keep_best, rule.lockstep, rule.snapshots
