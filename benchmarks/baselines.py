"""What fastrefine is measured against: three loops, written from [CS] Alg. 1 and independent of fastrefine's own code.

All do ``a <- a - step_size * grad sum_i -log s(D(tail(a)))_i`` for each batch of latents and end with an evaluation of
what they return, so their results equal those of ``Collaborative(step_size, control="fixed")``.

  PeersLoop     B0: the loop of the public codes. Prefix once per batch, ``.backward()``, parameter gradients on, K for all.
  ExpertLoop    B1: parameters frozen, autograd.grad, BatchNorm folded, channels_last, own precision; a batch ends when all
                its samples have stopped, and a sample that has stopped keeps its place.
  CompiledLoop  B2: B1 with torch.compile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from benchmarks.workloads import halves


class Refined(NamedTuple):
    """images (N, ...), logits (N,), steps (N,), in the order of the latents."""

    images: Tensor
    logits: Tensor
    steps: Tensor


class PeersLoop:
    """B0. generator and discriminator are used as they are, in eval mode; their ``.grad`` is filled, as in the peers."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, at: str, step_size: float, max_steps: int, batch: int):
        self.prefix, self.tail = halves(generator, at)
        self.discriminator, self.step_size, self.max_steps, self.batch = discriminator, step_size, max_steps, batch

    def __call__(self, latents: Tensor) -> Refined:
        parts = [self._refine(z) for z in latents.split(self.batch)]
        return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _refine(self, z: Tensor) -> Refined:
        with torch.no_grad():
            a = self.prefix(z)
        for _ in range(self.max_steps):
            a = a.detach().requires_grad_()
            loss = F.softplus(-self.discriminator(self.tail(a)).flatten()).sum()
            for module in (self.tail, self.discriminator):
                module.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                a = a - self.step_size * a.grad
        with torch.no_grad():
            images = self.tail(a)
            logits = self.discriminator(images).flatten()
        return Refined(images, logits, torch.full((len(z),), self.max_steps))


class ExpertLoop:
    """B1, in ``precision``; the refined activation stays float32 (float64 for float64 networks)."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, at: str, step_size: float, max_steps: int, batch: int,
        precision: torch.dtype | None = None,
    ):  # fmt: skip
        generator = copy.deepcopy(generator).requires_grad_(False)
        prefix, tail = halves(generator, at)
        self.state = next(discriminator.parameters()).dtype
        self.precision = precision or self.state
        self.prefix = prefix
        self.tail = self._quick(tail)
        self.discriminator = self._quick(copy.deepcopy(discriminator).requires_grad_(False))
        self.step_size, self.max_steps, self.batch = step_size, max_steps, batch
        self.evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = self._evaluate

    def _quick(self, module: nn.Module) -> nn.Module:
        module = fold(copy.deepcopy(module)).to(self.precision)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, latents: Tensor, threshold: float = math.inf, last_step: Tensor | None = None) -> Refined:
        """Stop a sample when its logit reaches ``threshold`` or after its own ``last_step`` (N,) updates."""
        last = torch.full((len(latents),), self.max_steps) if last_step is None else last_step.long()
        with parametrize.cached():
            parts = [
                self._refine(z, threshold, own)
                for z, own in zip(latents.split(self.batch), last.split(self.batch), strict=True)
            ]
        return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _refine(self, z: Tensor, threshold: float, last: Tensor) -> Refined:
        with torch.no_grad():
            a = self.prefix(z)
        if a.dim() == 4:
            a = a.contiguous(memory_format=torch.channels_last)
        last = last.to(a.device)
        steps, longest = torch.zeros_like(last), int(last.max())
        for step in range(longest):
            a = a.detach().requires_grad_()
            loss, logits, images = self.evaluate(a)
            moving = (logits.detach() < threshold) & (step < last) & (steps == step)
            if threshold < math.inf and not bool(moving.any()):
                break
            (grad,) = torch.autograd.grad(loss, a)
            with torch.no_grad():
                a = a - self.step_size * grad * moving.to(a.dtype).view(-1, *[1] * (a.dim() - 1))
            steps += moving
        else:
            with torch.no_grad():
                _, logits, images = self._evaluate(a.detach())
        return Refined(images.detach().to(self.state), logits.detach(), steps)

    def _evaluate(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = self.tail(a.to(self.precision))
        logits = self.discriminator(images).flatten().to(self.state)
        return F.softplus(-logits).sum(), logits, images


class CompiledLoop(ExpertLoop):
    """B2: the loss, and with it its gradient, compiled for the batch; ``mode`` as torch.compile takes it."""

    def __init__(self, *args: object, mode: str | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.evaluate = torch.compile(self._evaluate, mode=mode, dynamic=False, fullgraph=True)


def fold(module: nn.Module) -> nn.Module:
    """``module`` with each BatchNorm after a convolution or linear layer of a Sequential folded into it."""
    for name, child in list(module.named_children()):
        setattr(module, name, fold(child))
    if not isinstance(module, nn.Sequential):
        return module
    layers: list[nn.Module] = []
    for layer in module:
        before = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d | nn.ConvTranspose2d):
            layers[-1] = fuse_conv_bn_eval(before, layer, transpose=isinstance(before, nn.ConvTranspose2d))
        elif isinstance(layer, nn.BatchNorm1d) and isinstance(before, nn.Linear):
            layers[-1] = fuse_linear_bn_eval(before, layer)
        else:
            layers.append(layer)
    kind = type(module)  # a LatentSequential shapes its latents
    return kind(*layers).eval()
