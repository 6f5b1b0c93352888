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
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from benchmarks.workloads import halves


class Refined(NamedTuple):
    """images (N, ...), logits (N,), steps (N,), in the order of the latents."""

    images: Tensor
    logits: Tensor
    steps: Tensor


class HandCut(nn.Module):
    """Networks of ``workloads``, cut by hand. ``prefix(z)`` gives (a, *context), a call with these (images, logits)."""

    stepped = ("tail", "discriminator")  # what a step runs

    def __init__(self, generator: nn.Module, discriminator: nn.Module, at: str):
        super().__init__()
        self.prefix, self.tail = halves(generator, at)
        self.discriminator, self.place = discriminator, None

    def forward(self, a: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        images = self.tail(a, *context)
        return images, self.discriminator(images).flatten()


class Hooked(nn.Module):
    """Networks of anyone: a hook puts ``a`` in the place of a module's output. That module and those that ended before
    do not run again.

    generate: (generator, z, **inputs) -> images. discriminate: (discriminator, images, **inputs) -> logits (N, ...).
    names: of the inputs, which follow the latents. The context of a step is (z, *inputs).
    """

    stepped = ("generator", "discriminator")

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, at: str, generate: Callable[..., Tensor],
        discriminate: Callable[..., Tensor], names: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__()
        self.generator, self.discriminator, self.at = generator, discriminator, at
        self.generate, self.discriminate, self.names = generate, discriminate, names
        self.given: Tensor | None = None  # what the hook puts there; None lets the output pass
        self.seen: Tensor | None = None
        self.once: list[nn.Module] = []  # modules that give what they gave in the prefix
        self.hooked = False

    @property
    def place(self) -> nn.Module | None:
        """The module whose output is refined, if any."""
        return self.generator.get_submodule(self.at) if self.at not in ("input", "output") else None

    def prefix(self, z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(a, z, *inputs); a in the dtype of z."""
        own = z.to(next(self.generator.parameters()).dtype)
        for module in self.once:
            del module.forward
        self.once, self.given = [], None
        if self.at == "input":
            return z, own, *inputs
        if self.place is not None and not self.hooked:
            self.place.register_forward_hook(self._put)
            self.hooked = True
        ended: dict[nn.Module, list[Any]] = {}
        places: list[Any] = []

        def end(module: nn.Module, _: Any, output: Any) -> None:
            places.extend([output] if module is self.place else [])
            if not places:
                ended.setdefault(module, []).append(output)

        handles = [module.register_forward_hook(end) for module in self.generator.modules()]
        images = self.generate(self.generator, own, **dict(zip(self.names, inputs, strict=True)))
        for handle in handles:
            handle.remove()
        if self.at == "output":
            return images.to(z.dtype), own, *inputs
        assert self.seen is not None and self.place is not None
        inside = {child for module in self.place.modules() for child in module.modules()}
        self.once = [module for module, outputs in ended.items() if len(outputs) == 1 and module not in inside]
        for module in self.once:
            module.forward = functools.partial(_kept, ended[module][0])  # type: ignore[method-assign]
        if len(places) == 1:  # nor does the module itself run
            self.place.forward = functools.partial(self._given, places[0])  # type: ignore[method-assign]
            self.once.append(self.place)
        return self.seen.to(z.dtype), own, *inputs

    def _put(self, _: nn.Module, __: Any, output: Any) -> Any:
        if self.given is None:
            self.seen = output[0] if isinstance(output, tuple) else output
            return None
        return self._given(output)

    def _given(self, output: Any, *_: Any, **__: Any) -> Any:
        """What the place gave, with the activation in it."""
        return (self.given, *output[1:]) if isinstance(output, tuple) else self.given

    def forward(self, a: Tensor, z: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        given, images = dict(zip(self.names, inputs, strict=True)), a
        if self.at != "output":
            self.given = a
            images = self.generate(self.generator, a if self.at == "input" else z, **given)
        # an in-place layer may work on what it is given, and at the output that is the activation
        logits = self.discriminate(self.discriminator, images.clone() if self.at == "output" else images, **given)
        return images, logits.flatten(1).squeeze(1) if logits.dim() > 1 else logits


def _kept(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _mean_loss(logits: Tensor) -> Tensor:
    """The loss of logits (N,), or of maps of logits (N, P), of which each sample has the mean."""
    loss = F.softplus(-logits)
    return loss.sum() if loss.dim() == 1 else loss.mean(1).sum()


def _one(logits: Tensor) -> Tensor:
    return logits if logits.dim() == 1 else logits.mean(1)


class PeersLoop:
    """B0. generator and discriminator are used as they are, in eval mode; their ``.grad`` is filled, as in the peers.

    cut: how they are cut and called. ``inputs`` of a call follow the latents, (N, ...) each.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, at: str, step_size: float, max_steps: int, batch: int,
        cut: Callable[..., Any] = HandCut,
    ):  # fmt: skip
        self.pair = cut(generator, discriminator, at)
        self.step_size, self.max_steps, self.batch = step_size, max_steps, batch

    def __call__(self, latents: Tensor, *inputs: Tensor) -> Refined:
        parts = [self._refine(*given) for given in zip(*(t.split(self.batch) for t in (latents, *inputs)), strict=True)]
        return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _refine(self, z: Tensor, *inputs: Tensor) -> Refined:
        with torch.no_grad():
            a, *context = _parts(self.pair.prefix(z, *inputs))
        for _ in range(self.max_steps):
            a = a.detach().requires_grad_()
            loss = _mean_loss(self.pair(a, *context)[1])
            for name in self.pair.stepped:
                getattr(self.pair, name).zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                a = a - self.step_size * a.grad
        with torch.no_grad():
            images, logits = self.pair(a, *context)
        return Refined(images, _one(logits), torch.full((len(z),), self.max_steps, device=z.device))


class ExpertLoop:
    """B1, in ``precision`` and the layout that suits the networks.

    The refined activation stays float32 (float64 for float64 networks). Without a stop nothing is tested and nothing
    masked; with one, "have all stopped?" is asked once per step.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, at: str, step_size: float, max_steps: int, batch: int,
        precision: torch.dtype | None = None, channels_last: bool = True, cut: Callable[..., Any] = HandCut,
    ):  # fmt: skip
        self.state = next(discriminator.parameters()).dtype
        self.precision = precision or self.state
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.pair = cut(*(copy.deepcopy(network).requires_grad_(False) for network in (generator, discriminator)), at)
        for name in self.pair.stepped:
            setattr(self.pair, name, self._quick(getattr(self.pair, name)))
        self.step_size, self.max_steps, self.batch = step_size, max_steps, batch
        self.move: Callable[..., Tensor] = self._move
        self.advance: Callable[..., tuple[Tensor, ...]] = self._advance

    def _quick(self, module: nn.Module) -> nn.Module:
        place = self.pair.place
        if place is None:
            module = copy.deepcopy(module)  # prefix and tail may be parts of one module
        module = fold(bake(module), place).to(self.precision).requires_grad_(False)
        return module.to(memory_format=self.layout)  # type: ignore[call-overload]

    def __call__(
        self, latents: Tensor, *inputs: Tensor, threshold: float = math.inf, last_step: Tensor | None = None
    ) -> Refined:
        """Stop a sample when its logit reaches ``threshold`` or after its own ``last_step`` (N,) updates."""
        if threshold == math.inf and last_step is None:
            parts = [self._refine(*given) for given in zip(*(t.split(self.batch) for t in (latents, *inputs)), strict=True)]
        else:
            last = torch.full((len(latents),), self.max_steps) if last_step is None else last_step.long().cpu()
            pieces = zip(*(t.split(self.batch) for t in (last, latents, *inputs)), strict=True)
            parts = [self._refine_until(threshold, *piece) for piece in pieces]
        return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _start(self, z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The activation, then whatever else the tail reads, in the precision of the networks."""
        with torch.no_grad():
            a, *context = _parts(self.pair.prefix(z, *inputs))
        a = a.contiguous(memory_format=self.layout) if a.dim() == 4 else a
        return (a, *(c.to(self.precision) if c.is_floating_point() else c for c in context))

    def _refine(self, z: Tensor, *inputs: Tensor) -> Refined:
        a, *context = self._start(z, *inputs)
        for _ in range(self.max_steps):
            a = self.move(a, *context)
        images, logits = self._look(a, *context)
        return Refined(images, logits, torch.full((len(z),), self.max_steps, device=z.device))

    def _refine_until(self, threshold: float, last: Tensor, *given: Tensor) -> Refined:
        a, *context = self._start(*given)
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
        images, logits = self.pair(a.to(self.precision), *context)
        logits = logits.to(self.state)
        return _mean_loss(logits), (_one(logits), images)

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


class CompiledForward(ExpertLoop):
    """B2 where the whole step does not compile: the compiled forward pass, whose gradient torch.compile derives."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._loss = torch.compile(self._loss, dynamic=False)  # type: ignore[method-assign]


def _parts(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a prefix returned, as a tuple."""
    return found if isinstance(found, tuple) else (found,)


def bake(module: nn.Module) -> nn.Module:
    """``module``, whose parametrized tensors (spectral norm, weight norm) have become plain parameters.

    Not torch's remove_parametrizations: it takes the parametrization from the class, which copies share.
    """
    module.eval()
    for layer in list(module.modules()):
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                remove_spectral_norm(layer, hook.name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(layer, hook.name)
        if parametrize.is_parametrized(layer):
            names = list(layer.parametrizations)  # type: ignore[arg-type, union-attr]
            values = {name: getattr(layer, name).detach().clone() for name in names}
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            for name, value in values.items():
                layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


def fold(module: nn.Module, place: nn.Module | None = None) -> nn.Module:
    """``module`` with each BatchNorm after a convolution or linear layer of a Sequential folded into it.

    What stands at ``place`` keeps its output. Names stay: an Identity takes the place of a BatchNorm.
    """
    for sequence in [child for child in module.modules() if isinstance(child, nn.Sequential)]:
        for index in range(1, len(sequence)):
            before, norm = sequence[index - 1], sequence[index]
            if place in (before, norm) or getattr(norm, "running_mean", None) is None:
                continue
            if isinstance(norm, nn.BatchNorm2d) and isinstance(before, nn.Conv2d | nn.ConvTranspose2d):
                sequence[index - 1] = fuse_conv_bn_eval(before, norm, transpose=isinstance(before, nn.ConvTranspose2d))
            elif isinstance(norm, nn.BatchNorm1d) and isinstance(before, nn.Linear):
                sequence[index - 1] = fuse_linear_bn_eval(before, norm)
            else:
                continue
            sequence[index] = nn.Identity()
    return module
