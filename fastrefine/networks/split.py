"""The modules that become prefixes and tails."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastrefine.errors import InputError, SplitError

ADVICE = "give the two halves yourself: fr.Split(prefix, tail), prefix(z[, labels]) -> (a, context), tail(a, *context)"


class Split(nn.Module):
    """A cut of one's own in place of a generator.

    ``prefix(z)`` or ``prefix(z, labels)`` -> ``(a, context)``: the activation (N, ...) and a tuple of tensors (N, ...)
    that the tail also needs. ``tail(a, *context)`` -> images (N, ...); it must not change its arguments in place.
    Both are modules or callables. Weights are found (and moved, frozen, put in eval mode) if they belong to a module
    that is given itself, or one of whose methods is given; weights inside a closure are not.
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


class GeneratorCall(nn.Module):
    """The generator as a function of the latents alone, constant arguments filled in."""

    def __init__(self, generator: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.generator = generator
        self.kwargs = kwargs
        self.training = False

    def forward(self, latent: Tensor) -> Tensor:
        return self.generator(latent, **self.kwargs)


class LabelledGeneratorCall(GeneratorCall):
    """The same, of latents and labels."""

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.generator(latent, labels, **self.kwargs)


class FirstAsActivation(nn.Module):
    """Prefix of a cut at the input."""

    def forward(self, latent: Tensor, *labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return latent, labels


class WithoutContext(nn.Module):
    """Prefix of a cut at the output."""

    def __init__(self, call: nn.Module) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.call(*inputs), ()


class CloneFirst(nn.Module):
    """A tail that changes its arguments in place, kept from doing so."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, activation: Tensor, *context: Tensor) -> Tensor:
        return self.tail(activation.clone(), *(value.clone() for value in context))


def bind(generator: nn.Module, labelled: bool, kwargs: dict[str, Any]) -> GeneratorCall:
    return (LabelledGeneratorCall if labelled else GeneratorCall)(generator, kwargs)


def unchanging(tail: nn.Module, arguments: tuple[Tensor, ...]) -> nn.Module:
    """``tail``, made to clone those of its arguments that it changes in place."""
    arguments = tuple(value.clone() for value in arguments)
    before = [value._version for value in arguments]
    with torch.no_grad():
        tail(*arguments)
    changed = [index for index, value in enumerate(arguments) if value._version != before[index]]
    if not changed:
        return tail
    if not isinstance(tail, fx.GraphModule):
        return CloneFirst(tail).eval()
    placeholders = [node for node in tail.graph.nodes if node.op == "placeholder"]
    with tail.graph.inserting_after(placeholders[-1]):
        for index in changed:
            copy = tail.graph.call_method("clone", (placeholders[index],))
            placeholders[index].replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    tail.recompile()
    return tail


def _given_parts(result: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    if isinstance(result, Tensor):
        return result, ()
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], Tensor):
        context = (result[1],) if isinstance(result[1], Tensor) else tuple(result[1] or ())
        if all(isinstance(value, Tensor) for value in context):
            return result[0], context
    raise SplitError(f"Split: prefix must return (activation, tuple of tensors), got {type(result).__name__}")
