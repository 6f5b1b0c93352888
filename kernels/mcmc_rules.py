"""The chains on latents in Triton: DDLS, MALA, PCN, HMC; signatures as in ``rules``, formulas as in ``fastrefine.samplers``."""

import triton
import triton.language as tl

from .philox import normal_at, uniform_at


@triton.jit
def energy_grad(trial, g, latent):
    """grad U = grad loss - grad log p0."""
    return g + latent[0] * trial


@triton.jit
def fold(a, latent):
    """(``a`` reflected at the bounds until it lies inside, whether an odd number of times)."""
    bounded = (latent[1] > float("-inf")) & (latent[2] < float("inf"))
    low = tl.where(bounded, latent[1], 0.0)
    high = tl.where(bounded, latent[2], 1.0)
    width = high - low
    distance = a - low
    distance = distance - tl.floor(distance / (2 * width)) * (2 * width)
    odd = distance > width
    folded = tl.where(odd, high - (distance - width), low + distance)
    folded = tl.where(folded < low, low, tl.where(folded > high, high, folded))  # NaN stays
    return tl.where(bounded, folded, a), odd & bounded


@triton.jit
def quadratic(trial, latent):
    """-2 log p0 of each element in float64: infinite outside the box."""
    inside = (trial >= latent[1]) & (trial <= latent[2])
    a = trial.to(tl.float64)
    return tl.where(inside, latent[0].to(tl.float64) * (a * a), float("inf"))


@triton.jit
def ddls(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """pace: eps / 2 and the scale of the noise."""
    a = a - pace[0] * energy_grad(trial, g, latent)
    if NOISE:
        a = a + pace[1] * xi
    return fold(a, latent)[0], vectors


@triton.jit
def metropolis_start(reference_logit, hyper, DTYPE: tl.constexpr):
    zero = tl.zeros_like(reference_logit)
    return zero, zero + tl.load(hyper).to(DTYPE), zero


@triton.jit
def _test(loss, first, step, scalars, sums, uniform, transition, learns, hyper, DTYPE: tl.constexpr):
    """sums: -2 log p0 of the trial, correction of the log ratio. scalars: energy, step size, trials accepted.

    learns: whether the step size is adapted by this trial.
    """
    energy = loss + (0.5 * sums[0]).to(DTYPE)
    log_ratio = (scalars[0] - energy).to(tl.float64) + sums[1]
    log_ratio = tl.where(log_ratio == log_ratio, log_ratio, float("-inf"))
    ends = step % transition == 0
    accept = first | (ends & (tl.log(uniform.to(DTYPE).to(tl.float64)) < log_ratio))
    tests = step // transition
    count = tl.where(tests < 1, 1, tests).to(tl.float64)
    gain = tl.exp(-tl.load(hyper + 3) * tl.log(count)) * (tl.exp(tl.where(log_ratio > 0, 0.0, log_ratio)) - tl.load(hyper + 2))
    least, most = (tl.load(hyper + 4) * tl.load(hyper)).to(DTYPE), (tl.load(hyper + 5) * tl.load(hyper)).to(DTYPE)
    size = scalars[1] * tl.exp(gain).to(DTYPE)
    size = tl.where(size < least, least, tl.where(size > most, most, size))
    adapts = ends & learns & (first == 0) & (step.to(tl.float64) <= tl.load(hyper + 1))
    moved = (accept & (first == 0)).to(DTYPE)
    return accept, (tl.where(accept, energy, scalars[0]), tl.where(adapts, size, scalars[1]), scalars[2] + moved)


@triton.jit
def _global(number, hyper):
    """Whether MALA's transition of this number proposes from the prior, which is normal."""
    every = tl.load(hyper + 6).to(tl.int64)
    return (every > 0) & (number % tl.where(every > 0, every, 1) == 0)


@triton.jit
def mala_sums(a, trial, g, vectors, scalars, element, step, sample_id, latent, seed, hyper, DTYPE: tl.constexpr):
    """log q(z | z') - log q(z' | z) as one sum over elements: no large numbers are subtracted."""
    before, after = vectors[0].to(tl.float64), energy_grad(trial, g, latent).to(tl.float64)
    jump = trial.to(tl.float64) - a.to(tl.float64)
    reverse = 0.5 * (before + after) * (jump - 0.25 * scalars[1].to(tl.float64) * (after - before))
    of_priors = 0.5 * latent[0].to(tl.float64) * jump * (trial.to(tl.float64) + a.to(tl.float64))
    return quadratic(trial, latent), tl.where(_global(step, hyper), of_priors, reverse)


@triton.jit
def mala_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    return _test(loss, first, step, scalars, sums, uniform, 1, _global(step, hyper) == 0, hyper, DTYPE)


@triton.jit
def mala(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: grad U at the standing point."""
    size = scalars[1]
    v = tl.where(accept, energy_grad(trial, g, latent), vectors[0])
    local = a - 0.5 * size * v + tl.sqrt(size) * xi
    return tl.where(_global(step + 1, hyper), xi, local), (v, vectors[1], vectors[2])


@triton.jit
def pcn_sums(a, trial, g, vectors, scalars, element, step, sample_id, latent, seed, hyper, DTYPE: tl.constexpr):
    """The prior is in the proposal: 0, and r(z, z') - r(z', z) without the losses."""
    before, after = vectors[0].to(tl.float64), g.to(tl.float64)
    z, new = a.to(tl.float64), trial.to(tl.float64)
    bent = 0.125 * scalars[1].to(tl.float64) * (after - before) * (z + new + before + after)
    return z * 0, 0.5 * (before + after) * (new - z) - bent


@triton.jit
def pcn_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    return _test(loss, first, step, scalars, sums, uniform, 1, first == first, hyper, DTYPE)


@triton.jit
def pcn(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: gradient of the loss at the standing point."""
    size = scalars[1]
    v = tl.where(accept, g, vectors[0])
    point = ((4 - size) * a - 2 * size * v + 4 * tl.sqrt(size) * xi) / (4 + size)
    return point, (v, vectors[1], vectors[2])


@triton.jit
def _jittered(size, began, sample_id, seed, hyper, DTYPE: tl.constexpr):
    """The step size of the trajectory that began at this step."""
    uniform = uniform_at(tl.load(seed), (began * 0).to(tl.int32), began, sample_id, 3)
    return size * (1 + tl.load(hyper + 7) * (2 * uniform - 1)).to(DTYPE)


@triton.jit
def hmc_sums(a, trial, g, vectors, scalars, element, step, sample_id, latent, seed, hyper, DTYPE: tl.constexpr):
    """Kinetic energy at the start of the trajectory, whose momentum is drawn again, less that at its end."""
    began = step - tl.load(hyper + 6).to(tl.int32)
    began = tl.where(began < 0, 0, began)
    before = normal_at(tl.load(seed), element, began, sample_id, 0, DTYPE).to(tl.float64)
    size = _jittered(scalars[1], began, sample_id, seed, hyper, DTYPE).to(tl.float64)
    after = vectors[1].to(tl.float64) - 0.5 * size * energy_grad(trial, g, latent).to(tl.float64)
    return quadratic(trial, latent), 0.5 * ((before - after) * (before + after))


@triton.jit
def hmc_observe(logit, loss, first, step, scalars, sums, uniform, features, hyper, DTYPE: tl.constexpr):
    return _test(loss, first, step, scalars, sums, uniform, tl.load(hyper + 6).to(tl.int32), first == first, hyper, DTYPE)


@triton.jit
def hmc_pace(scalars, step, sample_id, seed, hyper, DTYPE: tl.constexpr):
    began = step - step % tl.load(hyper + 6).to(tl.int64)
    size = _jittered(scalars[1], began, sample_id, seed, hyper, DTYPE)
    return size, size


@triton.jit
def hmc(
    a, trial, g, xi, accept, vectors, scalars, logit, step, latent, pace, hyper, NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """vectors: grad U at the standing point, momentum. Between its ends a trajectory goes on from the trial.

    pace: its step size.
    """
    size = pace[0]
    begins = step % tl.load(hyper + 6).to(tl.int64) == 0
    force = energy_grad(trial, g, latent)
    v = tl.where(accept, force, vectors[0])
    momentum = tl.where(begins, xi - 0.5 * size * v, vectors[1] - size * force)
    point, turned = fold(tl.where(begins, a, trial) + size * momentum, latent)
    return point, (v, tl.where(turned, -momentum, momentum), vectors[2])
