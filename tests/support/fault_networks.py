"""Tiny networks and refiners of the fault tests."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr

LATENT, IMAGE = 4, 3
FIELDS = ("images", "logits", "initial_logits", "steps", "status", "ids", "latents", "activations", "logit_falls")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator seeded, and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def generator(seed: int = 0) -> nn.Sequential:
    """(N, 4) -> (N, 3) in [-1, 1]; layers "0" to "3"."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(LATENT, 8), nn.ReLU(), nn.Linear(8, IMAGE), nn.Tanh()).eval()


def discriminator(seed: int = 1) -> nn.Sequential:
    """(N, 3) -> (N, 1)."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(IMAGE, 8), nn.Tanh(), nn.Linear(8, 1)).eval()


class Calls(nn.Module):
    """Passes on to a module and counts the calls of the original (copies count for themselves)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, [0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls[0] += 1
        return self.module(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        twin = Calls(self.module)
        twin.calls = self.calls  # copies of ours count too
        return twin


class Returning(nn.Module):
    """A discriminator whose output goes through ``change``."""

    def __init__(self, change: Any, module: nn.Module | None = None):
        super().__init__()
        self.module, self.change = module or discriminator(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.module(x))


def refiner(g: Any = None, d: nn.Module | None = None, sampler: Any = None, **options: Any) -> fr.Refiner:
    """A Refiner of the tiny pair; 4 slots, 5 steps, fixed steps of 0.1."""
    sampler = sampler or fr.Collaborative(0.1, control="fixed")
    options = {"max_steps": 5, "num_slots": 4, "prior": fr.Normal(LATENT)} | options
    return fr.Refiner(generator() if g is None else g, discriminator() if d is None else d, sampler, **options)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a[~a.isnan()], b[~b.isnan()])


def same_result(a: fr.Result, b: fr.Result, rows: Any = slice(None)) -> bool:
    """Every field of every sample in ``rows``, bit for bit."""
    return all(same(getattr(a, name)[rows], getattr(b, name)[rows]) for name in FIELDS)


def plain_loop(g: Any, d: Any, a: Tensor, steps: int, size: float) -> tuple[Tensor, Tensor]:
    """Refined activation and its image: ``steps`` non-saturating gradient steps on the whole batch ``a``."""
    for _ in range(steps):
        leaf = a.detach().requires_grad_()
        loss = nn.functional.softplus(-d(g(leaf))).flatten(1).mean(1).sum()
        a = a - size * torch.autograd.grad(loss, leaf)[0]
    return a.detach(), g(a).detach()


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """Texts of all fastrefine warnings of the block, repeated ones included."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, fr.FastrefineWarning)]
