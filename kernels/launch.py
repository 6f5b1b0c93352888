"""Launches of the step kernels on the tensors of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastrefine.samplers.base import Evaluation, Kernel
from fastrefine.slots import Outputs, Pool, Rule, Slots

from .philox import real_type, seed_bits
from .refine_step import refine_apply, refine_decide, refine_reduce
from .rules import RULES

BLOCK = 1024  # features per program


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
        self.hyper.copy_(_hyper(rule, self.kernel))
        self.seed.fill_(seed_bits(rule.seed))


def _kernel(rule: Rule) -> Kernel:
    kernel = rule.sampler.kernel()
    assert kernel is not None and kernel.rule in RULES, kernel
    return kernel


def _hyper(rule: Rule, kernel: Kernel) -> Tensor:
    low, high = kernel.clamp or (0.0, 0.0)
    return torch.tensor([kernel.noise_scale, low, high, rule.max_grad_norm or 0.0, *kernel.hyper], dtype=torch.float64)


def _scratch(slots: Slots, rule: Rule) -> _Scratch:
    known = slots.cache.get("triton")
    if isinstance(known, _Scratch):
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
    slots.cache["triton"] = new
    _check(slots)
    return new


def _check(slots: Slots) -> None:
    for name, tensor in [*vars(slots).items(), *slots.state.items()]:
        if isinstance(tensor, Tensor):
            assert tensor.is_contiguous() and tensor.device == slots.activation.device, name


def _plain(tensor: Tensor, like: Tensor) -> Tensor:
    assert tensor.device == like.device and tensor.dtype == like.dtype, (tensor.device, tensor.dtype, like.dtype)
    return tensor.contiguous()


def refine_step(slots: Slots, evaluation: Evaluation | None, pool: Pool, outputs: Outputs, rule: Rule) -> None:
    """As ``ops.refine_step``, on GPU tensors (CPU tensors under TRITON_INTERPRET=1), for the rules in ``RULES``."""
    own, a = _scratch(slots, rule), slots.activation
    fused, state, unused = RULES[own.kernel.rule], slots.state, own.peak
    (s, f), real = a.shape, real_type(a.dtype)
    scalars = ([state[name] for name in own.kernel.scalars] + [unused, unused])[:2]
    vectors = ([state[name] for name in own.kernel.vectors] + [unused, unused])[:2]
    grad = None if evaluation is None or evaluation.grad is None else _plain(evaluation.grad, a)
    logit = unused if evaluation is None else _plain(evaluation.logit, a)
    loss = unused if evaluation is None else _plain(evaluation.loss, a)
    best, best_logit = (unused, unused) if slots.best is None else (slots.best, slots.best_logit)
    flags: dict[str, Any] = {
        "SCALARS": fused.scalars,
        "NOISE": own.kernel.noise_scale > 0,
        "CLIP": rule.max_grad_norm is not None and grad is not None,
        "KEEP_BEST": slots.best is not None,
        "DTYPE": real,
        "enable_fp_fusion": False,  # the same roundings as the PyTorch formulas
    }
    with torch.cuda.device_of(a):
        if grad is None:
            own.peak.zero_()
        else:
            refine_reduce[(s,)](
                grad, slots.sample_id, slots.step, slots.last_step, own.peak, own.norm, f,
                CLIP=flags["CLIP"], DTYPE=real, BLOCK=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
        refine_decide[(1,)](
            logit, loss, own.peak, own.norm,
            slots.sample_id, slots.source, slots.step, slots.last_step, slots.logit_falls, slots.threshold,
            slots.reference_logit, slots.initial_logit, slots.grad_peak, state["logit"], best_logit, *scalars,
            pool.last_step, pool.threshold, pool.reference_logit, pool.counters,
            outputs.logit, outputs.initial_logit, outputs.steps, outputs.logit_falls, outputs.status,
            own.plan, own.clip, own.hyper, s, len(pool.threshold), len(outputs.status) - 1,
            OBSERVE=fused.observe, START=fused.start, REJECTS=fused.rejects, LOCKSTEP=rule.lockstep,
            EVALUATED=evaluation is not None, LANES=triton.next_power_of_2(s), **flags,
        )  # fmt: skip
        refine_apply[(s, triton.cdiv(f, BLOCK))](
            a, state["position"], unused if grad is None else grad, best, *vectors, *scalars, state["logit"],
            pool.activation, outputs.activation, own.plan, own.clip, own.hyper, own.seed, s, f,
            PROPOSE=fused.propose, VECTORS=fused.vectors, CLAMP=own.kernel.clamp is not None, GRAD=grad is not None,
            BLOCK=BLOCK, **flags,
        )  # fmt: skip
