"""The place in a generator that is refined: a hook reads the output of one module, or puts the activation in its place.

This works for every generator that runs: nothing is traced. The whole generator is evaluated each time; what does not
depend on the activation is taken out of the step where the step is recorded, see ``recording``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError, SplitError
from fastrefine.networks.calls import NetworkCall, attempt, describe
from fastrefine.networks.copies import unwrap

_PROBE_SIZES = (3, 5)  # odd and different: a dimension that follows both is the batch


@dataclass(frozen=True)
class Layer:
    """A place where a generator can be cut; ``str(layer)`` is the name to give as ``at``."""

    name: str
    shape: tuple[int, ...]  # of the activation, per sample
    tail_flops: int  # forward FLOPs per sample from here to the image
    tail_share: float  # of the whole generator's FLOPs; 1 at "input", 0 at "output"

    def __str__(self) -> str:
        return self.name


def first_tensor(output: Any) -> Tensor | None:
    """The first floating tensor of what a module returned: a tensor, or one in a tuple, list, dict or dataclass."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    return next((found for _, value in _entries(output) if (found := first_tensor(value)) is not None), None)


def image_of(output: Any) -> Tensor:
    """The images among what a generator returned: its first floating tensor."""
    found = first_tensor(output)
    if found is None:
        raise InputError(f"the generator must return images (N, ...), got {describe(output)}")
    return found


def with_first_tensor(output: Any, value: Tensor) -> Any:
    """What a module returned, with ``value`` in place of its first floating tensor."""
    if isinstance(output, Tensor):
        return value
    for key, entry in _entries(output):
        if first_tensor(entry) is None:
            continue
        new = with_first_tensor(entry, value)
        if isinstance(output, dict):
            changed: Any = copy.copy(output)
            changed[key] = new
            return changed
        if dataclasses.is_dataclass(output):
            changed = copy.copy(output)  # type: ignore[type-var]
            object.__setattr__(changed, key, new)
            return changed
        entries = [new if index == key else old for index, old in enumerate(output)]
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
    raise AssertionError("no tensor to replace")


def _entries(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, dict):
        return list(output.items())
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return []


class Tail(nn.Module):
    """``tail(a, *inputs)``: images of activations. at: "input", or a module's name, whose output the activation replaces.

    inputs: those of the generator; its latents are among them unless they are the activation. index: of the module's call.
    """

    def __init__(self, generator: nn.Module, call: NetworkCall, at: str = "input", index: int = 0):
        super().__init__()
        self.generator, self.call, self.at, self.index = generator, call, at, index
        self.training = False

    def forward(self, a: Tensor, *inputs: Tensor) -> Tensor:
        if self.at == "input":
            return image_of(self.call(self.generator, a, *inputs))
        with self._hook(lambda output: with_first_tensor(output, a)) as calls:
            image = image_of(self.call(self.generator, *inputs))
        if calls[0] <= self.index:
            raise SplitError(f"module {self.at!r} is not executed between latent and image")
        return image

    def activation(self, *inputs: Tensor) -> Tensor:
        """What the module gives for these latents and further inputs."""
        if self.at == "input":
            return inputs[0]
        found: list[Tensor] = []

        def keep(output: Any) -> None:
            found.append(first_tensor(output).clone())  # type: ignore[union-attr]

        with self._hook(keep):
            self.call(self.generator, *inputs)
        return found[0]

    @contextlib.contextmanager
    def _hook(self, action: Callable[[Any], Any]) -> Iterator[list[int]]:
        calls = [0]

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            calls[0] += 1
            return action(output) if calls[0] == self.index + 1 else None

        handle = self.generator.get_submodule(self.at).register_forward_hook(hook)
        try:
            yield calls
        finally:
            handle.remove()

    def with_generator(self, generator: nn.Module) -> Tail:
        """The same place in another form of the generator."""
        return Tail(generator, self.call, self.at, self.index)


def find(generator: nn.Module, call: NetworkCall, at: str, inputs: tuple[Tensor, ...]) -> Tail:
    """The tail at ``at``, the name of a module or "name#k" for its k-th call, from 0.

    Raises SplitError: no such module, not executed, executed more than once, no floating output with the batch first.
    """
    name, _, number = at.partition("#")
    modules = dict(generator.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        close = difflib.get_close_matches(name, [*modules, "input", "output"], n=4, cutoff=0.5)
        hint = f"; closest: {', '.join(map(repr, close))}" if close else ""
        raise SplitError(
            f"the generator has no module named {name!r}{hint}. `fastrefine layers` or fastrefine.layers lists them"
        )
    if number and not number.isdecimal():
        raise SplitError(f"in {at!r} the call after '#' must be a number from 0, got {number!r}")
    outputs: list[Any] = []
    handle = modules[name].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with torch.no_grad():
            attempt("generator", lambda: call(generator, *(value.clone() for value in inputs)), inputs[0])
    finally:
        handle.remove()
    if not outputs:
        raise SplitError(f"module {name!r} is not executed between latent and image")
    if len(outputs) > 1 and not number:
        names = f'"{name}#0" to "{name}#{len(outputs) - 1}"'
        raise SplitError(f"module {name!r} is executed {len(outputs)} times: say which call is meant, {names}")
    index = int(number or 0)
    if index >= len(outputs):
        raise SplitError(f"{at!r}: module {name!r} is executed {len(outputs)} times, calls count from 0")
    found, batch = first_tensor(outputs[index]), len(inputs[0])
    if found is None:
        raise SplitError(f"the output of module {name!r} holds no floating tensor: it is {describe(outputs[index])}")
    if found.dim() == 0 or len(found) != batch:
        raise SplitError(f"the output of module {name!r} has shape {tuple(found.shape)}: not the batch ({batch}) first")
    return Tail(generator, call, name, index)


def layers(
    generator: nn.Module, sample_latent: Tensor, labels: Any = None, kwargs: dict[str, Any] | None = None,
    generate: Callable[..., Any] | None = None, conditions: Mapping[str, Tensor] | None = None,
) -> list[Layer]:  # fmt: skip
    """The places where ``generator`` can be cut, in order of execution, from "input" to "output".

    Listed are the modules that run exactly once and give a floating tensor with the batch first, by itself or as the first
    of a tuple, list, dict or dataclass. FLOPs count convolutions and products of matrices, forward only. The generator is
    evaluated in eval mode and comes back as it was. generate: how it is called, as for ``Refiner``; conditions: its further
    inputs (N, ...) by name.

    Raises InputError where ``generator`` is no module, ``sample_latent`` no tensor (N, ...), or the generator fails on it.
    """
    generator = unwrap(generator)
    if not isinstance(generator, nn.Module):
        raise InputError(f"generator: wanted a torch.nn.Module, got {type(generator).__name__}")
    if not isinstance(sample_latent, Tensor) or not sample_latent.dim() or not len(sample_latent):
        got = f"shape {tuple(sample_latent.shape)}" if isinstance(sample_latent, Tensor) else type(sample_latent).__name__
        raise InputError(f"latents: wanted a tensor (N, ...), got {got}; e.g. fastrefine.Normal(64).sample(torch.arange(8), 0)")
    labels = checks.labels(labels, len(sample_latent))
    further = ({} if labels is None else {"labels": labels}) | dict(conditions or {})
    call = NetworkCall(tuple(further), generate, kwargs or {})
    names = {module: name for name, module in generator.named_modules() if name}
    seen: dict[str, list[tuple[tuple[int, ...] | None, int]]] = {}  # for each call: shape, FLOPs so far
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    counter = FlopCounterMode(display=False)
    inputs: tuple[Tensor, ...] = (sample_latent, *further.values())

    def record(module: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        shape = None if found is None else tuple(found.shape)
        seen.setdefault(names[module], []).append((shape, counter.get_total_flops()))

    modes = {module: module.training for module in generator.modules()}
    handles: list[Any] = []
    try:
        with _plain_state(sample_latent.device), torch.no_grad():
            few, many = (tuple(_resized(value, n) for value in inputs) for n in _PROBE_SIZES)
            with contextlib.suppress(NotImplementedError):  # of torch.export, whose modules have one mode
                generator.eval()
            handles += [module.register_forward_hook(record) for module in names]
            detached = _Called(generator, call)
            with counter:  # on detached weights: torch 2.13's counter fails on views of parameters under no_grad
                weights = {name: value.detach() for name, value in detached.named_parameters()}
                image = attempt("generator", lambda: torch.func.functional_call(detached, weights, few), few[0])
            total = counter.get_total_flops()
            first, seen = seen, {}
            attempt("generator", lambda: call(generator, *many), many[0])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode

    def layer(name: str, shape: tuple[int, ...], tail_flops: int) -> Layer:
        return Layer(name, shape, tail_flops // len(few[0]), tail_flops / total if total else 0.0)

    found = [layer("input", tuple(sample_latent.shape[1:]), total)]
    for name, calls in first.items():
        (shape, flops), (other, _) = calls[0], seen.get(name, [(None, 0)])[0]
        if len(calls) > 1 or not shape or not other:
            continue
        if (shape[0], other[0]) == _PROBE_SIZES and shape[1:] == other[1:]:
            found.append(layer(name, shape[1:], total - flops))
    return [*found, layer("output", tuple(image.shape[1:]), 0)]


class _Called(nn.Module):
    def __init__(self, generator: nn.Module, call: NetworkCall):
        super().__init__()
        self.generator, self.call = generator, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return image_of(self.call(self.generator, *inputs))


@contextlib.contextmanager
def _plain_state(device: torch.device) -> Iterator[None]:
    """Neither inference mode nor autocast, whatever the caller is in; the random state is put back."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=devices),
    ):
        yield


def _resized(value: Tensor, samples: int) -> Tensor:
    """``value`` cut or repeated to ``samples`` rows."""
    return value[torch.arange(samples, device=value.device) % value.shape[0]].detach()
