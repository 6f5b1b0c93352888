"""The generator, prepared: a private copy in evaluation mode, cut into the prefix and the tail."""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.errors import InputError, SplitError, warn
from fastrefine.networks import probe, statistics
from fastrefine.networks.calls import NetworkCall, attempt, call_of, describe, label_classes, takes_labels
from fastrefine.networks.copies import own_copy
from fastrefine.networks.cut import Tail, find, image_of
from fastrefine.networks.split import Split
from fastrefine.options import Options


class PreparedGenerator:
    """The generator as (prefix, tail), in evaluation mode and in the dtype of the state. It does not depend on D.

    latents, labels: a few of them, as the caller would give them; they decide shapes. What does not fit raises InputError,
    SplitError or CouplingError.
    """

    def __init__(self, generator: nn.Module | Split | None, options: Options, latents: Tensor, inputs: Mapping[str, Tensor]):
        self.at = "given" if isinstance(generator, Split) else options.at
        self.num_classes, self.call, self._group = None, NetworkCall(), options.lockstep_group
        self.tail: nn.Module = nn.Identity()
        self._prefix: Any = lambda z: (z, ())
        self.borrowed: list[nn.Module] = []  # that plain functions read: the caller's own
        self._given = isinstance(generator, Split)
        if isinstance(generator, Split):
            self._prefix, self.tail = (self._own_part(part, latents) for part in (generator.prefix, generator.tail))
            self.call = NetworkCall(("labels",) if takes_labels(generator)[0] and "labels" in inputs else ())
            if self.takes_labels:
                with self.evaluation_mode():
                    self.num_classes = label_classes([self._prefix], self._prefix, latents, self.call, inputs)
        elif generator is not None:
            self.borrowed += _closed_over(options.generate) + _closed_over(options.discriminate)
            self._caller = generator
            with self.evaluation_mode():
                self._prepare(generator, options, latents, inputs)
        self._probe(latents, inputs, options.coupling)

    @property
    def takes_labels(self) -> bool:
        return "labels" in self.call.names

    def _prepare(self, given: nn.Module, options: Options, latents: Tensor, inputs: Mapping[str, Tensor]) -> None:
        call = self.call = call_of("generator", given, inputs, options.generate, options.generator_kwargs or {})
        own = own_copy(given, latents, lambda module: call(module, latents.clone(), *call.values(inputs)))
        if self.takes_labels:
            self.num_classes = label_classes([own], lambda *given: call(own, *given), latents, call, inputs)
        if options.on_noise == "freeze":
            plain = call
            call = self.call = plain.with_draws(
                lambda: attempt("generator", lambda: plain(own, latents.clone(), *plain.values(inputs)), latents), 0
            )
        raw = attempt("generator", lambda: call(own, latents.clone(), *call.values(inputs)), latents)
        images = image_of(raw)
        if images.shape[:1] != latents.shape[:1]:
            raise InputError(f"the generator must return images (N, ...), got {describe(images)} for {len(latents)} latents")
        statistics.check("generator", self._caller, own, lambda module: call(module, latents.clone(), *call.values(inputs)))
        if images is not raw:
            warn(f"the generator returns {describe(raw)}; its first tensor, of shape {tuple(images.shape)}, is the image")

        def image(z: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            return image_of(call(own, z, *call.values(given)))

        probe.check({"generator": own}, image, latents, inputs, options.coupling)
        if options.at == "output":
            self._prefix = lambda *given: (image_of(call(own, *given)), ())
            return
        tail = Tail(own, call)
        if options.at != "input":
            tail = find(own, call, options.at, (latents, *call.values(inputs)))
        self.tail, kept = tail, 1 if options.at == "input" else 0  # at the input the latents are the activation itself
        self._prefix = lambda *given: (tail.activation(*given), given[kept:])

    def _own_part(self, part: Callable[..., Any], like: Tensor) -> nn.Module:
        """A part of a Split: modules, also those of methods, are copied; what plain functions read is borrowed."""
        owner = getattr(part, "__self__", None)
        if isinstance(part, nn.Module):
            return own_copy(part, like)
        if isinstance(owner, nn.Module) and isinstance(part, types.MethodType):
            own = own_copy(owner, like)
            return _Function(types.MethodType(part.__func__, own), own)
        self.borrowed += _closed_over(part)
        return _Function(part)

    def _probe(self, latents: Tensor, inputs: Mapping[str, Tensor], coupling: str) -> None:
        """Shapes, whether the place matters, and for a Split the checks of a whole generator."""
        with self.evaluation_mode():
            a, context = self.prefix(latents, inputs)
            self.shape, self.num_context = tuple(a.shape[1:]), len(context)
            # what a waiting sample keeps besides its activation
            self.row_bytes = sum(t[0].numel() * t.element_size() for t in (latents, *inputs.values()))
            images = self.render(a, context)
            if self._given:
                found = {"activation": a, **{f"context {i}": c for i, c in enumerate(context)}, "image": images}
                for name, value in found.items():
                    if not isinstance(value, Tensor) or value.shape[:1] != latents.shape[:1]:
                        wanted = f"a tensor with the batch ({len(latents)}) first"
                        raise SplitError(f"Split: the {name} must be {wanted}, got {describe(value)}")

                def image(z: Tensor, given: Mapping[str, Tensor]) -> Tensor:
                    return self.render(*self.prefix(z, given))

                probe.check({"generator prefix": self._prefix, "generator tail": self.tail}, image, latents, inputs, coupling)
            self.image_shape = tuple(images.shape[1:])
            if self.at not in ("input", "output", "given") and torch.equal(
                images, self.render(1.5 * a + a.abs().mean() + 0.1, context)
            ):
                raise SplitError(f"the generator's output does not depend on the cut {self.at!r}")

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Borrowed modules in eval mode, put back afterwards, also after an exception."""
        modes = [(m, m.training) for root in self.borrowed for m in root.modules()]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def prefix(self, latents: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(activation (n, ...), context tensors (n, ...)) of latents (n, ...) and the further inputs of the sample."""
        if self._group is not None and len(latents) > self._group:
            parts = [self.prefix(z, given) for z, given in _groups(self._group, latents, inputs)]
            columns = zip(*(context for _, context in parts), strict=True)
            return torch.cat([a for a, _ in parts]), tuple(torch.cat(column) for column in columns)
        # a copy, for layers may work in place, and at the input it is the activation
        found = attempt("generator's prefix", lambda: self._prefix(latents.clone(), *self.call.values(inputs)), latents)
        a, context = found if isinstance(found, tuple | list) and len(found) == 2 else (found, ())
        context = (context,) if isinstance(context, Tensor) else context
        if not isinstance(a, Tensor) or not isinstance(context, tuple | list):
            raise InputError(f"prefix(z[, labels]) must return (activation, tuple of tensors), got {describe(found)}")
        return a.to(latents.dtype) if a.is_floating_point() else a, tuple(context)

    def render(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Images (n, ...) of activations (n, ...): the generator's own arithmetic, nothing folded."""
        if self._group is not None and len(a) > self._group:
            columns = a.split(self._group), *(value.split(self._group) for value in context)
            return torch.cat([self.render(rows[0], rows[1:]) for rows in zip(*columns, strict=True)])
        return attempt("generator's tail", lambda: self.tail(a.clone(), *(c.clone() for c in context)), a)


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


def _groups(size: int, latents: Tensor, inputs: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Latents and inputs of consecutive groups."""
    for start in range(0, len(latents), size):
        yield latents[start : start + size], {name: value[start : start + size] for name, value in inputs.items()}


def _closed_over(function: Callable[..., Any] | None) -> list[nn.Module]:
    """Modules that a plain function reads from its closure or globals."""
    if function is None:
        return []
    try:
        known = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return []
    return [v for v in (*known.nonlocals.values(), *known.globals.values()) if isinstance(v, nn.Module)]
