"""The generator, prepared: a private copy in evaluation mode, cut into the prefix and the tail."""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastrefine.errors import InputError, SplitError
from fastrefine.networks import probe
from fastrefine.networks.calls import attempt, describe, label_classes, takes_labels
from fastrefine.networks.copies import own_copy
from fastrefine.networks.cut import Cut, split
from fastrefine.networks.split import Split
from fastrefine.options import Options


class Identity(nn.Module):
    """The prefix where images or latents are given, and the tail at "output"."""

    def forward(self, a: Tensor) -> Tensor:
        return a


class PreparedGenerator:
    """The generator as (prefix, tail), in evaluation mode and in the dtype of the state. It does not depend on D.

    latents, labels: a few of them, as the caller would give them; they decide shapes. What does not fit raises InputError,
    SplitError or CouplingError.
    """

    def __init__(self, generator: nn.Module | Split | None, options: Options, latents: Tensor, labels: Tensor | None):
        kwargs, coupling = options.generator_kwargs or {}, options.coupling
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
            own = own_copy(generator, latents)
            self.takes_labels, required = takes_labels(own, kwargs)
            if labels is None and required:
                raise InputError("the generator needs labels: pass labels=(N,) to sample, refine or stream")
            if labels is not None and self.takes_labels:
                self.num_classes = label_classes([own], lambda y: own(latents.clone(), y, **kwargs), labels)
            given = (labels,) if self.takes_labels and labels is not None else ()
            images = attempt("generator", lambda: own(latents.clone(), *given, **kwargs), latents)
            if not isinstance(images, Tensor) or images.shape[:1] != latents.shape[:1]:
                raise InputError(
                    f"the generator must return images (N, ...), got {describe(images)} for {len(latents)} latents"
                )
            first = [y[:1] for y in given]
            probe.check(
                {"generator": own}, lambda z: own(z, *(probe.repeated(y, z) for y in first), **kwargs), latents, coupling
            )
            self.cut = split(own, options.at, latents, labels if self.takes_labels else None, kwargs or None)
        self._probe(latents, labels, coupling)

    def _given(self, pair: Split, like: Tensor) -> Cut:
        """A pair of the caller's: modules, also those of methods, are copied; what plain functions read is borrowed."""
        parts: list[nn.Module] = []
        for part in (pair.prefix, pair.tail):
            owner = getattr(part, "__self__", None)
            if isinstance(part, nn.Module):
                parts.append(own_copy(part, like))
            elif isinstance(owner, nn.Module) and isinstance(part, types.MethodType):
                own = own_copy(owner, like)
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
            images = self.render(a, context)
            self.image_shape = tuple(images.shape[1:])
            if self.cut.route == "given":
                found = {"activation": a, **{f"context {i}": c for i, c in enumerate(context)}, "image": images}
                for name, value in found.items():
                    if not isinstance(value, Tensor) or value.shape[:1] != latents.shape[:1]:
                        wanted = f"a tensor with the batch ({len(latents)}) first"
                        raise SplitError(f"Split: the {name} must be {wanted}, got {describe(value)}")
                roots = {"generator prefix": self.cut.prefix, "generator tail": self.cut.tail}
                y = None if labels is None else labels[:1]
                probe.check(roots, lambda z: self.render(*self.prefix(z, probe.repeated(y, z))), latents, coupling)
            # what a waiting sample keeps besides its activation
            self.row_bytes = sum(t[0].numel() * t.element_size() for t in (latents, *context))

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
            raise InputError(f"prefix(z[, labels]) must return (activation, tuple of tensors), got {describe(found)}")
        return a, tuple(context)

    def render(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Images (n, ...) of activations (n, ...): the generator's own arithmetic, nothing folded."""
        tail = self.cut.tail
        return attempt("generator's tail", lambda: tail(a.clone(), *(c.clone() for c in context)), a)


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
