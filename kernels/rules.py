"""The update rules in Triton: formulas only. The PyTorch formulas in ``fastrefine.samplers`` are their specification.

observe  slots at once: takes in a finite evaluation (loss inf for a trial that is to be rejected) -> accept, scalars
start    slots at once: the scalars of samples that enter
propose  one slot's block of features: the next activation from the standing position and the (clipped) gradient

``hyper`` points to the rule's hyper-parameters in float64, cast on load: nothing is baked into a kernel.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface


@dataclass(frozen=True)
class FusedRule:
    """What the skeleton needs of a rule; the functions are passed to the kernels as constexpr."""

    propose: KernelInterface
    observe: KernelInterface
    start: KernelInterface
    scalars: int = 0
    vectors: int = 0
    rejects: bool = False


@triton.jit
def observe_all(logit, loss, first, s0, s1, hyper, DTYPE: tl.constexpr):
    return first | True, s0, s1


@triton.jit
def start_zero(reference_logit, hyper, DTYPE: tl.constexpr):
    return reference_logit * 0, reference_logit * 0


@triton.jit
def sgd(a, g, accept, v, w, s0, s1, logit, step, hyper, DTYPE: tl.constexpr):
    return a - tl.load(hyper).to(DTYPE) * g, v, w


@triton.jit
def backtracking_observe(logit, loss, first, s0, s1, hyper, DTYPE: tl.constexpr):
    """s0: loss of the best point, s1: its step size."""
    accept = first | (loss <= s0 + tl.load(hyper + 4).to(DTYPE))
    size = tl.load(hyper)
    grown = tl.minimum(s1 * tl.load(hyper + 1).to(DTYPE), (tl.load(hyper + 3) * size).to(DTYPE))
    other = tl.where(accept, grown, s1 * tl.load(hyper + 2).to(DTYPE))
    return accept, tl.where(accept, loss, s0), tl.where(first, s1, other)


@triton.jit
def backtracking_start(reference_logit, hyper, DTYPE: tl.constexpr):
    zero = tl.zeros_like(reference_logit)
    return zero, zero + tl.load(hyper).to(DTYPE)


@triton.jit
def backtracking(a, g, accept, v, w, s0, s1, logit, step, hyper, DTYPE: tl.constexpr):
    """v: gradient at the best point."""
    v = tl.where(accept, g, v)
    return a - s1 * v, v, w


@triton.jit
def adaptive_start(reference_logit, hyper, DTYPE: tl.constexpr):
    """s0: s(d*) of the sample's real reference."""
    return tl.sigmoid(reference_logit), reference_logit * 0


@triton.jit
def adaptive(a, g, accept, v, w, s0, s1, logit, step, hyper, DTYPE: tl.constexpr):
    lead = s0 - tl.sigmoid(logit)
    return a - tl.load(hyper).to(DTYPE) * tl.where(lead < 0, 0.0, lead) * g, v, w


@triton.jit
def momentum(a, g, accept, v, w, s0, s1, logit, step, hyper, DTYPE: tl.constexpr):
    """v: velocity."""
    v = tl.load(hyper + 1).to(DTYPE) * v + tl.load(hyper).to(DTYPE) * g
    return a - v, v, w


@triton.jit
def adam(a, g, accept, v, w, s0, s1, logit, step, hyper, DTYPE: tl.constexpr):
    """v, w: first and second moment; bias correction in float64 by the slot's own step."""
    beta1, beta2 = tl.load(hyper + 1), tl.load(hyper + 2)
    count = (step + 1).to(tl.float64)
    size = (tl.load(hyper) / (1 - tl.exp(count * tl.log(beta1)))).to(DTYPE)
    correction = (1 - tl.exp(count * tl.log(beta2))).to(DTYPE)
    v = beta1.to(DTYPE) * v + (1 - beta1).to(DTYPE) * g
    w = beta2.to(DTYPE) * w + (1 - beta2).to(DTYPE) * g * g
    return a - size * v / (tl.sqrt(w / correction) + tl.load(hyper + 3).to(DTYPE)), v, w


@triton.jit
def ladam_observe(logit, loss, first, s0, s1, hyper, DTYPE: tl.constexpr):
    """s0: smoothed gap between the discriminator's mean on real images and on this sample."""
    gap = tl.load(hyper + 2).to(DTYPE) - tl.sigmoid(logit)
    return first | True, tl.where(first, gap, 0.5 * s0 + 0.5 * gap), s1


@triton.jit
def ladam(a, g, accept, v, w, s0, s1, logit, step, hyper, DTYPE: tl.constexpr):
    first = step == 0
    v = tl.where(first, g, 0.9 * v + 0.1 * g)
    w = tl.where(first, g * g, 0.5 * w + 0.5 * g * g)
    lead = tl.maximum(s0 + 0.5, 0.0)
    return a - tl.load(hyper).to(DTYPE) * (lead * lead) * v / (tl.sqrt(w) + tl.load(hyper + 1).to(DTYPE)), v, w


RULES: dict[str, FusedRule] = {
    "sgd": FusedRule(sgd, observe_all, start_zero),
    "backtracking": FusedRule(backtracking, backtracking_observe, backtracking_start, 2, 1, rejects=True),
    "adaptive": FusedRule(adaptive, observe_all, adaptive_start, scalars=1),
    "momentum": FusedRule(momentum, observe_all, start_zero, vectors=1),
    "adam": FusedRule(adam, observe_all, start_zero, vectors=2),
    "ladam": FusedRule(ladam, ladam_observe, start_zero, scalars=1, vectors=2),
}
