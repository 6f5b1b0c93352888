"""Philox noise in Triton; specification: ``fastrefine.noise``."""

import torch
import triton
import triton.language as tl


@triton.jit
def _sin_cos(x):
    """Taylor series for |x| <= pi / 4, exact to rounding in float64; libdevice's reduction of large x is not needed."""
    t = x * x
    sine = x * 0 + 1.0
    cosine = sine
    for k in tl.static_range(16, 0, -2):
        sine = 1.0 - sine * t * (1.0 / (k * (k + 1)))
        cosine = 1.0 - cosine * t * (1.0 / (k * (k - 1)))
    return x * sine, cosine


@triton.jit
def normal_at(seed, element, step, sample_id, stream, DTYPE: tl.constexpr):
    """Standard normals of the elements (int32 lanes) of one sample; seed int64, step and sample_id scalars.

    u = m 2^-24 with m odd is exact in float32. Quarter turns are split off in integers, so that float32 angles lose
    nothing: against the float64 reference the error stays under 1e-6.
    """
    block = (element // 4).to(tl.uint32)
    zero = block * 0
    r0, r1, r2, r3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero + sample_id.to(tl.uint32), zero + stream)
    lane = element % 4
    length = (tl.where(lane >= 2, r2, r0) >> 9).to(tl.int32) * 2 + 1
    angle = (tl.where(lane >= 2, r3, r1) >> 9).to(tl.int32) * 2 + 1
    square = -2.0 * tl.log(length.to(DTYPE) * 5.9604644775390625e-08)
    if tl.float32 == DTYPE:
        radius = tl.sqrt_rn(square)  # tl.sqrt of float32 is approximate: at 5.77 its error alone is 7e-7
    else:
        radius = tl.sqrt(square)
    quarter = (angle + 2097152) >> 22
    x = (angle - (quarter << 22)).to(DTYPE) * 3.7450702829239286e-07  # 2 pi 2^-24
    quarter += 3 * (lane & 1)  # sin t = cos(t + 3 pi / 2)
    sine, cosine = _sin_cos(x)
    wave = tl.where((quarter & 1) != 0, -sine, cosine)
    return radius * tl.where((quarter & 2) != 0, -wave, wave)


@triton.jit
def uniform_at(seed, element, step, sample_id, stream):
    """Uniforms in (0, 1), float64, of the elements (int32 lanes) of one sample, or of the same element of many."""
    block = (element // 4).to(tl.uint32)
    zero = block * 0
    r0, r1, r2, r3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero + sample_id.to(tl.uint32), zero + stream)
    lane = element % 4
    word = tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3))
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


def real_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the state's type."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


def seed_bits(seed: int) -> int:
    """The 64-bit key as a signed integer, as kernels and an int64 tensor take it."""
    return (seed & (2**64 - 1)) - ((seed & 2**63) << 1)
