"""Latent priors. The latent of sample i is a pure function of (seed, i); each prior knows the gradient of its log density."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.noise import Stream, normal, uniform
from fastrefine.samplers.base import Latent


class Prior:
    """Base of the priors. ``shape``: of one latent, without the batch."""

    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of one latent."""
        return math.prod(self.shape)

    def sample(self, ids: Tensor, seed: int, dtype: torch.dtype = torch.float32, stream: int = Stream.LATENT) -> Tensor:
        """Latents (n, *shape) of the sample ids (n,) int64."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """(3, F) float64: precision (1: standard normal, 0: uniform), lowest and highest value of each element."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p0 (n,) up to a constant, of latents (n, *shape) or flattened (n, F); -inf outside the support."""
        return Latent(self.table().to(z)).log_prob(self._flat(z))

    def score(self, z: Tensor) -> Tensor:
        """grad log p0 inside the support, of latents (n, *shape) or flattened (n, F), in their shape."""
        return Latent(self.table().to(z)).score(self._flat(z)).view_as(z)

    def _flat(self, z: Tensor) -> Tensor:
        if z.dim() < 2 or z.shape[1:].numel() != self.numel:
            raise InputError(f"latents of shape {tuple(z.shape)} are not of {self}, which has {self.numel} elements each")
        return z.flatten(1)


def _table(numel: int, *column: float) -> Tensor:
    return torch.tensor(column, dtype=torch.float64)[:, None].expand(3, numel).clone()


class _Elementwise(Prior):
    """A prior whose elements are independent and alike."""

    def __init__(self, *shape: int):
        if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
            raise InputError(f"prior shape is {shape!r}; wanted one or more positive integers, e.g. Normal(64)")
        self.shape = shape

    def __repr__(self) -> str:
        options = [f"{name}={value:g}" for name, value in vars(self).items() if name != "shape"]
        return f"{type(self).__name__}({', '.join([*map(str, self.shape), *options])})"


class Normal(_Elementwise):
    """Standard normal latents of the given shape, e.g. ``Normal(64)`` or ``Normal(100, 1, 1)``.

    Example: ``fr.Normal(100, 1, 1).sample(torch.arange(4), seed=0).shape  # (4, 100, 1, 1)``
    """

    def sample(self, ids: Tensor, seed: int, dtype: torch.dtype = torch.float32, stream: int = Stream.LATENT) -> Tensor:
        return normal(seed, ids, torch.zeros_like(ids), self.numel, stream, dtype).view(-1, *self.shape)

    def table(self) -> Tensor:
        return _table(self.numel, 1.0, -math.inf, math.inf)


class Uniform(_Elementwise):
    """Uniform latents in [low, high] per element.

    Example: ``fr.Uniform(32, low=0.0, high=1.0).sample(torch.arange(4), seed=0).shape  # (4, 32)``
    """

    def __init__(self, *shape: int, low: float = -1.0, high: float = 1.0):
        super().__init__(*shape)
        checks.number("low", low)
        checks.number("high", high, low, open_low=True)
        self.low, self.high = float(low), float(high)

    def sample(self, ids: Tensor, seed: int, dtype: torch.dtype = torch.float32, stream: int = Stream.LATENT) -> Tensor:
        u = uniform(seed, ids, torch.zeros_like(ids), self.numel, stream)
        return (self.low + (self.high - self.low) * u).to(dtype).view(-1, *self.shape)

    def table(self) -> Tensor:
        return _table(self.numel, 0.0, self.low, self.high)


class TruncatedNormal(_Elementwise):
    """Standard normal restricted to [-bound, bound] per element (BigGAN's truncation), by the inverse CDF.

    Example: ``fr.TruncatedNormal(32, bound=0.5).sample(torch.arange(4), seed=0).abs().max()  # at most 0.5``
    """

    def __init__(self, *shape: int, bound: float = 2.0):
        super().__init__(*shape)
        checks.number("bound", bound, 0.0, open_low=True)
        self.bound = float(bound)

    def sample(self, ids: Tensor, seed: int, dtype: torch.dtype = torch.float32, stream: int = Stream.LATENT) -> Tensor:
        u = uniform(seed, ids, torch.zeros_like(ids), self.numel, stream)
        low = torch.special.ndtr(torch.tensor(-self.bound, dtype=torch.float64, device=u.device))
        z = torch.special.ndtri(low + (1 - 2 * low) * u)
        return z.clamp(-self.bound, self.bound).to(dtype).view(-1, *self.shape)

    def table(self) -> Tensor:
        return _table(self.numel, 1.0, -self.bound, self.bound)


@dataclass(frozen=True)
class Product(Prior):
    """Two independent latents, both flattened and concatenated: (z, z') of the extended latent space ([DDLS] 3.4).

    Example: ``fr.Product(fr.Normal(32), fr.Uniform(8)).shape  # (40,)``
    """

    first: Prior
    second: Prior

    def __post_init__(self) -> None:
        for part in (self.first, self.second):
            if not isinstance(part, Prior):
                raise InputError(f"Product wants two priors, e.g. Product(Normal(64), Normal(3, 32, 32)), got {part!r}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.first.numel + self.second.numel,)

    @property
    def _leaves(self) -> list[Prior]:
        parts = (self.first, self.second)
        return [leaf for p in parts for leaf in (p._leaves if isinstance(p, Product) else [p])]

    def sample(self, ids: Tensor, seed: int, dtype: torch.dtype = torch.float32, stream: int = Stream.LATENT) -> Tensor:
        # each factor has a stream of its own, so nested products are independent too
        return torch.cat([p.sample(ids, seed, dtype, stream + 64 * k).flatten(1) for k, p in enumerate(self._leaves)], 1)

    def table(self) -> Tensor:
        return torch.cat([self.first.table(), self.second.table()], 1)


def as_prior(given: Prior | Mapping[str, Any]) -> Prior:
    """A prior as it is, or {"name": "normal" | "uniform" | "truncated_normal", "shape": [...], ...}. Raises InputError."""
    if isinstance(given, Prior):
        return given
    arguments: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    kind, shape = checks.PRIORS.get(str(arguments.pop("name", ""))), arguments.pop("shape", None)
    if kind is None or not isinstance(shape, list | tuple):
        raise InputError(
            f'prior is {given!r}; wanted e.g. {{"name": "normal", "shape": [64]}} of {", ".join(checks.PRIORS)}, or in Python '
            "fastrefine.Normal(64)"
        )
    try:
        return globals()[kind](*shape, **arguments)
    except TypeError as error:
        raise InputError(f"prior is {given!r}: {error}") from error


def described(prior: Prior) -> dict[str, Any]:
    """The JSON values from which ``as_prior`` makes this prior; InputError for one that has no name there."""
    for name, kind in checks.PRIORS.items():
        if type(prior) is globals()[kind]:
            extra = {key: value for key, value in vars(prior).items() if key != "shape"}
            return {"name": name, "shape": list(prior.shape), **extra}
    raise InputError(f"{prior!r} cannot be written down; wanted one of {', '.join(checks.PRIORS.values())}")
