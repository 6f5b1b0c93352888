"""Cutting a generator into a prefix, run once per sample, and a tail, run at every refinement step.

Routes, in this order: the fx graph of the whole generator; the same with every module left whole that does not contain
the cut; the graph of torch.export. Each is compared with a forward hook that replaces the module's output, in values
and in gradients (fx and export silently lose the backward of an autograd.Function), before it is believed.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import FastrefineError, InputError, SplitError
from fastrefine.networks.copies import unwrap
from fastrefine.networks.cut_check import HookedGenerator, check_gradient, difference
from fastrefine.networks.graph import cut_graph
from fastrefine.networks.split import (
    ADVICE,
    FirstAsActivation,
    GeneratorCall,
    WithoutContext,
    bind,
    unchanging,
)
from fastrefine.networks.torch_state import seed_torch
from fastrefine.networks.tracing import Traced, trace_with_export, trace_with_fx

_PROBE_SIZES = (3, 5)  # odd and different: a dimension that follows both is the batch


@dataclass(frozen=True)
class Cut:
    """A generator in two halves. The halves may share submodules with each other and with the generator.

    ``prefix(z)`` or ``prefix(z, labels)`` -> ``(a, context)``, context a tuple of per-sample tensors (N, ...), possibly
    of integers. ``tail(a, *context)`` -> images; unless the route is "given" it leaves its arguments unchanged, and its
    batch need not be the prefix's. At "input" the prefix returns the latents and labels themselves, not copies.
    """

    prefix: nn.Module
    tail: nn.Module
    at: str
    route: str  # "input" | "output" | "fx" | "export" | "given"


@dataclass(frozen=True)
class Layer:
    """A place where a generator can be cut; ``str(layer)`` is the name to give as ``at``."""

    name: str
    shape: tuple[int, ...]  # of the activation, per sample
    tail_flops: int  # forward FLOPs per sample from here to the image
    tail_share: float  # of the whole generator's FLOPs; 1 at "input", 0 at "output"

    def __str__(self) -> str:
        return self.name


def split(
    generator: nn.Module,
    at: str,
    latents: Tensor,
    labels: Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Cut:
    """Cut ``generator`` (in eval mode, unwrapped) at "input", "output" or the output of the module named ``at``.

    ``name#k`` is the k-th call, from 0, of a module that runs more than once. ``latents`` and ``labels`` (N, ...) are
    examples on which the cut is verified; ``kwargs`` are constant further arguments of the generator. Neither the generator
    nor the global random state is changed.

    Raises SplitError: no such module, not executed, executed more than once, output not one per-sample tensor, no
    route; GradientError: no gradient passes from the image to the cut.
    """
    call = bind(generator, labels is not None, kwargs or {})
    inputs: tuple[Tensor, ...] = (latents,) if labels is None else (latents, labels)
    with _plain_state(latents.device):
        inputs = tuple(value.detach().clone()[:8] for value in inputs)  # clones are no inference tensors
        if at == "input":
            check_gradient(HookedGenerator(call, None), inputs, at)
            return Cut(FirstAsActivation(), unchanging(call, inputs), at, "input")
        if at == "output":
            return Cut(WithoutContext(call), nn.Identity(), at, "output")
        return _inner_cut(call, at, inputs)


def layers(
    generator: nn.Module,
    sample_latent: Tensor,
    labels: Any = None,
    kwargs: dict[str, Any] | None = None,
) -> list[Layer]:
    """The places where ``generator`` can be cut, in order of execution, from "input" to "output".

    Listed are the modules that run exactly once and give one floating tensor with the batch first; whether the rest of
    the graph can be cut there is found out by ``split``. FLOPs count convolutions and products of matrices, forward
    only. The generator is evaluated in eval mode and comes back as it was. A module of torch.export is one graph: of it
    there are "input" and "output".

    Raises InputError where ``generator`` is no module or ``sample_latent`` no tensor (N, ...).
    """
    generator = unwrap(generator)
    if not isinstance(generator, nn.Module):
        raise InputError(f"generator: wanted a torch.nn.Module, got {type(generator).__name__}")
    if not isinstance(sample_latent, Tensor) or not sample_latent.dim() or not len(sample_latent):
        got = f"shape {tuple(sample_latent.shape)}" if isinstance(sample_latent, Tensor) else type(sample_latent).__name__
        raise InputError(f"latents: wanted a tensor (N, ...), got {got}; e.g. fastrefine.Normal(64).sample(torch.arange(8), 0)")
    labels = checks.labels(labels, len(sample_latent))
    call = bind(generator, labels is not None, kwargs or {})
    names = {module: name for name, module in generator.named_modules() if name}
    seen: dict[str, list[tuple[tuple[int, ...] | None, int]]] = {}  # per call: shape, FLOPs so far
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    counter = FlopCounterMode(display=False)
    inputs: tuple[Tensor, ...] = (sample_latent,) if labels is None else (sample_latent, labels)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        one_tensor = isinstance(output, Tensor) and output.is_floating_point()
        shape = tuple(output.shape) if one_tensor else None
        seen.setdefault(names[module], []).append((shape, counter.get_total_flops()))

    modes = {module: module.training for module in generator.modules()}
    handles: list[Any] = []
    try:
        with _plain_state(sample_latent.device), torch.no_grad():
            few, many = (tuple(_resized(value, n) for value in inputs) for n in _PROBE_SIZES)
            with contextlib.suppress(NotImplementedError):  # of torch.export, whose modules have one mode
                generator.eval()
            handles += [module.register_forward_hook(record) for module in names]
            with counter:  # on detached weights: torch 2.13's counter fails on views of parameters under no_grad
                weights = {name: value.detach() for name, value in call.named_parameters()}
                image = torch.func.functional_call(call, weights, few)
            total = counter.get_total_flops()
            first, seen = seen, {}
            call(*many)
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


def _inner_cut(call: GeneratorCall, at: str, inputs: tuple[Tensor, ...]) -> Cut:
    module, index = _find_module(call, at, inputs)
    oracle = HookedGenerator(call, module, index)
    other_size = 5 if inputs[0].shape[0] != 5 else 7
    probes = [inputs, tuple(_resized(value[:2], other_size) for value in inputs)]
    check_gradient(oracle, inputs, at)
    samples = tuple(tuple(_resized(value, n) for value in inputs) for n in _PROBE_SIZES)
    routes: list[tuple[str, str, Callable[[], Traced]]] = [
        ("fx", "fx", lambda: trace_with_fx(call, module, index, coarse=False)),
        ("fx", "fx, other modules whole", lambda: trace_with_fx(call, module, index, coarse=True)),
        ("export", "torch.export", lambda: trace_with_export(call, module, index, samples[1])),
    ]
    reasons = []
    for route, description, trace in routes:
        seed_torch(inputs[0].device, seed=0)  # unlike the check's: noise baked in by a trace must not pass it
        try:
            prefix, tail = cut_graph(trace(), samples)  # type: ignore[arg-type]
            with torch.no_grad():
                activation, context = prefix(*inputs)
            tail = unchanging(tail, (activation, *context))
            problem = next(filter(None, (difference(oracle, prefix, tail, probe) for probe in probes)), None)
        except Exception as error:  # tracing runs foreign code: whatever it raises is a reason to try the next route
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, FastrefineError) else str(error)
        if problem is None:
            return Cut(prefix, tail, at, route)
        reasons.append(f"  {description}: {' '.join(problem.split())[:240]}")
    raise SplitError(f"the generator cannot be cut at {at!r}:\n" + "\n".join(reasons) + f"\n{ADVICE}")


def _find_module(call: GeneratorCall, at: str, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, int]:
    """The module named ``at`` and which of its calls is meant."""
    name, _, number = at.partition("#")
    modules = dict(call.generator.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        close = difflib.get_close_matches(name, [*modules, "input", "output"], n=4, cutoff=0.5)
        hint = f"; closest: {', '.join(map(repr, close))}" if close else ""
        raise SplitError(
            f"the generator has no module named {name!r}{hint}. `fastrefine layers` or fastrefine.layers lists them"
        )
    if number and not number.isdecimal():
        raise SplitError(f"in {at!r} the call after '#' must be a number from 0, got {number!r}")
    module, outputs = modules[name], []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with torch.no_grad():
            image = call(*inputs)
    finally:
        handle.remove()
    if not isinstance(image, Tensor):
        raise SplitError(f"the generator must return one tensor, got {type(image).__name__}; {ADVICE}")
    if not outputs:
        raise SplitError(f"module {name!r} is not executed between latent and image")
    if len(outputs) > 1 and not number:
        names = f'"{name}#0" to "{name}#{len(outputs) - 1}"'
        raise SplitError(f"module {name!r} is executed {len(outputs)} times: say which call is meant, {names}")
    index = int(number or 0)
    if index >= len(outputs):
        raise SplitError(f"{at!r}: module {name!r} is executed {len(outputs)} times, calls count from 0")
    output, batch = outputs[index], inputs[0].shape[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise SplitError(f"the output of module {name!r} is not a single floating tensor but {kind}")
    if output.dim() == 0 or output.shape[0] != batch:
        shape = tuple(output.shape)
        raise SplitError(f"the output of module {name!r} has shape {shape}: not the batch ({batch}) first")
    return module, index
