"""on_noise="freeze": random numbers that a network draws in its forward pass belong to the sample, and stay the same.

Each random operation takes its numbers from Philox by the sample's key, which follows from seed and sample id, and by how
many draws came before it in the pass. Numbers that have no sample axis are the same in every pass.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrefine import noise

aten = torch.ops.aten


class SampleDraws(TorchDispatchMode):
    """While active, random operations give each sample the numbers that its key names. stream: the first of their streams."""

    def __init__(self, key: Tensor, stream: int):
        super().__init__()
        self.key, self.stream = key, stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            return func(*args, **(kwargs or {}))
        named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        return rule(self._numbers, named)

    def _numbers(self, kind: str, shape: Any, like: Any = None) -> Tensor:
        """Standard normals or uniforms of a shape, of the dtype and device of ``like`` or of torch's default."""
        shape = tuple(shape)
        key = self.key if shape[:1] == (len(self.key),) else torch.zeros_like(self.key[:1])
        numel = max(1, torch.Size(shape).numel() // len(key))
        stream, self.stream = self.stream, self.stream + 1
        if kind == "normal":
            drawn = noise.normal(0, key[:, 0], key[:, 1], numel, stream, torch.float64)
        else:
            drawn = noise.uniform(0, key[:, 0], key[:, 1], numel, stream)
        dtype, device = (like.dtype, like.device) if isinstance(like, Tensor) else like or (None, None)
        drawn = drawn.to(dtype=dtype or torch.get_default_dtype(), device=device or key.device).reshape(shape)
        # a uniform below 1 in float64 may round to 1
        return drawn if kind == "normal" else drawn.clamp(max=1 - torch.finfo(drawn.dtype).eps)


Numbers = Callable[..., Tensor]


def _made(kind: str) -> Callable[[Numbers, dict[str, Any]], Tensor]:
    return lambda numbers, given: numbers(kind, given["size"], (given.get("dtype"), given.get("device")))


def _made_like(kind: str) -> Callable[[Numbers, dict[str, Any]], Tensor]:
    def rule(numbers: Numbers, given: dict[str, Any]) -> Tensor:
        x = given["self"]
        return numbers(kind, x.shape, (given.get("dtype") or x.dtype, given.get("device") or x.device))

    return rule


def _integers(numbers: Numbers, given: dict[str, Any]) -> Tensor:
    like = given.get("self")
    shape, low, high = given["size"] if like is None else like.shape, given.get("low", 0), given["high"]
    dtype = given.get("dtype") or (torch.int64 if like is None else like.dtype)
    device = given.get("device") or (None if like is None else like.device)
    return (low + (high - low) * numbers("uniform", shape, (torch.float64, device))).floor().to(dtype)


def _normal(numbers: Numbers, given: dict[str, Any]) -> Tensor:
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    like = next((value for value in (mean, std) if isinstance(value, Tensor)), None)
    if like is None:
        return mean + std * numbers("normal", given["size"], (given.get("dtype"), given.get("device")))
    shape = torch.broadcast_shapes(*(value.shape for value in (mean, std) if isinstance(value, Tensor)))
    return mean + std * numbers("normal", shape, like)


def _filled(change: Callable[[Tensor, dict[str, Any]], Tensor], kind: str) -> Callable[[Numbers, dict[str, Any]], Tensor]:
    """Rule of an operation that fills a tensor in place, and of its functional form: ``change`` of standard numbers."""

    def rule(numbers: Numbers, given: dict[str, Any]) -> Tensor:
        x = given["self"]
        return x.copy_(change(numbers(kind, x.shape, (torch.float64, x.device)), given))

    return rule


def _ends(u: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.full_like(u, given.get("from", 0.0)), torch.full_like(u, given.get("to", 1.0))


def _bernoulli(numbers: Numbers, given: dict[str, Any]) -> Tensor:
    x = given["self"]
    p = given.get("p", x)
    return (numbers("uniform", x.shape, (torch.float64, x.device)) < p).to(x.dtype)


def _dropout(numbers: Numbers, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, p = given["input"], given["p"]
    mask = numbers("uniform", x.shape, (torch.float64, x.device)) >= p
    return x * mask * (1 / (1 - p) if p < 1 else 0.0), mask


_RULES: dict[Any, Callable[[Numbers, dict[str, Any]], Any]] = {
    aten.randn: _made("normal"), aten.rand: _made("uniform"), aten.normal: _normal, aten.randint: _integers,
    aten.randn_like: _made_like("normal"), aten.rand_like: _made_like("uniform"), aten.randint_like: _integers,
    aten.normal_: _filled(lambda z, given: given.get("mean", 0.0) + given.get("std", 1.0) * z, "normal"),
    aten.uniform_: _filled(lambda u, given: torch.lerp(*_ends(u, given), u), "uniform"),
    aten.exponential_: _filled(lambda u, given: -torch.log(u) / given.get("lambd", 1.0), "uniform"),
    aten.bernoulli: _bernoulli, aten.native_dropout: _dropout,
    aten.bernoulli_: lambda numbers, given: given["self"].copy_(_bernoulli(numbers, given)),
}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes the first random operation, and where in the caller's code it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.place: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.place is None and torch.Tag.nondeterministic_seeded in func.tags:
            frames = traceback.extract_stack()[:-1]
            own = [f for f in frames if not f.filename.startswith((_TORCH, _PACKAGE))]
            where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
            self.place = f"{func.overloadpacket.__name__}{where}"
        return func(*args, **(kwargs or {}))


_TORCH, _PACKAGE = (str(Path(file).parent) for file in (torch.__file__, noise.__file__))


def first_draw(run: Callable[[], Any]) -> str | None:
    """The first random operation of ``run``, with file and line where they are known; None where it draws nothing."""
    with _Watch() as watch:
        run()
    return watch.place
