"""How the caller's networks are called: which arguments they take, what they raise, and how to read what D returns."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import CouplingError, InputError
from fastrefine.networks.copies import unwrap
from fastrefine.networks.split import Split
from fastrefine.options import OutputKey

# of an optional second parameter, which may also be noise, a truncation, a step
_LABELS = re.compile("label|class|cond|target|categor|attr|one_?hot|domain|context|^(y|c|cls|emb|embedding)$", re.IGNORECASE)


def takes_labels(network: Any, known: Mapping[str, Any] = MappingProxyType({})) -> tuple[bool, bool]:
    """(whether ``network(x, labels)`` is a valid call, whether labels are required); an optional one is told by its name.

    known: arguments that are given by name. A module may say so itself, by an attribute ``takes_labels`` of this form.
    """
    if network is None:
        return False, False
    network = network.prefix if isinstance(network, Split) else network
    network = unwrap(network) if isinstance(network, nn.Module) else network
    own = getattr(network, "takes_labels", None)
    if isinstance(own, tuple):
        return own
    function = network.forward if isinstance(network, nn.Module) else network
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False, False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True, False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 or positional[1].name in known:
        return False, False
    if positional[1].default is inspect.Parameter.empty:
        return True, True
    option = isinstance(positional[1].default, bool | float | str)  # such as return_class_features=False
    return not option and bool(_LABELS.search(positional[1].name)), False


def describe(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less memory would have helped; the CPU's allocator and CUDA's own raise a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "CUDA error: out of memory" in str(error)
    )


def attempt(what: str, call: Callable[[], Any], x: Tensor) -> Any:
    """Run a network of the caller's; its exception becomes ours, with what it was given."""
    try:
        return call()
    except (InputError, CouplingError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        hint = "; are these its latents (see prior), and is it the generator?" if what == "generator" else ""
        raise InputError(f"the {what} failed on a batch of shape {tuple(x.shape)}, {x.dtype}: {error}{hint}") from error


def label_classes(modules: list[nn.Module], call: Callable[[Tensor], Any], labels: Tensor) -> int | None:
    """How many classes the embeddings know that read the labels, found by a call with label 0; None without any.

    Raises InputError for labels that these do not know, before they get to a device.
    """
    if labels.is_floating_point():
        return None
    zeros, sizes = torch.zeros_like(labels), []
    storage = zeros.untyped_storage().data_ptr()

    def record(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() == storage:
            sizes.append(module.num_embeddings)

    embeddings = [child for module in modules for child in module.modules() if isinstance(child, nn.Embedding)]
    handles = [child.register_forward_pre_hook(record) for child in embeddings]
    with contextlib.suppress(Exception), torch.no_grad():  # what fails here fails again on the probe batch, and is told
        call(zeros)
    for handle in handles:
        handle.remove()
    classes = min(sizes, default=None)
    checks.classes(labels, classes)
    return classes


@dataclass(frozen=True)
class Readout:
    """How to read D's output: which entry of a tuple or dict, and whether it is a probability that was not cut."""

    key: OutputKey = None
    invert_sigmoid: bool = False

    def __call__(self, raw: Any, n: int, dtype: torch.dtype) -> Tensor:
        """(n, P) logits of ``dtype``; InputError when there is not one value, or one map, per sample."""
        out = self.pick(raw)
        if out.dim() == 0 and n == 1:  # squeeze() of a batch of one; what is a batch mean was found on the probe batch
            out = out.reshape(1)
        if out.dim() == 0 or out.shape[0] != n:
            raise InputError(
                f"the discriminator must return one value per sample, got shape {_shape(out)} for {n} samples"
                + (" (a batch mean?)" if out.dim() == 0 else "")
            )
        if out.dim() > 1 and out.shape[1] != 1:
            raise InputError(
                f"the discriminator returned shape {_shape(out)}; wanted (N,), (N, 1) or a map (N, 1, h, w). Pass "
                "output_key=callable to reduce it to one value per sample"
            )
        logits = out.to(dtype).flatten(1) if out.dim() > 1 else out.to(dtype)[:, None]
        return torch.logit(logits, eps=1e-7) if self.invert_sigmoid else logits

    def pick(self, raw: Any) -> Tensor:
        """The one tensor among what D returned; InputError lists the keys when that is not clear."""
        if callable(self.key):
            raw = self.key(raw)
        elif self.key is not None:
            is_object = isinstance(self.key, str) and not isinstance(raw, dict | Tensor)
            try:
                raw = getattr(raw, self.key) if is_object else raw[self.key]  # type: ignore[arg-type]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(f"output_key={self.key!r} is not in the discriminator's output: {_keys(raw)}") from error
        if not isinstance(raw, Tensor):
            raise InputError(f"the discriminator returned {_keys(raw)}; choose one with output_key=key, index or callable")
        return raw


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _keys(raw: Any) -> str:
    if isinstance(raw, dict):
        return f"a dict with keys {list(raw)}"
    if isinstance(raw, tuple | list):
        fields = f", names {list(raw._fields)}" if hasattr(raw, "_fields") else ""
        return f"a {type(raw).__name__} of {len(raw)} (indices 0 to {len(raw) - 1}{fields})"
    names = list(vars(raw)) if hasattr(raw, "__dict__") else []
    return f"an object of type {type(raw).__name__}" + (f" with attributes {names}" if names else "")
