"""The place in a generator that is refined: a hook reads the output of one module, or puts the activation in its place.

This works for every generator that runs: nothing is traced. The whole generator is evaluated each time; what does not
depend on the activation is taken out of the step where the step is recorded, see ``recording``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError, SplitError
from fastrefine.networks.calls import NetworkCall, attempt, describe
from fastrefine.networks.copies import private_copy, unwrap, without_scripts
from fastrefine.networks.probe import is_plain

# Odd and different: a dimension that follows both is the batch. The others are for networks that take whole groups only.
_PROBE_SIZES = ((3, 5), (4, 8))


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


class _Found(BaseException):
    """Ends a forward pass whose rest is not needed; no network catches it."""


class Tail(nn.Module):
    """``tail(a, *inputs)``: images of activations. at: "input", or a module's name, whose output the activation replaces.

    inputs: those of the generator; its latents are among them unless they are the activation. index: of the module's call.
    """

    def __init__(self, generator: nn.Module, call: NetworkCall, at: str = "input", index: int = 0):
        super().__init__()
        self.generator, self.call, self.at, self.index = generator, call, at, index
        self.training = False
        self._held: contextlib.ExitStack | None = None

    def forward(self, a: Tensor, *inputs: Tensor) -> Tensor:
        if self.at == "input":
            return image_of(self.call(self.generator, a, *inputs))

        def replace(output: Any) -> Any:
            found = first_tensor(output)  # of a stage in another precision perhaps
            if found is None:
                return output
            own = a if torch.is_grad_enabled() else a.view_as(a)  # a checkpoint makes what it returns a node of its own
            return with_first_tensor(output, own.to(found.dtype))

        with contextlib.ExitStack() as stack:
            calls = (self._held or stack).enter_context(self._hook(replace))
            image = image_of(self.call(self.generator, *inputs))
        if calls[0] <= self.index:
            raise SplitError(f"module {self.at!r} is not executed between latent and image")
        return image

    @contextlib.contextmanager
    def through_backward(self) -> Iterator[None]:
        """The activation stays in its place until the end, for a checkpoint runs its part of the forward pass again."""
        with contextlib.ExitStack() as self._held:
            yield
        self._held = None

    def activation(self, *inputs: Tensor) -> Tensor:
        """What the module gives for these latents and further inputs."""
        if self.at == "input":
            return inputs[0]
        found: list[Tensor] = []

        def keep(output: Any) -> None:
            found.append(first_tensor(output).clone())  # type: ignore[union-attr]
            raise _Found

        with self._hook(keep), contextlib.suppress(_Found):
            self.call(self.generator, *inputs)
        return found[0]

    @contextlib.contextmanager
    def _hook(self, action: Callable[[Any], Any]) -> Iterator[list[int]]:
        calls = [0]

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:  # again, within a backward pass; of several calls which is not known
                return action(output) if calls[0] == 1 else None
            calls[0] += 1
            return action(output) if calls[0] == self.index + 1 else None

        handle = self.generator.get_submodule(self.at).register_forward_hook(hook)
        try:
            yield calls
        finally:
            handle.remove()


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
    if found is not None and not is_plain(found):
        raise SplitError(f"module {name!r} runs within torch.func.vmap or grad, where its output stands for one sample alone")
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

    Example: ``[(layer.name, layer.shape) for layer in fr.layers(g, torch.randn(1, 32))]``
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
    inputs: tuple[Tensor, ...] = (sample_latent, *further.values())
    own = private_copy(without_scripts(generator))
    with _plain_state(sample_latent.device), torch.no_grad():
        for sizes in (*_PROBE_SIZES, (len(sample_latent),) * 2):
            try:
                few, many = (tuple(_resized(value, n) for value in inputs) for n in sizes)
                first, total, image = _calls(own, call, few)
                second = _calls(own, call, many, counted=False)[0]
                break
            except InputError:  # some networks take whole groups only
                if sizes[0] == sizes[1] or len(sample_latent) < 2:
                    raise

    def layer(name: str, shape: tuple[int, ...], tail_flops: int) -> Layer:
        return Layer(name, shape, tail_flops // len(few[0]), tail_flops / total if total else 0.0)

    found = [layer("input", tuple(sample_latent.shape[1:]), total)]
    for name, calls in first.items():
        (shape, flops), (other, _) = calls[0], second.get(name, [(None, 0)])[0]
        if len(calls) > 1 or not shape or not other:
            continue
        if (shape[0], other[0]) == sizes and shape[1:] == other[1:]:
            found.append(layer(name, shape[1:], total - flops))
    return [*found, layer("output", tuple(image.shape[1:]), 0)]


def middle(found: Sequence[Layer]) -> str:
    """The name of the place after which about half of the generator's work is left, behind the activation; else "input".

    Nothing inside of a block is taken, for it may be a branch beside a shortcut, or a style. What holds more than half of all
    places is no block, but a wrapper.
    """
    inside = {block.name: [layer.name for layer in found if layer.name.startswith(f"{block.name}.")] for block in found}
    hidden = {name for names in inside.values() if len(names) <= len(found) / 2 for name in names}
    open_ = [layer for layer in reversed(found) if 0.02 < layer.tail_share < 0.98 and layer.name not in hidden]
    return min(open_, key=lambda layer: abs(layer.tail_share - 0.5), default=found[0]).name


_Calls = dict[str, list[tuple[tuple[int, ...] | None, int]]]  # module -> for each call: shape of its output, FLOPs so far


def _calls(
    generator: nn.Module, call: NetworkCall, inputs: tuple[Tensor, ...], counted: bool = True
) -> tuple[_Calls, int, Tensor]:
    """(the modules that ran, FLOPs, images) of these inputs."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    counter = FlopCounterMode(display=False)
    # torch's own tracker hooks autograd, which a network may call for one gradient
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    names = {module: name for name, module in generator.named_modules() if name}
    seen: _Calls = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        shape = tuple(found.shape) if found is not None and is_plain(found) else None
        seen.setdefault(names[module], []).append((shape, counter.get_total_flops()))

    def run() -> Tensor:
        seen.clear()
        return image_of(call(generator, *(value.clone() for value in inputs)))

    handles = [module.register_forward_hook(record) for module in names]
    try:
        if counted:
            with contextlib.suppress(Exception), counter:  # a network that cannot be counted may still run
                image = run()
                return seen, counter.get_total_flops(), image
        return seen, 0, attempt("generator", run, inputs[0])
    finally:
        for handle in handles:
            handle.remove()


class _NoModules:
    """In place of torch's ModuleTracker: every operation belongs to the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None:
        pass


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
