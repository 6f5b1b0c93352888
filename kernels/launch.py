"""Launches of the step kernels on the tensors of a run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastrefine.ops.registry import baked
from fastrefine.ops.slots import Outputs, Pool, Rule, Slots
from fastrefine.samplers.base import Evaluation, Kernel

from .philox import real_type, seed_bits
from .refine_step import refine_apply, refine_decide, refine_reduce
from .rules import RULES
from .variants import BLOCK, VIEWS, Variant, channel_tile, lanes, warps


@dataclass(eq=False)
class _Scratch:
    """What a run needs besides its own tensors; written in place only: a captured graph goes on reading it."""

    rule: Rule
    kernel: Kernel
    hyper: Tensor  # (4 + n,) float64: clamp low, clamp high, max_grad_norm, steps of a transition, the rule's own
    seed: Tensor  # () int64
    latent: Tensor  # (3, F) real, or nothing
    schedule: Tensor  # (2, K) real, or nothing
    sums: Tensor  # (4, S) float64
    plan: Tensor  # (5, S) int64
    peak: Tensor  # (S,) real
    norm: Tensor  # (S,) float64
    clip: Tensor  # (S,) real

    def load(self, rule: Rule) -> None:
        """Take another rule of the same kind: new numbers and seed, the same kernels."""
        self.rule, self.kernel = rule, _kernel(rule)
        hyper = _hyper(rule, self.kernel)
        if self.hyper.is_cuda:
            hyper = hyper.pin_memory()  # from pageable memory the copy would wait for the device
        self.hyper.copy_(hyper, non_blocking=True)
        for own, table in ((self.latent, self.kernel.latent), (self.schedule, self.kernel.schedule)):
            if table is not None:
                own.copy_(table)
        self.seed.fill_(seed_bits(rule.seed))


def _kernel(rule: Rule) -> Kernel:
    kernel = rule.sampler.kernel()
    assert kernel is not None and kernel.rule in RULES, kernel
    assert RULES[kernel.rule].tests == rule.sampler.traits.needs_last_gradient, kernel
    assert RULES[kernel.rule].schedule == (kernel.schedule is not None), kernel
    return kernel


def _hyper(rule: Rule, kernel: Kernel) -> Tensor:
    head = *(kernel.clamp or (0.0, 0.0)), rule.max_grad_norm or 0.0, rule.sampler.traits.transition_steps
    return torch.tensor([*head, *kernel.hyper], dtype=torch.float64)


def _scratch(slots: Slots, rule: Rule) -> _Scratch:
    """Of each kind of rule its own, and all are kept: a captured graph may still read an older one."""
    kinds: dict[Hashable, _Scratch] = slots.cache.setdefault("triton", {})  # type: ignore[assignment]
    kind = baked(rule, "triton")
    if (known := kinds.get(kind)) is not None:
        if known.rule != rule:
            known.load(rule)
        return known
    a, s = slots.activation, len(slots.activation)
    kernel = _kernel(rule)
    new = _Scratch(
        rule, kernel,
        hyper=_hyper(rule, kernel).to(a.device),
        seed=torch.tensor(seed_bits(rule.seed), device=a.device),
        latent=_own(kernel.latent, a, (3, a.shape[1])), schedule=_own(kernel.schedule, a, (2, -1)),
        sums=a.new_zeros(4, s, dtype=torch.float64),
        plan=torch.zeros(5, s, dtype=torch.int64, device=a.device),
        peak=a.new_zeros(s), norm=a.new_zeros(s, dtype=torch.float64), clip=a.new_ones(s),
    )  # fmt: skip
    _check(slots, kernel)
    kinds[kind] = new
    return new


def _own(table: Tensor | None, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """A copy of the table that is the scratch's own."""
    if table is None:
        return like.new_zeros(0)
    assert table.dtype == like.dtype and table.device == like.device, (table.dtype, table.device)
    return table.reshape(shape).clone(memory_format=torch.contiguous_format)


def _check(slots: Slots, kernel: Kernel) -> None:
    for name, tensor in [*vars(slots).items(), *slots.state.items()]:
        if isinstance(tensor, Tensor):
            assert tensor.is_contiguous() and tensor.device == slots.activation.device, name
    assert slots.view is None or slots.view.dtype in VIEWS[slots.activation.dtype], slots.view.dtype
    names = slots.scalar_names, slots.vector_names
    assert names == (kernel.scalars, kernel.vectors), names
    fused = RULES[kernel.rule]
    assert (len(kernel.scalars), len(kernel.vectors)) == (fused.scalars, fused.vectors), kernel


def _plain(tensor: Tensor, like: Tensor) -> Tensor:
    assert tensor.device == like.device and tensor.dtype == like.dtype, (tensor.device, tensor.dtype, like.dtype)
    assert tensor.shape == like.shape, (tensor.shape, like.shape)
    return tensor.contiguous()


def _variant(slots: Slots, rule: Rule, kernel: Kernel, evaluation: Evaluation | None) -> Variant:
    channels = slots.view_channels
    return Variant(
        kernel.rule, kernel.noise, kernel.clamp is not None, rule.max_grad_norm is not None, slots.best is not None,
        rule.lockstep, evaluated=evaluation is not None, grad=evaluation is not None and evaluation.grad is not None,
        view=slots.view is not None, latent=kernel.latent is not None,
        channel_tile=channel_tile(channels, slots.activation.shape[1] // channels) if channels else 0,
    )  # fmt: skip


def refine_step(slots: Slots, evaluation: Evaluation | None, pool: Pool, outputs: Outputs, rule: Rule) -> None:
    """As ``ops.refine_step``, on GPU tensors (CPU tensors under TRITON_INTERPRET=1), for the rules in ``RULES``."""
    own, a = _scratch(slots, rule), slots.activation
    state, unused, view = slots.state, own.peak, a if slots.view is None else slots.view
    variant = _variant(slots, rule, own.kernel, evaluation)
    (s, f), real = a.shape, real_type(a.dtype)
    assert variant.grad or evaluation is None or not rule.sampler.traits.needs_last_gradient, rule.sampler
    logit, loss, grad = unused, unused, view  # of the types that they have when they are read
    if evaluation is not None:
        logit, loss = _plain(evaluation.logit, state["logit"]), _plain(evaluation.loss, state["logit"])
        if evaluation.grad is not None:
            grad = _plain(evaluation.grad, view)
    best, best_logit = (unused, unused) if slots.best is None else (slots.best, slots.best_logit)
    tile = variant.channel_tile
    channels, pixels = (slots.view_channels, f // slots.view_channels) if tile else (0, 0)
    blocks = triton.cdiv(channels, tile) * triton.cdiv(pixels, BLOCK // tile) if tile else triton.cdiv(f, BLOCK)
    width = lanes(s)
    exact = {"enable_fp_fusion": False}  # the same roundings as the PyTorch formulas
    with torch.cuda.device_of(a):
        if variant.reduces:
            refine_reduce[(s,)](
                grad, slots.sample_id, slots.step, slots.last_step, own.peak, own.norm, a, state["position"], slots.vectors,
                slots.scalars, own.latent, own.hyper, own.seed, own.sums, s, f, channels, pixels,
                DTYPE=real, **variant.reduce, **exact,
            )  # fmt: skip
        refine_decide[(1,)](
            logit, loss, own.peak, own.norm,
            slots.sample_id, slots.source, slots.step, slots.last_step, slots.logit_falls, slots.threshold,
            slots.reference_logit, slots.initial_logit, slots.grad_peak, state["logit"], best_logit, slots.scalars,
            pool.last_step, pool.threshold, pool.reference_logit, pool.counters,
            outputs.logit, outputs.initial_logit, outputs.steps, outputs.logit_falls, outputs.status,
            outputs.scalars, own.plan, own.clip, own.hyper, own.seed, own.sums,
            s, len(pool.threshold), len(outputs.status) - 1, f,
            DTYPE=real, LANES=width, num_warps=warps(width), **variant.decide, **exact,
        )  # fmt: skip
        refine_apply[(s, blocks)](
            a, view, state["position"], grad, best, slots.vectors, slots.scalars, state["logit"], own.latent, own.schedule,
            pool.activation, outputs.activation, own.plan, own.clip, own.hyper, own.seed,
            s, f, channels, pixels, own.schedule.shape[-1],
            DTYPE=real, **variant.apply, **exact,
        )  # fmt: skip
