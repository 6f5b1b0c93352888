"""The caller's two networks on our terms: private copies, the cut, the readout, and what was learned by probing them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import re
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.errors import CouplingError, InputError, SplitError
from fastrefine.networks import copies, probe, readout
from fastrefine.networks.split import Cut, Split, split, unwrap

PROBE = 4  # samples of a probe batch
_process = threading.RLock()  # tracing, threads, TF32 and random states are the whole process's: one thread at a time


def _renew() -> None:
    global _process
    _process = threading.RLock()


os.register_at_fork(after_in_child=_renew)  # a thread of the parent's may have held it


@contextlib.contextmanager
def quiet_torch(device: torch.device | None = None) -> Iterator[None]:
    """No grad, no inference mode, no autocast, as the engine wants it; the caller's modes come back afterwards.

    So does the state of the CPU's and the device's generator, for networks may draw numbers that change nothing. Other
    threads wait meanwhile.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process)
        stack.enter_context(torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


# of an optional second parameter, which may also be noise, a truncation, a step
_LABELS = re.compile("label|class|cond|target|categor|attr|one_?hot|domain|context|^(y|c|cls|emb|embedding)$", re.IGNORECASE)


def takes_labels(module: Any, known: dict[str, Any]) -> tuple[bool, bool]:
    """Whether ``module(x, labels)`` is a valid call, and whether labels are required: an optional one is told by its name."""
    function = module.forward if isinstance(module, nn.Module) else module
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


class Identity(nn.Module):
    """The prefix where images or latents are given, and the tail at "output"."""

    def forward(self, a: Tensor) -> Tensor:
        return a


class GeneratorSide:
    """The generator as (prefix, tail), in evaluation mode and in the dtype of the state; independent of D.

    probe_latents: a few latents, as the caller would give them; they decide shapes. InputError, SplitError or
    CouplingError say what does not fit.
    """

    def __init__(
        self, generator: nn.Module | Split | None, at: str, latents: Tensor, labels: Tensor | None,
        kwargs: dict[str, Any], coupling: str,
    ):  # fmt: skip
        self.takes_labels, self.num_classes = False, None
        self._borrowed: list[nn.Module] = []
        if generator is None:
            identity = Identity()
            self.cut = Cut(_Prefix(identity), identity, "output", "output")
        elif isinstance(generator, Split):
            self.cut = self._given(generator, latents)
            self.takes_labels = takes_labels(generator.prefix, {})[0]
            if labels is not None and self.takes_labels:
                prefix = self.cut.prefix
                with self.evaluation_mode():
                    self.num_classes = label_classes([prefix], lambda y: prefix(latents.clone(), y), labels)
        else:
            own = _own(generator, latents)
            self.takes_labels, required = takes_labels(own, kwargs)
            if labels is None and required:
                raise InputError("the generator needs labels: pass labels=(N,) to sample, refine or stream")
            if labels is not None and self.takes_labels:
                self.num_classes = label_classes([own], lambda y: own(latents.clone(), y, **kwargs), labels)
            given = (labels,) if self.takes_labels and labels is not None else ()
            images = attempt("generator", lambda: own(latents.clone(), *given, **kwargs), latents)
            if not isinstance(images, Tensor) or images.shape[:1] != latents.shape[:1]:
                raise InputError(
                    f"the generator must return images (N, ...), got {_describe(images)} for {len(latents)} latents"
                )
            first = [y[:1] for y in given]
            _check({"generator": own}, lambda z: own(z, *(_repeated(y, z) for y in first), **kwargs), latents, coupling)
            self.cut = split(own, at, latents, labels if self.takes_labels else None, kwargs or None)
        self._probe(latents, labels, coupling)

    def _given(self, pair: Split, like: Tensor) -> Cut:
        """A pair of the caller's: modules, also those of methods, are copied; what plain functions read is borrowed."""
        parts: list[nn.Module] = []
        for part in (pair.prefix, pair.tail):
            owner = getattr(part, "__self__", None)
            if isinstance(part, nn.Module):
                parts.append(_own(part, like))
            elif isinstance(owner, nn.Module) and isinstance(part, types.MethodType):
                own = _own(owner, like)
                parts.append(_Function(types.MethodType(part.__func__, own), own))
            else:
                self._borrowed += _closed_over(part)
                parts.append(_Function(part))
        return Cut(parts[0], parts[1], "given", "given")

    def _probe(self, latents: Tensor, labels: Tensor | None, coupling: str) -> None:
        """Shapes, and for halves that were given the checks of a whole generator."""
        with self.evaluation_mode():
            a, context = self.prefix(latents, labels)
            self.shape = tuple(a.shape[1:])
            # what a waiting sample keeps besides its activation
            self.row_bytes = sum(t[0].numel() * t.element_size() for t in (latents, *context))
            images = self.render(a, context)
            self.image_shape = tuple(images.shape[1:])
            if self.cut.route == "given":
                found = {"activation": a, **{f"context {i}": c for i, c in enumerate(context)}, "image": images}
                for name, value in found.items():
                    if not isinstance(value, Tensor) or value.shape[:1] != latents.shape[:1]:
                        wanted = f"a tensor with the batch ({len(latents)}) first"
                        raise SplitError(f"Split: the {name} must be {wanted}, got {_describe(value)}")
                roots = {"generator prefix": self.cut.prefix, "generator tail": self.cut.tail}
                y = None if labels is None else labels[:1]
                _check(roots, lambda z: self.render(*self.prefix(z, _repeated(y, z))), latents, coupling)

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Borrowed modules in eval mode, put back afterwards, also after an exception."""
        modes = [(m, m.training) for root in self._borrowed for m in root.modules()]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def prefix(self, latents: Tensor, labels: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(activation (n, ...), context tensors (n, ...)) of latents (n, ...)."""
        own = latents.clone()  # layers may work in place, and at the input it is the activation
        given = (own, labels) if self.takes_labels and labels is not None else (own,)
        found = attempt("generator's prefix", lambda: self.cut.prefix(*given), latents)
        a, context = found if isinstance(found, tuple | list) and len(found) == 2 else (found, ())
        context = (context,) if isinstance(context, Tensor) else context
        if not isinstance(a, Tensor) or not isinstance(context, tuple | list):
            raise InputError(f"prefix(z[, labels]) must return (activation, tuple of tensors), got {_describe(found)}")
        return a, tuple(context)

    def render(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Images (n, ...) of activations (n, ...): the generator's own arithmetic, nothing folded."""
        tail = self.cut.tail
        return attempt("generator's tail", lambda: tail(a.clone(), *(c.clone() for c in context)), a)


class DiscriminatorSide:
    """The discriminator as images -> logits (n, P), in evaluation mode and in the dtype of the state."""

    def __init__(
        self, discriminator: nn.Module, images: Tensor, labels: Tensor | None, kwargs: dict[str, Any],
        scale: str, key: readout.OutputKey, coupling: str,
    ):  # fmt: skip
        self.kwargs, self.scale, self.key, self.num_classes = kwargs, scale, key, None
        own = _own(discriminator, images)
        self.takes_labels, required = takes_labels(own, kwargs)
        self.takes_labels = self.takes_labels and labels is not None
        if labels is None and required:
            raise InputError("the discriminator needs labels: pass labels=(N,) to sample, refine or stream")
        if labels is not None and self.takes_labels:
            self.num_classes = label_classes([own], lambda y: own(images.clone(), y, **kwargs), labels)
        given = (labels,) if self.takes_labels else ()
        self._like = images[:0]

        def call(module: nn.Module) -> Any:
            return attempt("discriminator", lambda: module(images.clone(), *given, **kwargs), images)

        self._cut, self.readout = readout.prepare(own, scale, key, call, len(images))
        self.module = self._cut(own)
        y = None if labels is None else labels[:1]
        _check({"discriminator": self.module}, lambda x: self.logits(self.module, x, _repeated(y, x)), images, coupling)

    def updated(self, discriminator: nn.Module) -> DiscriminatorSide:
        """The same side with other weights; nothing is probed again."""
        twin = copy.copy(self)
        twin.module = self._cut(_own(discriminator, self._like))
        return twin

    def logits(self, module: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        """(n, P) logits by ``module``: the exact copy, or a folded form of it."""
        given = (images, labels) if self.takes_labels else (images,)
        raw = module(*given, **self.kwargs)
        return self.readout(raw, len(images), torch.float64 if images.dtype == torch.float64 else torch.float32)


class _Prefix(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.module(z), ()


class _Function(nn.Module):
    """A plain function, or a method with the module that owns it."""

    def __init__(self, function: Callable[..., Any], owner: nn.Module | None = None):
        super().__init__()
        self.function, self.owner = function, owner

    def forward(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Function:
        if self.owner is None:
            return _Function(self.function)
        owner = copy.deepcopy(self.owner, memo)
        return _Function(types.MethodType(self.function.__func__, owner), owner)  # type: ignore[attr-defined]


def _closed_over(function: Callable[..., Any]) -> list[nn.Module]:
    """Modules that a plain function reads from its closure or globals."""
    try:
        known = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return []
    return [v for v in (*known.nonlocals.values(), *known.globals.values()) if isinstance(v, nn.Module)]


def _own(module: nn.Module, like: Tensor) -> nn.Module:
    """Our copy of a network of the caller's, on the device and in the dtype of ``like``."""
    plain = unwrap(module)
    for name, child in plain.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise InputError(
                f"module {name!r} is scripted or traced, and can neither be looked into nor frozen: "
                "give the nn.Module it was made from"
            )
    return copies.private_copy(plain).to(device=like.device, dtype=like.dtype)


def _check(roots: dict[str, nn.Module], forward: probe.Forward, x: Tensor, coupling: str) -> None:
    """Refuse networks that are not repeatable or, unless in lock step, not independent; x is left as it is."""
    probe.check_repeatable(roots, lambda given: forward(given.clone()), x)
    if coupling == "refuse":
        probe.check_independent(roots, lambda given: forward(given.clone()), x)


def _repeated(label: Tensor | None, x: Tensor) -> Tensor | None:
    """One label (1, ...) for every row of x."""
    return None if label is None else label.expand(len(x), *label.shape[1:])


def _describe(x: Any) -> str:
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
    check_labels(labels, classes)
    return classes


def check_labels(labels: Tensor, num_classes: int | None) -> None:
    """Raise InputError for class labels that are negative or not less than ``num_classes``."""
    if labels.is_floating_point() or not len(labels):
        return
    if int(labels.min()) < 0:
        raise InputError(f"labels must not be negative, got {int(labels.min())}")
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise InputError(f"label {int(labels.max())} is out of range: the network knows classes 0 to {num_classes - 1}")
