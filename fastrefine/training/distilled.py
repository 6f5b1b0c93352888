"""A generator with what refinement does built in: a small map at the place that was refined, trained by ``distil``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.networks.calls import call_of
from fastrefine.networks.copies import private_copy, unwrap
from fastrefine.networks.cut import first_tensor, with_first_tensor

MAP = "distilled_map"  # the name of the map's module
_SLOPE = 0.2  # of leaky ReLUs
_POOLED = 8  # side of what the map sees of a whole image


@dataclass
class _Pass:
    """A forward pass of one distilled generator that is under way."""

    inputs: Mapping[str, Tensor]
    calls: int = 0  # of the module at the place


_PASSES: ContextVar[dict[int, _Pass]] = ContextVar("passes")  # by the generator's id, for one may stand in another


class DistilledMap(nn.Module):
    """(N, *shape) activations -> (N, *shape), mapped. Its last layer starts at zero, so that it starts as the identity.

    shape: (F,), a vector: an MLP. (C, H, W), a map: convolutions, and a bottleneck that sees the whole. (C, L), or (T, F)
    with ``tokens``, a sequence: the same along it. Any other shape is taken as a vector.
    width: of the hidden layers. classes: that an embedding of labels knows, 0 for none. features: elements of the conditions.
    """

    def __init__(self, shape: Sequence[int], width: int, classes: int = 0, features: int = 0, tokens: bool = False):
        super().__init__()
        self.tokens, axes = tokens, len(shape) - 1 if len(shape) in (2, 3) else 0
        channels = shape[-1] if tokens else shape[0] if axes else torch.Size(shape).numel()
        self.embedding = nn.Embedding(classes, width) if classes else None
        self.conditions = nn.Linear(features, width) if features else None
        self.whole: nn.Module | None = None
        if axes:
            conv: Any = nn.Conv2d if axes == 2 else nn.Conv1d
            self.pooled = [min(side, _POOLED) for side in ((shape[0],) if tokens else shape[1:])]
            size = width * torch.Size(self.pooled).numel()
            self.whole = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.LeakyReLU(_SLOPE), nn.Linear(width, size))
            self.inlet, self.outlet = conv(channels, width, 1), conv(width, channels, 1, bias=False)
            self.inner = nn.ModuleList(conv(width, width, 3, padding=1) for _ in range(2))
        else:
            sizes = [channels, width, 3 * width // 2, channels]
            self.inlet, *inner = (nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:-1], strict=False))
            self.inner, self.outlet = nn.ModuleList(inner), nn.Linear(sizes[-2], channels, bias=False)
        nn.init.zeros_(self.outlet.weight)

    def forward(self, a: Tensor, labels: Tensor | None = None, conditions: Sequence[Tensor] = ()) -> Tensor:
        """a: (N, *shape). labels: (N,) classes. conditions: each (N, k)."""
        x = a.transpose(1, 2) if self.tokens else a if self.whole is not None else a.flatten(1)
        h = self.inlet(x)
        if self.embedding is not None:
            h = h + self.embedding(labels)[(...,) + (None,) * (h.dim() - 2)]
        if self.conditions is not None:
            h = h + self.conditions(torch.cat(list(conditions), 1))[(...,) + (None,) * (h.dim() - 2)]
        h = F.leaky_relu(self.inner[0](F.leaky_relu(h, _SLOPE, inplace=True)), _SLOPE, inplace=True)
        if self.whole is not None:
            h = h + self._seen_whole(h)
        if self.whole is None:  # sum and product at once
            return torch.addmm(x, h, self.outlet.weight.t()).view_as(a)
        change = self.outlet(F.leaky_relu(self.inner[1](h), _SLOPE, inplace=True))
        return a + (change.transpose(1, 2) if self.tokens else change)

    def _seen_whole(self, h: Tensor) -> Tensor:
        assert self.whole is not None
        size = h.shape[2:]
        if list(size) == self.pooled:
            return self.whole(h).view_as(h)
        pool = F.adaptive_avg_pool2d if h.dim() == 4 else F.adaptive_avg_pool1d
        low = self.whole(pool(h, self.pooled)).unflatten(1, (h.shape[1], *self.pooled))  # type: ignore[arg-type]
        return F.interpolate(low, size=size)


class DistilledGenerator(nn.Module):
    """A generator whose activation at one place passes a small map that has learned refinement, see ``fastrefine.distil``.

    Called like the generator: ``g(z)``, ``g(z, labels)``, and with conditions by name, ``g(z, labels, edges=...)``; where the
    generator is called by a ``generate`` function, it calls that function itself. z: (N, ...) -> what the generator gives,
    images (N, ...). It holds its own copy of the generator, whose modules keep their names: a Refiner at the same place begins
    with the mapped activation. At the input that place is "distilled_map". It is a plain module of torch: ``torch.export``
    exports it, and the exported program needs no fastrefine. In eval mode, no parameter asks for a gradient.

    report: what it was made from: pairs, rounds, seed, at, sampler, max_steps, width; held_out_error, the share of what
        refinement does that the map leaves undone on held-out samples; flops_share, of the generator's FLOPs;
        ignored, conditions that the map does not read; shaped, whether the discriminator was.
    discriminator: the one for exact steps after the map, as ``fr.distil`` shaped it on what the map gives; without real images
        the refiner's own. None after loading: a saved pair has it. It is no submodule: it is neither moved nor exported.

    ``fr.distil`` makes it; the arguments are those of a saved pair. Raises InputError where an input is missing.

    Example: ``fr.distil(refiner, pairs=2000)(torch.randn(4, 32)).shape  # (4, 1, 8, 8)``
    """

    def __init__(
        self, generator: nn.Module, at: str, shape: Sequence[int], width: int, classes: int = 0, features: int = 0,
        tokens: bool = False, names: Sequence[str] = (), reads: Sequence[str] = (),
        generator_kwargs: Mapping[str, Any] | None = None, generate: Callable[..., Any] | None = None,
        report: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        given = dict(locals())
        self.arguments = {k: v for k, v in given.items() if k not in ("self", "__class__", "generator", "generate", "report")}
        self.keep_discriminator(None)
        own = private_copy(unwrap(generator))
        # Hidden, for it has no name of its own: its modules and tensors are also this module's, under their names.
        vars(self).update(
            _own=own, _parameters=own._parameters, _buffers=own._buffers,
            _non_persistent_buffers_set=own._non_persistent_buffers_set,
        )  # fmt: skip
        self._modules.update(own._modules)
        if MAP in self._modules:
            raise InputError(f"the generator has a module {MAP!r} already: distil the one that it was distilled from")
        self.add_module(MAP, DistilledMap(shape, width, classes, features, tokens))
        self.at, _, number = at.partition("#")
        self.index = int(number) if number else None
        self.reads, self.own_generate, self.report = tuple(reads), generate, dict(report or {})
        self.call = call_of("generator", own, dict.fromkeys(names), generate, generator_kwargs or {})  # type: ignore[arg-type]
        self.takes_labels = ("labels" in names,) * 2
        self._needs_pass = classes > 0 or bool(reads) or self.index is not None
        if self.at not in ("input", "output"):
            own.get_submodule(self.at).register_forward_hook(self._at_place)
        self.eval().requires_grad_(False)

    discriminator: nn.Module | None

    def keep_discriminator(self, discriminator: nn.Module | None) -> None:
        """Set ``discriminator``."""
        vars(self)["discriminator"] = discriminator  # past nn.Module, which would make it a submodule

    @property
    def refined_at(self) -> str:
        """The place at which a Refiner goes on from the mapped activation."""
        return MAP if self.at == "input" else self.arguments["at"]

    def train(self, mode: bool = True) -> DistilledGenerator:
        super().train(mode)
        vars(self)["_own"].training = mode
        return self

    def __repr__(self) -> str:
        share, own = self.report.get("flops_share"), checks.network(vars(self)["_own"])
        cost = f", {share:.1%} more FLOPs" if share is not None else ""
        return f"DistilledGenerator({own}, distilled at {self.arguments['at']!r}{cost})"

    def forward(self, z: Tensor, labels: Tensor | None = None, **further: Any) -> Any:
        """z: (N, ...) latents. labels, further: the inputs by name that it was distilled with, and keywords of G."""
        given = further if labels is None else {"labels": labels, **further}
        names = self.call.names
        if missing := [name for name in names if name not in given]:
            raise InputError(f"this distilled generator reads {', '.join(names)}; {', '.join(missing)} not given")
        inputs = {name: given.pop(name) for name in names}
        if not self._needs_pass:
            return self._called(z, inputs, given)
        if isinstance(z, fx.Proxy):
            raise TypeError("a symbolic trace would not hand the inputs to the map: use torch.export")
        token = _PASSES.set({**_PASSES.get({}), id(self): _Pass(inputs)})
        try:
            return self._called(z, inputs, given)
        finally:
            _PASSES.reset(token)

    def _called(self, z: Tensor, inputs: Mapping[str, Tensor], kwargs: dict[str, Any]) -> Any:
        if self.at == "input":
            z = self._mapped(z)
        own, call, values = vars(self)["_own"], self.call, self.call.values(inputs)
        if call.function is None:
            out = own(z, *values, *call.constants, **{**call.kwargs, **kwargs})
        else:
            out = call.function(own, z, **inputs, **kwargs)
        return self._changed(out) if self.at == "output" else out

    def _at_place(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook of the module at the place."""
        if self.index is not None:
            now = self._pass
            now.calls += 1
            if now.calls != self.index + 1:
                return None
        return self._changed(output)

    def _changed(self, output: Any) -> Any:
        found = first_tensor(output)
        if found is None:
            raise InputError(f"at {self.at!r} the generator gives no floating tensor")
        return with_first_tensor(output, self._mapped(found))

    def _mapped(self, a: Tensor) -> Tensor:
        if not (self.arguments["classes"] or self.reads):
            return self._modules[MAP](a)  # type: ignore[misc]
        inputs = self._pass.inputs
        labels = inputs["labels"] if self.arguments["classes"] else None
        return self._modules[MAP](a, labels, [inputs[name].to(a.dtype) for name in self.reads])  # type: ignore[misc]

    @property
    def _pass(self) -> _Pass:
        return _PASSES.get()[id(self)]
