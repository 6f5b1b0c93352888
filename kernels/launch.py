"""Launches of the step kernels on the tensors of a run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastrefine.ops.refine_step import baked
from fastrefine.samplers.base import Evaluation, Kernel
from fastrefine.slots import Outputs, Pool, Rule, Slots

from .philox import real_type, seed_bits
from .refine_step import refine_apply, refine_decide, refine_reduce
from .rules import RULES
from .variants import BLOCK, VIEWS, Variant, channel_tile, lanes, warps


@dataclass(eq=False)
class _Scratch:
    """What a run needs besides its own tensors; written in place only: a captured graph goes on reading it."""

    rule: Rule
    kernel: Kernel
    hyper: Tensor  # (4 + n,) float64: noise scale, clamp low, clamp high, max_grad_norm, the rule's own
    seed: Tensor  # () int64
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
        self.seed.fill_(seed_bits(rule.seed))


def _kernel(rule: Rule) -> Kernel:
    kernel = rule.sampler.kernel()
    assert kernel is not None and kernel.rule in RULES, kernel
    return kernel


def _hyper(rule: Rule, kernel: Kernel) -> Tensor:
    low, high = kernel.clamp or (0.0, 0.0)
    return torch.tensor([kernel.noise_scale, low, high, rule.max_grad_norm or 0.0, *kernel.hyper], dtype=torch.float64)


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
        plan=torch.zeros(5, s, dtype=torch.int64, device=a.device),
        peak=a.new_zeros(s), norm=a.new_zeros(s, dtype=torch.float64), clip=a.new_ones(s),
    )  # fmt: skip
    _check(slots)
    kinds[kind] = new
    return new


def _check(slots: Slots) -> None:
    for name, tensor in [*vars(slots).items(), *slots.state.items()]:
        if isinstance(tensor, Tensor):
            assert tensor.is_contiguous() and tensor.device == slots.activation.device, name
    assert slots.view is None or slots.view.dtype in VIEWS[slots.activation.dtype], slots.view.dtype


def _plain(tensor: Tensor, like: Tensor) -> Tensor:
    assert tensor.device == like.device and tensor.dtype == like.dtype, (tensor.device, tensor.dtype, like.dtype)
    assert tensor.shape == like.shape, (tensor.shape, like.shape)
    return tensor.contiguous()


def _variant(slots: Slots, rule: Rule, kernel: Kernel, evaluation: Evaluation | None) -> Variant:
    channels = slots.view_channels
    return Variant(
        kernel.rule, kernel.noise_scale > 0, kernel.clamp is not None, rule.max_grad_norm is not None,
        slots.best is not None, rule.lockstep, evaluation is not None,
        evaluation is not None and evaluation.grad is not None, slots.view is not None,
        channel_tile(channels, slots.activation.shape[1] // channels) if channels else 0,
    )  # fmt: skip


def refine_step(slots: Slots, evaluation: Evaluation | None, pool: Pool, outputs: Outputs, rule: Rule) -> None:
    """As ``ops.refine_step``, on GPU tensors (CPU tensors under TRITON_INTERPRET=1), for the rules in ``RULES``."""
    own, a = _scratch(slots, rule), slots.activation
    state, unused, view = slots.state, own.peak, a if slots.view is None else slots.view
    variant = _variant(slots, rule, own.kernel, evaluation)
    (s, f), real = a.shape, real_type(a.dtype)
    scalars = ([state[name] for name in own.kernel.scalars] + [unused, unused])[:2]
    vectors = ([state[name] for name in own.kernel.vectors] + [unused, unused])[:2]
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
        if variant.grad:
            refine_reduce[(s,)](
                grad, slots.sample_id, slots.step, slots.last_step, own.peak, own.norm, f,
                DTYPE=real, **variant.reduce, **exact,
            )  # fmt: skip
        refine_decide[(1,)](
            logit, loss, own.peak, own.norm,
            slots.sample_id, slots.source, slots.step, slots.last_step, slots.logit_falls, slots.threshold,
            slots.reference_logit, slots.initial_logit, slots.grad_peak, state["logit"], best_logit, *scalars,
            pool.last_step, pool.threshold, pool.reference_logit, pool.counters,
            outputs.logit, outputs.initial_logit, outputs.steps, outputs.logit_falls, outputs.status,
            own.plan, own.clip, own.hyper, s, len(pool.threshold), len(outputs.status) - 1,
            DTYPE=real, LANES=width, num_warps=warps(width), **variant.decide, **exact,
        )  # fmt: skip
        refine_apply[(s, blocks)](
            a, view, state["position"], grad, best, *vectors, *scalars, state["logit"],
            pool.activation, outputs.activation, own.plan, own.clip, own.hyper, own.seed, s, f, channels, pixels,
            DTYPE=real, **variant.apply, **exact,
        )  # fmt: skip
