"""What fastrefine is measured against: three loops, written from [CS] Alg. 1 and independent of fastrefine's own code.

All do ``a <- a - step_size * grad sum_i -log s(D(tail(a)))_i`` for each batch of latents and end with an evaluation of
what they return, so their results equal those of ``Collaborative(step_size, control="fixed")``.

  PeersLoop     B0: the loop of the public codes. Prefix once per batch, ``.backward()``, parameter gradients on, K for all.
  ExpertLoop    B1: parameters frozen, autograd.grad, BatchNorm folded, channels_last, own precision; a batch ends when all
                its samples have stopped, and a sample that has stopped keeps its place.
  CompiledLoop  B2: B1 with its whole step, gradient included, in torch.compile.

All run where the networks are, without a wait for the device except where a batch may end early. TF32, cudnn.benchmark
and threads are the caller's to set, the same for both sides.
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
            a, *context = _parts(self.prefix(z))
        for _ in range(self.max_steps):
            a = a.detach().requires_grad_()
            loss = F.softplus(-self.discriminator(self.tail(a, *context)).flatten()).sum()
            for module in (self.tail, self.discriminator):
                module.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                a = a - self.step_size * a.grad
        with torch.no_grad():
            images = self.tail(a, *context)
            logits = self.discriminator(images).flatten()
        return Refined(images, logits, torch.full((len(z),), self.max_steps, device=z.device))


class ExpertLoop:
    """B1, in ``precision`` and the layout that suits the networks.

    The refined activation stays float32 (float64 for float64 networks). Without a stop nothing is tested and nothing
    masked; with one, "have all stopped?" is asked once per step.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, at: str, step_size: float, max_steps: int, batch: int,
        precision: torch.dtype | None = None, channels_last: bool = True,
    ):  # fmt: skip
        generator = copy.deepcopy(generator).requires_grad_(False)
        prefix, tail = halves(generator, at)
        self.state = next(discriminator.parameters()).dtype
        self.precision = precision or self.state
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.prefix = prefix
        self.tail = self._quick(tail)
        self.discriminator = self._quick(copy.deepcopy(discriminator).requires_grad_(False))
        self.step_size, self.max_steps, self.batch = step_size, max_steps, batch
        self.move: Callable[..., Tensor] = self._move
        self.advance: Callable[..., tuple[Tensor, ...]] = self._advance

    def _quick(self, module: nn.Module) -> nn.Module:
        module = fold(bake(copy.deepcopy(module))).to(self.precision)
        return module.to(memory_format=self.layout)  # type: ignore[call-overload]

    def __call__(self, latents: Tensor, threshold: float = math.inf, last_step: Tensor | None = None) -> Refined:
        """Stop a sample when its logit reaches ``threshold`` or after its own ``last_step`` (N,) updates."""
        if threshold == math.inf and last_step is None:
            parts = [self._refine(z) for z in latents.split(self.batch)]
        else:
            last = torch.full((len(latents),), self.max_steps) if last_step is None else last_step.long().cpu()
            pieces = zip(latents.split(self.batch), last.split(self.batch), strict=True)
            parts = [self._refine_until(z, threshold, own) for z, own in pieces]
        return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _start(self, z: Tensor) -> tuple[Tensor, ...]:
        """The activation, then whatever else the tail reads, in the precision of the networks."""
        with torch.no_grad():
            a, *context = _parts(self.prefix(z))
        a = a.contiguous(memory_format=self.layout) if a.dim() == 4 else a
        return (a, *(c.to(self.precision) for c in context))

    def _refine(self, z: Tensor) -> Refined:
        a, *context = self._start(z)
        for _ in range(self.max_steps):
            a = self.move(a, *context)
        images, logits = self._look(a, *context)
        return Refined(images, logits, torch.full((len(z),), self.max_steps, device=z.device))

    def _refine_until(self, z: Tensor, threshold: float, last: Tensor) -> Refined:
        a, *context = self._start(z)
        longest, last = int(last.max()), last.to(a.device)
        steps, moving = torch.zeros_like(last), torch.ones_like(last, dtype=torch.bool)
        limit = torch.full((), threshold, dtype=self.state, device=a.device)
        for _ in range(longest):
            a, steps, moving, images, logits = self.advance(a, steps, moving, last, limit, *context)
            if not bool(moving.any()):
                return Refined(images.to(self.state), logits, steps)
        images, logits = self._look(a, *context)
        return Refined(images, logits, steps)

    def _move(self, a: Tensor, *context: Tensor) -> Tensor:
        grad, _, _ = self._gradient(a, *context)
        return a.sub(grad, alpha=self.step_size)

    def _advance(
        self, a: Tensor, steps: Tensor, moving: Tensor, last: Tensor, threshold: Tensor, *context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One evaluation, and an update of the samples that go on: (a, steps, moving, images and logits at the old a)."""
        grad, logits, images = self._gradient(a, *context)
        moving = moving & (logits < threshold) & (steps < last)
        a = a - self.step_size * grad * moving.to(a.dtype).view(-1, *[1] * (a.dim() - 1))
        return a, steps + moving, moving, images, logits

    def _gradient(self, a: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient of the loss, logits, images)."""
        a = a.detach().requires_grad_()
        loss, (logits, images) = self._loss(a, *context)
        (grad,) = torch.autograd.grad(loss, a)
        return grad, logits.detach(), images.detach()

    def _loss(self, a: Tensor, *context: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        images = self.tail(a.to(self.precision), *context)
        logits = self.discriminator(images).flatten().to(self.state)
        return F.softplus(-logits).sum(), (logits, images)

    def _look(self, a: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            _, (logits, images) = self._loss(a, *context)
        return images.to(self.state), logits


class CompiledLoop(ExpertLoop):
    """B2: the step of a batch as one compiled graph; ``mode`` as torch.compile takes it ("reduce-overhead" on a GPU)."""

    def __init__(self, *args: object, mode: str | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._compiled_move = torch.compile(self._move, mode=mode, dynamic=False, fullgraph=True)
        self._compiled_advance = torch.compile(self._advance, mode=mode, dynamic=False, fullgraph=True)
        self.move, self.advance = self._replay_move, self._replay_advance

    def _gradient(self, a: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # torch.compile traces this form of the gradient into the same graph as the rest of the step
        grad, (_, (logits, images)) = torch.func.grad_and_value(self._loss, has_aux=True)(a, *context)
        return grad, logits, images

    @torch.no_grad()
    def _replay_move(self, a: Tensor, *context: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled_move(a, *context).clone()  # a CUDA graph's outputs are overwritten by its next replay

    @torch.no_grad()
    def _replay_advance(self, *given: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(t.clone() for t in self._compiled_advance(*given))


def _parts(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a prefix returned, as a tuple."""
    return found if isinstance(found, tuple) else (found,)


def bake(module: nn.Module) -> nn.Module:
    """``module``, whose parametrized tensors (spectral norm) have become plain parameters; not shared with a deepcopy.

    Not torch's remove_parametrizations: it takes the parametrization from the class, which copies share.
    """
    module.eval()
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            names = list(layer.parametrizations)  # type: ignore[arg-type, union-attr]
            values = {name: getattr(layer, name).detach().clone() for name in names}
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            for name, value in values.items():
                layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


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
