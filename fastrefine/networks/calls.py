"""How the caller's networks are called: which arguments they take, what they raise, and how to read what D returns."""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastrefine import checks, noise
from fastrefine.errors import FastrefineError, InputError
from fastrefine.networks import draws
from fastrefine.networks.copies import unwrap
from fastrefine.networks.draws import SampleDraws
from fastrefine.networks.split import Split
from fastrefine.options import OutputKey


@dataclass(frozen=True)
class NetworkCall:
    """``call(network, x, *values)``: one network as the caller wants it called, with the values of the inputs ``names``."""

    names: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None  # function(network, x, **inputs); None: network(x[, labels], **kwargs)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    constants: tuple[Any, ...] = ()  # further positional arguments
    draws: int | None = None  # the first stream of the numbers that the network draws, by the key that is the last value
    pack: int = 1  # consecutive samples that the network is given as one, with their channels one after the other
    sigmoid: int | None = None  # the number of the sigmoid that is left out, from 0

    def __call__(self, network: nn.Module, x: Tensor, *values: Tensor) -> Any:
        if self.pack > 1:
            x, *values = (_packed(value, self.pack) for value in (x, *values))  # type: ignore[assignment]
        if self.draws is None:
            return self._plainly(network, x, *values)
        *values, key = values  # type: ignore[assignment]
        with SampleDraws(key, self.draws):
            return self._plainly(network, x, *values)

    def _plainly(self, network: nn.Module, x: Tensor, *values: Tensor) -> Any:
        if self.sigmoid is not None:
            with WithoutSigmoid(self.sigmoid):
                return replace(self, sigmoid=None)._plainly(network, x, *values)
        if self.function is not None:
            return self.function(network, x, **dict(zip(self.names, values, strict=False)))
        return network(x, *values, *self.constants, **self.kwargs)

    def values(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Those of the inputs that the network is given, in order."""
        return tuple(inputs[name] for name in self.names)

    def with_draws(self, run: Callable[[], Any], stream: int) -> NetworkCall:
        """The call by which draws belong to the sample, if ``run`` draws any."""
        if draws.first_draw(run) is None:
            return self
        return replace(self, names=(*self.names, noise.KEY), draws=stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkCall:
        return self


class WithoutSigmoid(TorchFunctionMode):
    """While active, the sigmoid of this number, from 0, gives what it is given. count: how many ran."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.count = number, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIGMOIDS:
            self.count += 1
            if self.count == self.number + 1:
                return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


_SIGMOIDS = {torch.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid, Tensor.sigmoid_}


def call_of(
    what: str, network: nn.Module, inputs: Mapping[str, Tensor], function: Callable[..., Any] | None, kwargs: Mapping[str, Any]
) -> NetworkCall:
    """How to call a network with these inputs; InputError where it needs labels and there are none.

    A network made for labels of width 0 (``c_dim`` = 0) gets None in their place.
    """
    if function is not None:
        own = getattr(network, "own_generate", None) is function  # it calls the function by itself
        return NetworkCall(tuple(name for name in inputs if name != noise.KEY), _by_name if own else function)
    takes, required = takes_labels(network, kwargs)
    if not takes and _signature(network, kwargs)[1]:  # made for labels of width 0
        return NetworkCall((), None, kwargs, (None,))
    if takes and "labels" in inputs:
        return NetworkCall(("labels",), None, kwargs)
    if required:
        first, second = ("generate=lambda G, z", "G(z, cond)")
        if what == "discriminator":
            first, second = ("discriminate=lambda D, x", "D(x, cond)")
        raise InputError(
            f"the {what} needs labels: pass labels=(N,) to sample, refine, stream or score; if its second argument is "
            f'something else, pass {first}, cond: {second} and conditions={{"cond": ...}}'
        )
    return NetworkCall((), None, kwargs)


def _by_name(network: nn.Module, x: Tensor, **inputs: Tensor) -> Any:
    return network(x, **inputs)


def _packed(x: Tensor, pack: int) -> Tensor:
    """(N / pack, pack C, ...) of (N, C, ...); (N / pack, pack) of (N,)."""
    return x.reshape(len(x) // pack, pack * x.shape[1], *x.shape[2:]) if x.dim() > 1 else x.reshape(-1, pack)


_WIDTHS = ("c_dim", "label_dim", "y_dim", "num_classes", "n_classes")  # attributes that say how wide labels are

# of an optional second parameter, which may also be noise, a truncation, a step
_LABELS = re.compile("label|class|cond|target|categor|attr|one_?hot|domain|context|^(y|c|cls|emb|embedding)$", re.IGNORECASE)


def takes_labels(network: Any, known: Mapping[str, Any] = MappingProxyType({})) -> tuple[bool, bool]:
    """(whether ``network(x, labels)`` is a valid call, whether labels are required); an optional one is known by its name.

    known: arguments that are given by name. A module may say so itself, by an attribute ``takes_labels`` of this form. One made
    for labels of width 0 takes none.
    """
    plain = unwrap(network) if isinstance(network, nn.Module) else network
    if any(getattr(plain, name, None) == 0 for name in _WIDTHS):
        return False, False
    return _signature(network, known)


def _signature(network: Any, known: Mapping[str, Any]) -> tuple[bool, bool]:
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
    """Run a network of the caller's; its exception becomes ours, with its type, the module it came from, and the shapes."""
    try:
        return call()
    except FastrefineError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(failure(what, error, x)) from error


def failure(what: str, error: Exception, x: Tensor) -> str:
    """What to say of an exception of a network of the caller's on a batch ``x``."""
    text = " ".join(str(error).split()) or "no message"
    hint = ""
    if what == "generator" and isinstance(error, RuntimeError) and re.search("shape|size|channel|dimension", text):
        hint = "; are these its latents (see prior), and is it the generator?"
    where = f"{tuple(x.shape)}, {x.dtype}"
    return f"the {what} failed on a batch of shape {where}: {type(error).__name__}: {text}{_module_of(error)}{hint}"


def _module_of(error: BaseException) -> str:
    """The innermost module that was running when the exception was raised, with the shapes of its tensors."""
    modules = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        own = frame.f_locals.get("self")
        if isinstance(own, nn.Module) and frame.f_code.co_name == "forward":
            shapes = [tuple(v.shape) for k, v in frame.f_locals.items() if isinstance(v, Tensor) and k != "self"]
            modules.append((own, shapes[:3]))
    if len(modules) < 2:
        return ""
    (outer, _), (inner, shapes) = modules[0], modules[-1]
    name = next((name for name, module in outer.named_modules() if module is inner), "")
    return f", in module {name!r} ({type(inner).__name__}) on shapes {', '.join(map(str, shapes))}"


def label_classes(
    modules: list[nn.Module], run: Callable[..., Any], x: Tensor, call: NetworkCall, inputs: Mapping[str, Tensor]
) -> int | None:
    """How many classes the embeddings know that read the labels, found by a call with label 0; None without any.

    Raises InputError for labels that these do not know, before they get to a device.
    """
    labels = inputs["labels"]
    if labels.is_floating_point():
        return None
    zeros, sizes = torch.zeros_like(labels), []
    storage = zeros.untyped_storage().data_ptr()

    def record(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() == storage:
            sizes.append(module.num_embeddings)

    embeddings = [child for module in modules for child in module.modules() if isinstance(child, nn.Embedding)]
    handles = [child.register_forward_pre_hook(record) for child in embeddings]
    with contextlib.suppress(Exception), torch.no_grad():  # what fails here fails again on the probe batch, with its reason
        run(x.clone(), *call.values({**inputs, "labels": zeros}))
    for handle in handles:
        handle.remove()
    classes = min(sizes, default=None)
    checks.classes(labels, classes)
    return classes


@dataclass(frozen=True)
class LogitReader:
    """How to read D's output: which entry of a tuple or dict, and whether it is a probability that was not cut."""

    key: OutputKey = None
    invert_sigmoid: bool = False
    pack: int = 1  # samples whose logit is that of their pack

    def __call__(self, raw: Any, n: int, dtype: torch.dtype) -> Tensor:
        """(n, P) logits of ``dtype``, those of several heads side by side."""
        heads = self.heads(raw, n, dtype)
        return heads[0] if len(heads) == 1 else torch.cat(heads, 1)

    def heads(self, raw: Any, n: int, dtype: torch.dtype) -> list[Tensor]:
        """(n, P) logits of each head; InputError when there is not one value, or one map, per sample."""
        is_list = self.key is None and isinstance(raw, list) and raw and all(isinstance(head, Tensor) for head in raw)
        heads = [self._head(head, n // self.pack, dtype) for head in (raw if is_list else [self.pick(raw)])]
        return [head.repeat_interleave(self.pack, 0) for head in heads] if self.pack > 1 else heads

    def _head(self, out: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        if out.dim() == 0 and n == 1:  # squeeze() of a batch of one; what is a batch mean was found on the probe batch
            out = out.reshape(1)
        if out.dim() == 0 or out.shape[0] != n:
            raise InputError(
                f"the discriminator must return one value per sample, got shape {_shape(out)} for {n} samples"
                + (" (a batch mean?)" if out.dim() == 0 else "")
            )
        if out.dim() > 1 and out.shape[1] != 1:
            picked = "" if self.key is None else f" at output_key={self.key!r}"
            raise InputError(
                f"the discriminator returned shape {_shape(out)}{picked}; wanted (N,), (N, 1) or a map (N, 1, h, w). Say which "
                "result is the logit by output_key or discriminate=; of several logits (N, P) it is the mean, e.g. "
                "discriminate=lambda D, x: D(x).mean(1)"
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
            raise InputError(
                f"the discriminator returned {_keys(raw)}; choose one with output_key=key, index or callable{_logit_in(raw)}"
            )
        return raw


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _entries(raw: Any) -> dict[Any, Any]:
    """What stands in an output that is no tensor, by index, key or name."""
    if isinstance(raw, tuple | list):
        return dict(enumerate(raw))
    return raw if isinstance(raw, dict) else getattr(raw, "__dict__", {})


def _logit_in(raw: Any) -> str:
    """A hint where exactly one entry has the shape of a logit."""
    alone = [key for key, x in _entries(raw).items() if isinstance(x, Tensor) and (x.dim() == 1 or x.shape[1:] == (1,))]
    return f"; output_key={alone[0]!r} has the shape of a logit" if len(alone) == 1 else ""


def _keys(raw: Any) -> str:
    found = _entries(raw)
    shapes = ", ".join(f"{key}: {_shape(x)}" for key, x in found.items() if isinstance(x, Tensor))
    shapes = f"; shapes {shapes}" if shapes else ""
    if isinstance(raw, dict):
        return f"a dict with keys {list(raw)}{shapes}"
    if isinstance(raw, tuple | list):
        fields = f", names {list(raw._fields)}" if hasattr(raw, "_fields") else ""
        return f"a {type(raw).__name__} of {len(raw)} (indices 0 to {len(raw) - 1}{fields}{shapes})"
    return f"an object of type {type(raw).__name__}" + (f" with attributes {list(found)}{shapes}" if found else "")
