"""The update rules in Triton: formulas only. The PyTorch formulas in ``fastrefine.samplers`` are their specification.

sums     one slot's block of features: what each element adds to the sums (float64) that observe gets
observe  slots at once: takes in a finite evaluation (loss inf for a trial that is to be rejected) -> accept, scalars
start    slots at once: the scalars of samples that enter
pace     one slot: two numbers of its own for propose, in this step
propose  one slot's block of features: the next activation and the vectors, from the standing position ``a``, the trial and
         the (clipped) gradient ``g`` there, and normals ``xi`` where NOISE

vectors, scalars: three each, in the order of the sampler's ``Kernel``; what is over means nothing. latent: precision, low
and high of each element. pace: the schedule's numbers of this step, or what the rule's own function gives. ``hyper`` points
to the rule's hyper-parameters in float64, cast on load, ``seed`` to the run's: nothing is baked into a kernel.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from . import mcmc_rules as mcmc


@dataclass(frozen=True)
class FusedRule:
    """What the skeleton needs of a rule; the functions are passed to the kernels as constexpr."""

    propose: KernelInterface
    observe: KernelInterface
    start: KernelInterface
    scalars: int = 0
    vectors: int = 0
    rejects: bool = False
    sums: KernelInterface | None = None
    terms: int = 0  # numbers that ``sums`` returns
    pace: KernelInterface | None = None
    tests: bool = False  # reads a uniform; a last gradient counts, and that of a trial that is not finite is 0
    schedule: bool = False
    moves: bool = False  # without a gradient of D too: by the prior
    late: bool = False  # the sampler changes its numbers in ``propose``: a sample retires with those before ``observe``


@triton.jit
def observe_all(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    return first | True, scalars


@triton.jit
def start_zero(reference_logit, hyper, DTYPE: tl.constexpr):
    zero = tl.zeros_like(reference_logit)
    return zero, zero, zero


@triton.jit
def sgd(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    a = a - tl.load(hyper).to(DTYPE) * g
    if NOISE:
        a += tl.load(hyper + 1).to(DTYPE) * xi
    return a, vectors


@triton.jit
def backtracking_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    """scalars: loss of the best point, its step size."""
    accept = first | (loss <= scalars[0] + tl.load(hyper + 4).to(DTYPE))
    size = tl.load(hyper)
    grown = tl.minimum(scalars[1] * tl.load(hyper + 1).to(DTYPE), (tl.load(hyper + 3) * size).to(DTYPE))
    other = tl.where(accept, grown, scalars[1] * tl.load(hyper + 2).to(DTYPE))
    return accept, (tl.where(accept, loss, scalars[0]), tl.where(first, scalars[1], other), scalars[2])


@triton.jit
def backtracking_start(reference_logit, hyper, DTYPE: tl.constexpr):
    zero = tl.zeros_like(reference_logit)
    return zero, zero + tl.load(hyper).to(DTYPE), zero


@triton.jit
def backtracking(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: gradient at the best point."""
    v = tl.where(accept, g, vectors[0])
    return a - scalars[1] * v, (v, vectors[1], vectors[2])


@triton.jit
def barzilai_borwein_sums(a, trial, g, vectors, scalars, element, step, sample_id, latent, seed, hyper, DTYPE: tl.constexpr):
    """s's, s'y of the last move."""
    move = trial.to(tl.float64) - a.to(tl.float64)
    return move * move, move * (g.to(tl.float64) - vectors[0].to(tl.float64))


@triton.jit
def barzilai_borwein_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    """scalars: loss of the best point, its step size. hyper: size, widen, shrink, least, most, largest, slack."""
    accept = first | (loss <= scalars[0] + tl.load(hyper + 6).to(DTYPE))
    size = scalars[1].to(tl.float64)
    known = (sums[1] > 0) & (sums[1] < float("inf"))
    fitted = tl.where(known, sums[0] / tl.where(known, sums[1], 1.0), tl.load(hyper + 1) * size)
    fitted = tl.minimum(tl.maximum(fitted, tl.load(hyper + 3) * size), tl.load(hyper + 4) * size)
    fitted = tl.minimum(fitted, tl.load(hyper + 5) * tl.load(hyper))
    other = tl.where(accept, fitted, tl.load(hyper + 2) * size).to(DTYPE)
    return accept, (tl.where(accept, loss, scalars[0]), tl.where(first, scalars[1], other), scalars[2])


@triton.jit
def adaptive_start(reference_logit, hyper, DTYPE: tl.constexpr):
    """scalars: s(d*) of the sample's real reference."""
    zero = tl.zeros_like(reference_logit)
    return tl.sigmoid(reference_logit), zero, zero


@triton.jit
def adaptive(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    lead = scalars[0] - tl.sigmoid(logit)
    return a - tl.load(hyper).to(DTYPE) * tl.where(lead < 0, 0.0, lead) * g, vectors


@triton.jit
def momentum(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: velocity."""
    v = tl.load(hyper + 1).to(DTYPE) * vectors[0] + tl.load(hyper).to(DTYPE) * g
    return a - v, (v, vectors[1], vectors[2])


@triton.jit
def _adam(g, v, w, step, hyper, DTYPE: tl.constexpr):
    """(what Adam takes off, both moments); bias correction in float64 by the slot's own step."""
    beta1, beta2 = tl.load(hyper + 1), tl.load(hyper + 2)
    count = (step + 1).to(tl.float64)
    size = (tl.load(hyper) / (1 - tl.exp(count * tl.log(beta1)))).to(DTYPE)
    correction = (1 - tl.exp(count * tl.log(beta2))).to(DTYPE)
    v = beta1.to(DTYPE) * v + (1 - beta1).to(DTYPE) * g
    w = beta2.to(DTYPE) * w + (1 - beta2).to(DTYPE) * g * g
    return size * v / (tl.sqrt(w / correction) + tl.load(hyper + 3).to(DTYPE)), v, w


@triton.jit
def adam(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: first and second moment."""
    update, v, w = _adam(g, vectors[0], vectors[1], step, hyper, DTYPE)
    return a - update, (v, w, vectors[2])


@triton.jit
def ladam_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    """scalars: smoothed gap between the discriminator's mean on real images and on this sample."""
    gap = tl.load(hyper + 2).to(DTYPE) - tl.sigmoid(logit)
    return first | True, (tl.where(first, gap, 0.5 * scalars[0] + 0.5 * gap), scalars[1], scalars[2])


@triton.jit
def ladam(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    first = step == 0
    v = tl.where(first, g, 0.9 * vectors[0] + 0.1 * g)
    w = tl.where(first, g * g, 0.5 * vectors[1] + 0.5 * g * g)
    lead = tl.maximum(scalars[0] + 0.5, 0.0)
    a = a - tl.load(hyper).to(DTYPE) * (lead * lead) * v / (tl.sqrt(w) + tl.load(hyper + 1).to(DTYPE))
    return a, (v, w, vectors[2])


@triton.jit
def dot_sums(a, trial, g, vectors, scalars, element, step, sample_id, latent, seed, hyper, DTYPE: tl.constexpr):
    """|offset|^2, grad . z, offset . z, z . z."""
    origin = tl.where(step == 0, trial, vectors[0])
    offset, z = (trial - origin + tl.load(hyper + 5).to(DTYPE)).to(tl.float64), trial.to(tl.float64)
    return offset * offset, g.to(tl.float64) * z, offset * z, z * z


@triton.jit
def dot_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    """scalars: 1 / |offset|, the radial part of the direction."""
    mode = tl.load(hyper + 6)  # 0: none, 1: radial, 2: published
    pull = 1 / tl.sqrt(sums[0])
    along = sums[1] * tl.load(hyper + 4) + sums[2] * pull
    length = tl.where(mode == 2, tl.sqrt(features.to(tl.float64)), sums[3])
    radial = tl.where(length == 0, 0.0, along / tl.where(length == 0, 1.0, length))
    return first | True, (pull.to(DTYPE), tl.where(mode == 0, 0.0, radial).to(DTYPE), scalars[2])


@triton.jit
def _dot(a, g, origin, scalars, hyper, DTYPE: tl.constexpr):
    """Gradient of the energy without its radial part."""
    offset = a - origin + tl.load(hyper + 5).to(DTYPE)
    return g * tl.load(hyper + 4).to(DTYPE) + offset * scalars[0] - a * scalars[1]


@triton.jit
def _clip(a, latent):
    return tl.where(a < latent[1], latent[1], tl.where(a > latent[2], latent[2], a))  # NaN stays


@triton.jit
def dot_adam(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: where the sample began, first and second moment."""
    origin = tl.where(step == 0, a, vectors[0])
    update, v, w = _adam(_dot(a, g, origin, scalars, hyper, DTYPE), vectors[1], vectors[2], step, hyper, DTYPE)
    return _clip(a - update, latent), (origin, v, w)


@triton.jit
def dot_sgd(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    origin = tl.where(step == 0, a, vectors[0])
    update = tl.load(hyper).to(DTYPE) * _dot(a, g, origin, scalars, hyper, DTYPE)
    return _clip(a - update, latent), (origin, vectors[1], vectors[2])


RULES: dict[str, FusedRule] = {
    "sgd": FusedRule(sgd, observe_all, start_zero),
    "backtracking": FusedRule(backtracking, backtracking_observe, backtracking_start, 2, 1, rejects=True),
    "barzilai_borwein": FusedRule(
        backtracking,
        barzilai_borwein_observe,
        backtracking_start,
        2,
        1,
        rejects=True,
        sums=barzilai_borwein_sums,
        terms=2,
        late=True,
    ),
    "adaptive": FusedRule(adaptive, observe_all, adaptive_start, scalars=1),
    "momentum": FusedRule(momentum, observe_all, start_zero, vectors=1),
    "adam": FusedRule(adam, observe_all, start_zero, vectors=2),
    "ladam": FusedRule(ladam, ladam_observe, start_zero, scalars=1, vectors=2, late=True),
    "ddls": FusedRule(mcmc.ddls, observe_all, start_zero, schedule=True),
    "mala": FusedRule(
        mcmc.mala,
        mcmc.mala_observe,
        mcmc.metropolis_start,
        3,
        1,
        rejects=True,
        sums=mcmc.mala_sums,
        terms=2,
        tests=True,
        moves=True,
    ),
    "pcn": FusedRule(
        mcmc.pcn,
        mcmc.pcn_observe,
        mcmc.metropolis_start,
        3,
        1,
        rejects=True,
        sums=mcmc.pcn_sums,
        terms=2,
        tests=True,
        moves=True,
    ),
    "hmc": FusedRule(
        mcmc.hmc,
        mcmc.hmc_observe,
        mcmc.metropolis_start,
        3,
        2,
        rejects=True,
        sums=mcmc.hmc_sums,
        terms=2,
        pace=mcmc.hmc_pace,
        tests=True,
        moves=True,
    ),
    "dot_adam": FusedRule(dot_adam, dot_observe, start_zero, 2, 3, sums=dot_sums, terms=4, moves=True),
    "dot_sgd": FusedRule(dot_sgd, dot_observe, start_zero, 2, 1, sums=dot_sums, terms=4, moves=True),
}
