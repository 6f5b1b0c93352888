"""Private evaluation copies: parametrizations baked, BatchNorm folded, layout and dtype set. The original never changes."""

from __future__ import annotations

import contextlib
import copy
import operator
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fastrefine.errors import InputError

M = TypeVar("M", bound=nn.Module)

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONV, *_CONV_TRANSPOSE, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile; a scripted module is an InputError."""
    while True:
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"got a scripted or traced module ({type(module).__name__}), whose graph cannot be cut or frozen: "
                "give the nn.Module it was made from"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(original := getattr(module, "_orig_mod", None), nn.Module):
            module = original  # torch._dynamo's OptimizedModule
        else:
            return module


def mark_shaped(discriminator: nn.Module) -> nn.Module:
    """The discriminator, which from now on is known to be shaped, also its copies. Weights and their names stay as they are."""
    vars(discriminator)["_shaped_by_fastrefine"] = True
    return discriminator


def is_shaped(discriminator: nn.Module) -> bool:
    """Whether ``mark_shaped`` was given this module, or one that it is a copy of."""
    scripted = isinstance(discriminator, torch.jit.ScriptModule)
    return not scripted and "_shaped_by_fastrefine" in vars(unwrap(discriminator))


def without_scripts(module: nn.Module) -> nn.Module:
    """The module unwrapped; InputError where a part of it is scripted or traced."""
    plain = unwrap(module)
    for name, child in plain.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise InputError(
                f"module {name!r} is scripted or traced, and can neither be looked into nor frozen: "
                "give the nn.Module it was made from"
            )
    return plain


def own_copy(module: nn.Module, like: Tensor, run: Callable[[nn.Module], Any] | None = None) -> nn.Module:
    """Our copy of a network of the caller's, on the device and in the dtype of ``like``.

    Stages of another precision than float32 stay as they are where ``run`` then runs, else all is converted.
    """
    own = private_copy(without_scripts(module)).to(device=like.device)
    if run is not None and len(_precisions(own)) > 1:
        kept = converted(twin(own), like.dtype)
        with contextlib.suppress(Exception), torch.no_grad():  # what fails here fails below, or not
            run(kept)
            return kept
    return own.to(dtype=like.dtype)


def converted(module: M, dtype: torch.dtype) -> M:
    """The same module in ``dtype``; of one with stages of several precisions, what is float32."""
    if len(_precisions(module)) < 2:
        return module.to(dtype=dtype)
    return module._apply(lambda t: t.to(dtype) if t.dtype == torch.float32 else t)


def _precisions(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters() if p.is_floating_point()}


def private_copy(module: M) -> M:
    """A deep copy in eval mode whose parameters need no gradient, with parametrizations and weight hooks baked in.

    Hooks of the user travel with the copy, for they may be part of the function.
    """
    with torch.inference_mode(False):
        own = twin(module).eval()
        for parameter in own.parameters():
            parameter.grad = None
        _bake(own)
        for child in own.modules():  # what was made under inference_mode cannot take part in autograd
            for store in (child._parameters, child._buffers):
                for name, value in store.items():
                    if value is not None and value.is_inference():
                        fresh = value.clone()
                        is_parameter = isinstance(value, nn.Parameter)
                        store[name] = nn.Parameter(fresh, requires_grad=False) if is_parameter else fresh  # type: ignore[assignment]
            for name, value in list(child.__dict__.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    child.__dict__[name] = value.clone()
    return own.requires_grad_(False)


def twin(module: M) -> M:
    """A deep copy, also of modules that deepcopy refuses; InputError where it refuses still.

    Tensors in an autograd graph, such as one kept by a forward pass, are copied as values. What cannot be copied at all, such
    as a lock, a library or a writer of logs, is shared.
    """
    memo = non_leaf_tensors(module)
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:  # an attribute may refuse in any way
        for value in reversed(list(_reachable(module))):  # what a value holds comes after it
            if id(value) in memo or isinstance(value, nn.Module | Tensor | dict | list | tuple):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                memo[id(value)] = value
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(f"{type(module).__name__} cannot be copied: {type(error).__name__}: {text}") from error


def non_leaf_tensors(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: tensors in an autograd graph (old-style spectral norm after a forward) refuse to be copied."""
    return {id(v): v.detach().clone() for v in _reachable(module) if isinstance(v, Tensor) and not v.is_leaf}


def _reachable(module: nn.Module) -> Iterator[Any]:
    """The attributes of a module and of what it holds, the holder before what it holds; each object once."""
    seen, pending = {id(module)}, deque([module])
    while pending:
        one = pending.popleft()
        yield one
        if isinstance(one, dict):
            parts: Iterable[Any] = one.values()
        elif isinstance(one, list | tuple | set | frozenset | deque):
            parts = one
        elif isinstance(one, nn.Module) or not isinstance(one, _WITHOUT_PARTS):
            parts = getattr(one, "__dict__", {}).values()
        else:
            continue
        for part in parts:
            if id(part) not in seen and not isinstance(part, _ATOMS):
                seen.add(id(part))
                pending.append(part)


_ATOMS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_WITHOUT_PARTS = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, Tensor)


def _bake(module: nn.Module) -> None:
    """Replace parametrizations and spectral/weight-norm hooks by their present (eval mode) value, in place."""
    for child in module.modules():
        if parametrize.is_parametrized(child):
            # remove_parametrizations would edit the dynamic class that the copy shares with the user's module
            weights = {name: getattr(child, name).detach().clone() for name in child.parametrizations}  # type: ignore[union-attr, operator]
            child.__class__ = parametrize.type_before_parametrizations(child)
            del child._modules["parametrizations"]
            for name, weight in weights.items():
                child.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for key, hook in list(child._forward_pre_hooks.items()):
            if type(hook).__name__ not in ("SpectralNorm", "WeightNorm") or not hasattr(hook, "name"):
                continue
            hook(child, ())
            weight = getattr(child, hook.name).detach().clone()
            del child._forward_pre_hooks[key]
            for part in ("orig", "g", "v"):
                child._parameters.pop(f"{hook.name}_{part}", None)
            child.__dict__.pop(hook.name, None)
            child.register_parameter(hook.name, nn.Parameter(weight, requires_grad=False))


def norms_after_layers(modules: tuple[nn.Module, ...], run: Callable[[], Tensor]) -> list[list[tuple[str, str]]]:
    """For each of the modules the names (layer, BatchNorm) of pairs where the one's output goes to the other alone.

    ``run`` runs the modules with gradients, to a loss: which output goes where is read from the graph that autograd keeps.
    """
    calls: dict[nn.Module, list[Any]] = {}  # module -> the nodes of its outputs

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(module, []).append(getattr(output, "grad_fn", None))

    names = [{m: name for name, m in module.named_modules() if type(m) in (*_LAYERS, *NORMS)} for module in modules]
    handles = [m.register_forward_hook(keep) for found in names for m in found]
    try:
        pending = [run().grad_fn]
    finally:
        for handle in handles:
            handle.remove()
    readers: Counter[Any] = Counter()
    seen: set[Any] = {None}
    node: Any
    while pending:
        if (node := pending.pop()) not in seen:
            seen.add(node)
            sources = [source for source, _ in node.next_functions]
            readers.update(sources)
            pending += sources
    once = {nodes[0]: module for module, nodes in calls.items() if len(nodes) == 1 and nodes[0] is not None}
    pairs: list[list[tuple[str, str]]] = [[] for _ in modules]
    for node, norm in once.items():
        source = node.next_functions[0][0] if type(norm) in NORMS else None
        for found, own in zip(names, pairs, strict=True):
            if norm in found and once.get(source) in found and readers[source] == 1:
                own.append((found[once[source]], found[norm]))
    return pairs


def fold_batch_norms(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    """A copy of an eval-mode module with each BatchNorm folded into the layer before it; pairs: as above.

    The caller compares the result with the original on a probe batch.
    """
    own = twin(module)
    shared = _shared_parameters(own)
    for layer, norm in pairs:
        fused = _fuse(own.get_submodule(layer), own.get_submodule(norm), shared)
        if fused is not None:
            own.set_submodule(layer, fused)
            own.set_submodule(norm, nn.Identity())
    return own


def _shared_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module owns: folding one owner would change the other."""
    owners = Counter(id(p) for child in {id(m): m for m in module.modules()}.values() for p in child._parameters.values())
    return {key for key, count in owners.items() if count > 1}


def _fuse(layer: Any, norm: Any, shared: set[int]) -> nn.Module | None:
    if norm.running_mean is None:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    if any(id(p) in shared for p in layer.parameters()):
        return None
    if type(layer) in _CONV:
        return fuse_conv_bn_eval(layer, norm)
    if type(layer) in _CONV_TRANSPOSE:
        return fuse_conv_bn_eval(layer, norm, transpose=True) if layer.groups == 1 else None
    return fuse_linear_bn_eval(layer, norm)


def has_spatial_weights(module: nn.Module) -> bool:
    """Whether channels_last can pay: the module has 4-d weights."""
    return any(p.dim() == 4 for p in module.parameters())


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a part of it is a BatchNorm that keeps statistics."""
    return any(isinstance(child, NORMS) and child.track_running_stats for child in unwrap(module).modules())


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Write the parameters and buffers of ``source`` into the storage of ``target`` (same structure)."""
    with torch.no_grad():
        for kind in ("named_parameters", "named_buffers"):
            values = dict(getattr(source, kind)())
            for name, tensor in getattr(target, kind)():
                tensor.copy_(values[name])


class Weights:
    """A module's parameters and buffers as they are now; unequal once one was updated in place, or replaced.

    An update by way of ``.data`` leaves a tensor's version as it is, so that the content is summed up too, in two ways.
    """

    def __init__(self, module: nn.Module | None):
        self.tensors = () if module is None else (*module.parameters(), *module.buffers())  # held: an id is not used again
        self.versions = [0 if t.is_inference() else t._version for t in self.tensors]
        self.sums: list[bytes] = []
        with torch.no_grad():
            for device in dict.fromkeys(t.device for t in self.tensors):  # one wait for each
                here = [t for t in self.tensors if t.device == device and t.numel()]
                sums = [part for t in here for part in _sums(t)]
                self.sums.append(torch.stack(sums).cpu().numpy().tobytes() if sums and device.type != "meta" else b"")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        same = len(self.tensors) == len(other.tensors) and all(map(operator.is_, self.tensors, other.tensors))
        return same and self.versions == other.versions and self.sums == other.sums

    __hash__ = None  # type: ignore[assignment]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sums(t: Tensor) -> list[Tensor]:
    """Int64 scalars where ``t`` lies, of its bits: equal whatever the number of threads. Of sparse and quantized ones none."""
    if t.layout is not torch.strided or t.is_quantized:
        return []
    bits = (torch.view_as_real(t) if t.is_complex() else t).view(_BITS[t.element_size()]).reshape(-1)
    together = 8 // bits.element_size()  # neighbours summed as one number, by which a swap of two is seen
    bits = bits.clone() if bits.storage_offset() % together else bits
    whole = len(bits) // together * together
    rest = [bits[whole:].sum(dtype=torch.int64)] if whole < len(bits) else []
    return [bits[:whole].view(torch.int64).sum(), *rest]


def device_of(*modules: Any) -> torch.device:
    """Where the first of the modules with any tensor has it."""
    for module in modules:
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                return tensor.device
    return torch.device("cpu")
