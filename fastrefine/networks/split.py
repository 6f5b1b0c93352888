"""A cut of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastrefine.errors import InputError, SplitError


class Split(nn.Module):
    """A cut of one's own in place of a generator.

    ``prefix(z)`` or ``prefix(z, labels)`` -> ``(a, context)``: the activation (N, ...) and a tuple of tensors (N, ...)
    that the tail also needs. ``tail(a, *context)`` -> images (N, ...); it must not change its arguments in place.
    Both are modules or callables. Weights are found (and moved, frozen, put in eval mode) if they belong to a module
    that is given itself, or one of whose methods is given; weights inside a closure are not.

    Example: ``fr.Refiner(fr.Split(lambda z: (g[:2](z), ()), g[2:]), d, fr.Collaborative(), prior=fr.Normal(32)).sample(8)``
    """

    def __init__(self, prefix: Callable[..., Any], tail: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, part in (("prefix", prefix), ("tail", tail)):
            if not callable(part):
                raise InputError(f"Split: {name} must be a module or a callable, got {type(part).__name__}")
            owner = getattr(part, "__self__", None)
            if isinstance(owner, nn.Module):
                self.add_module(f"{name}_owner", owner)
        self.prefix = prefix
        self.tail = tail

    def forward(self, *inputs: Tensor) -> Tensor:
        activation, context = _given_parts(self.prefix(*inputs))
        return self.tail(activation, *context)


def _given_parts(result: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    if isinstance(result, Tensor):
        return result, ()
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], Tensor):
        context = (result[1],) if isinstance(result[1], Tensor) else tuple(result[1] or ())
        if all(isinstance(value, Tensor) for value in context):
            return result[0], context
    raise SplitError(f"Split: prefix must return (activation, tuple of tensors), got {type(result).__name__}")
