"""The step of the engine in three Triton kernels; specification: ``fastrefine.ops.refine_step``.

refine_reduce  a program per slot: largest |gradient| and norm, in a fixed order
refine_decide  one program, a lane per slot: observe, retire, refill; writes the plan (5, S) int64
refine_apply   slots x blocks of features: does what the plan says. One grid that reads and rewrites slot state races.

Numbers that another rule of the same kind may change are read from device memory, never passed: a captured graph goes on
with the new ones. hyper (float64): noise scale, clamp low, clamp high, max_grad_norm, then the rule's own.
"""

import triton
import triton.language as tl

from .philox import normal_at

FLAGS, OUTPUT_ROW, POOL_ROW, SAMPLE_ID, STEP = (tl.constexpr(row) for row in range(5))  # rows of the plan
ACCEPT, BETTER, UPDATE, DONE, TAKE = (tl.constexpr(1 << bit) for bit in range(5))  # bits of its flags


@triton.jit
def refine_reduce(
    grad_ptr, sample_id_ptr, step_ptr, last_step_ptr, peak_ptr, norm_ptr, features,
    CLIP: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """peak (S,): inf where any gradient is not finite, in the state's type. A last gradient is never read: 0."""
    slot = tl.program_id(0).to(tl.int64)
    read = (tl.load(sample_id_ptr + slot) >= 0) & (tl.load(step_ptr + slot) < tl.load(last_step_ptr + slot))
    peak = tl.zeros([BLOCK], DTYPE)
    square = tl.zeros([BLOCK], tl.float64)
    end = tl.where(read, features, 0)
    block = 0
    while block * BLOCK < end:  # NumPy 2.4 breaks range up to a tensor in the interpreter of Triton 3.6
        offset = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + slot * features + offset, mask=offset < features, other=0.0).to(DTYPE)
        size = tl.abs(g)
        peak = tl.maximum(peak, tl.where(size < float("inf"), size, float("inf")))
        if CLIP:
            square += g.to(tl.float64) * g.to(tl.float64)
        block += 1
    tl.store(peak_ptr + slot, tl.max(peak, 0))
    if CLIP:
        tl.store(norm_ptr + slot, tl.sqrt(tl.sum(square, 0)))


@triton.jit(do_not_specialize=["num_slots", "pool_rows", "output_rows"])
def refine_decide(
    trial_logit_ptr, trial_loss_ptr, peak_ptr, norm_ptr,
    sample_id_ptr, source_ptr, step_ptr, last_step_ptr, logit_falls_ptr, threshold_ptr, reference_ptr, initial_ptr,
    grad_peak_ptr, logit_ptr, best_logit_ptr, scalar0_ptr, scalar1_ptr,
    pool_last_step_ptr, pool_threshold_ptr, pool_reference_ptr, counters_ptr,
    out_logit_ptr, out_initial_ptr, out_steps_ptr, out_falls_ptr, out_status_ptr,
    plan_ptr, clip_ptr, hyper_ptr, num_slots, pool_rows, output_rows,
    OBSERVE: tl.constexpr, START: tl.constexpr, SCALARS: tl.constexpr, REJECTS: tl.constexpr, NOISE: tl.constexpr,
    CLIP: tl.constexpr, KEEP_BEST: tl.constexpr, LOCKSTEP: tl.constexpr, EVALUATED: tl.constexpr, GRAD: tl.constexpr,
    DTYPE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, LANES)
    inside = slot < num_slots
    sample_id = tl.load(sample_id_ptr + slot, mask=inside, other=-1)
    live = sample_id >= 0
    flags = tl.zeros([LANES], tl.int64)
    done = live & (sample_id < 0)
    next_id, end_id = tl.load(counters_ptr), tl.load(counters_ptr + 1)
    finished, evaluations = tl.load(counters_ptr + 3), tl.load(counters_ptr + 4)
    iterations = tl.load(counters_ptr + 5)
    step = tl.load(step_ptr + slot, mask=inside, other=0)
    last_step = tl.load(last_step_ptr + slot, mask=inside, other=0)

    if EVALUATED:
        first = step == 0
        last = step >= last_step
        served = live
        peak = tl.zeros([LANES], DTYPE)
        if GRAD:
            peak = tl.load(peak_ptr + slot, mask=inside, other=0.0)
        else:
            served = live & last
        trial = tl.load(trial_logit_ptr + slot, mask=inside, other=0.0)
        loss = tl.load(trial_loss_ptr + slot, mask=inside, other=0.0)
        standing = tl.load(logit_ptr + slot, mask=inside, other=0.0)
        s0 = tl.zeros([LANES], DTYPE)
        s1 = tl.zeros([LANES], DTYPE)
        if SCALARS > 0:
            s0 = tl.load(scalar0_ptr + slot, mask=inside, other=0.0)
        if SCALARS > 1:
            s1 = tl.load(scalar1_ptr + slot, mask=inside, other=0.0)

        met = served & (last == 0) & (peak < float("inf"))
        finite = (tl.abs(trial) < float("inf")) & (tl.abs(loss) < float("inf")) & ((peak < float("inf")) | last)
        bad = served & (finite == 0)
        if REJECTS:
            bad = bad & first
        good = served & (bad == 0)
        grad_peak = tl.load(grad_peak_ptr + slot, mask=inside, other=0.0)
        grad_peak = tl.where(met, tl.maximum(grad_peak, peak), grad_peak)
        falls = tl.load(logit_falls_ptr + slot, mask=inside, other=0)
        falls += (served & (first == 0) & (trial < standing)).to(tl.int32)
        initial = tl.load(initial_ptr + slot, mask=inside, other=0.0)
        initial = tl.where(served & first, trial, initial)

        seen_logit = tl.where(finite, trial, float("-inf"))
        seen_loss = tl.where(finite, loss, float("inf"))
        accept, s0_new, s1_new = OBSERVE(seen_logit, seen_loss, first, s0, s1, hyper_ptr + 4, DTYPE)
        accept = good & accept
        standing = tl.where(accept, trial, tl.where(bad & first, trial, standing))
        better = done  # none
        reported = standing
        if KEEP_BEST:
            best = tl.load(best_logit_ptr + slot, mask=inside, other=0.0)
            better = served & (first | (good & (standing > best)))
            reported = tl.where(better, standing, best)
            tl.store(best_logit_ptr + slot, reported, mask=inside)

        reached = good & (standing >= tl.load(threshold_ptr + slot, mask=inside, other=0.0))
        done = bad | reached | (served & last)
        update = served & (done == 0)
        status = tl.full([LANES], 1, tl.int32)
        if not NOISE:
            status = tl.where(last & (step > 0) & (grad_peak == 0), 3, status)
        status = tl.where(bad, 2, tl.where(reached, 0, status))
        row = tl.where(done, sample_id % output_rows, 0)
        tl.store(out_logit_ptr + row, reported, mask=done)
        tl.store(out_initial_ptr + row, initial, mask=done)
        tl.store(out_steps_ptr + row, step, mask=done)
        tl.store(out_falls_ptr + row, falls, mask=done)
        tl.store(out_status_ptr + row, status, mask=done)
        if CLIP:
            norm = tl.load(norm_ptr + slot, mask=inside, other=0.0)
            limit = tl.load(hyper_ptr + 3)
            tl.store(clip_ptr + slot, tl.where(norm > limit, limit / norm, 1.0).to(DTYPE), mask=inside)

        flags = tl.where(accept, ACCEPT, 0) | tl.where(better, BETTER, 0)
        flags = (flags | tl.where(update, UPDATE, 0) | tl.where(done, DONE, 0)).to(tl.int64)
        tl.store(plan_ptr + OUTPUT_ROW * num_slots + slot, row, mask=inside)
        tl.store(plan_ptr + SAMPLE_ID * num_slots + slot, sample_id, mask=inside)
        tl.store(plan_ptr + STEP * num_slots + slot, step.to(tl.int64), mask=inside)
        finished += tl.sum(done.to(tl.int64), 0)
        evaluations += tl.sum(served.to(tl.int64), 0)
        step_now = step + update.to(tl.int32)
        iterations += 1
    else:
        step_now = step

    empty = inside & ((live == 0) | done)
    may = empty
    if LOCKSTEP:
        may = empty & (slot < tl.where(tl.sum(empty.to(tl.int32), 0) == num_slots, num_slots, 0))
    taken_id = next_id + tl.cumsum(may.to(tl.int64), 0) - 1
    take = may & (taken_id < end_id)
    pool_row = tl.where(take, taken_id % pool_rows, 0)
    now = tl.where(take, taken_id, tl.where(empty, -1, sample_id))
    tl.store(sample_id_ptr + slot, now, mask=inside)
    tl.store(source_ptr + slot, tl.where(take, pool_row, -1), mask=inside)
    tl.store(plan_ptr + FLAGS * num_slots + slot, flags | tl.where(take, TAKE, 0).to(tl.int64), mask=inside)
    tl.store(plan_ptr + POOL_ROW * num_slots + slot, pool_row, mask=inside)

    reference = tl.load(pool_reference_ptr + pool_row, mask=take, other=0.0)
    tl.store(reference_ptr + slot, reference, mask=take)
    tl.store(threshold_ptr + slot, tl.load(pool_threshold_ptr + pool_row, mask=take, other=0.0), mask=take)
    fresh_last_step = tl.load(pool_last_step_ptr + pool_row, mask=take, other=0)
    tl.store(last_step_ptr + slot, fresh_last_step, mask=take)
    step_now = tl.where(take, 0, step_now)
    tl.store(step_ptr + slot, step_now, mask=inside)
    s0_start, s1_start = START(reference, hyper_ptr + 4, DTYPE)
    if EVALUATED:
        tl.store(logit_falls_ptr + slot, tl.where(take, 0, falls), mask=inside)
        tl.store(grad_peak_ptr + slot, tl.where(take, 0.0, grad_peak), mask=inside)
        tl.store(initial_ptr + slot, initial, mask=inside)
        tl.store(logit_ptr + slot, tl.where(take, float("nan"), standing), mask=inside)
        if SCALARS > 0:
            tl.store(scalar0_ptr + slot, tl.where(take, s0_start, tl.where(good, s0_new, s0)), mask=inside)
        if SCALARS > 1:
            tl.store(scalar1_ptr + slot, tl.where(take, s1_start, tl.where(good, s1_new, s1)), mask=inside)
    else:
        tl.store(logit_falls_ptr + slot, tl.zeros([LANES], tl.int32), mask=take)
        tl.store(grad_peak_ptr + slot, tl.zeros([LANES], DTYPE), mask=take)
        tl.store(logit_ptr + slot, tl.full([LANES], float("nan"), DTYPE), mask=take)
        if SCALARS > 0:
            tl.store(scalar0_ptr + slot, s0_start, mask=take)
        if SCALARS > 1:
            tl.store(scalar1_ptr + slot, s1_start, mask=take)

    occupied = inside & (now >= 0)
    count = tl.sum(occupied.to(tl.int64), 0)
    left = tl.where(take, fresh_last_step, last_step) - step_now
    shortest = tl.min(tl.where(occupied, left, 2147483647), 0)
    longest = tl.max(tl.where(occupied, left, -2147483648), 0)
    tl.store(counters_ptr, next_id + tl.sum(take.to(tl.int64), 0))
    tl.store(counters_ptr + 2, count)
    tl.store(counters_ptr + 3, finished)
    tl.store(counters_ptr + 4, evaluations)
    tl.store(counters_ptr + 5, iterations)
    tl.store(counters_ptr + 6, tl.where(count > 0, shortest, 0).to(tl.int64))
    tl.store(counters_ptr + 7, tl.where(count > 0, longest, 0).to(tl.int64))


@triton.jit
def _places(program, features, channels, pixels, CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of the activation that the lanes of a program have, and places of the view, each with its mask.

    Where the orders differ a program has a tile of channels x pixels: its lanes run along pixels in the activation and
    along channels in the view, so that whole sectors are read and written on both sides.
    """
    lane = tl.arange(0, BLOCK)
    if CHANNEL_TILE > 0:
        PIXEL_TILE: tl.constexpr = BLOCK // CHANNEL_TILE
        tiles = tl.cdiv(pixels, PIXEL_TILE)
        first_channel, first_pixel = program // tiles * CHANNEL_TILE, program % tiles * PIXEL_TILE
        channel, pixel = first_channel + lane // PIXEL_TILE, first_pixel + lane % PIXEL_TILE
        element, inside = channel * pixels + pixel, (channel < channels) & (pixel < pixels)
        channel, pixel = first_channel + lane % CHANNEL_TILE, first_pixel + lane // CHANNEL_TILE
        place, place_inside = pixel * channels + channel, (channel < channels) & (pixel < pixels)
    else:
        element = program * BLOCK + lane
        inside = element < features
        place, place_inside = element, inside
    return element, inside, place, place_inside


@triton.jit
def _transposed(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The lanes of a flattened (ROWS, COLUMNS) tile in the order of its transpose."""
    return tl.reshape(tl.trans(tl.reshape(x, [ROWS, COLUMNS])), [ROWS * COLUMNS])


@triton.jit
def _write(
    activation_ptr, view_ptr, at, value, inside, view_at, view_inside,
    VIEW: tl.constexpr, CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The activation, and the networks' view of it."""
    tl.store(activation_ptr + at, value, mask=inside)
    if VIEW:
        seen = value.to(view_ptr.dtype.element_ty)
        if CHANNEL_TILE > 0:
            seen = _transposed(seen, CHANNEL_TILE, BLOCK // CHANNEL_TILE)
        tl.store(view_ptr + view_at, seen, mask=view_inside)


@triton.jit(do_not_specialize=["num_slots"])
def refine_apply(
    activation_ptr, view_ptr, position_ptr, grad_ptr, best_ptr, vector0_ptr, vector1_ptr, scalar0_ptr, scalar1_ptr, logit_ptr,
    pool_ptr, out_ptr, plan_ptr, clip_ptr, hyper_ptr, seed_ptr, num_slots, features, channels, pixels,
    PROPOSE: tl.constexpr, SCALARS: tl.constexpr, VECTORS: tl.constexpr, NOISE: tl.constexpr, CLAMP: tl.constexpr,
    CLIP: tl.constexpr, KEEP_BEST: tl.constexpr, GRAD: tl.constexpr, VIEW: tl.constexpr, CHANNEL_TILE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    element, inside, place, place_inside = _places(tl.program_id(1), features, channels, pixels, CHANNEL_TILE, BLOCK)
    at, view_at = slot * features + element, slot * features + place
    flags = tl.load(plan_ptr + FLAGS * num_slots + slot)

    if (flags & (UPDATE | DONE)) != 0:
        accept = (flags & ACCEPT) != 0
        trial = tl.load(activation_ptr + at, mask=inside, other=0.0)
        # a scalar bool in a mask breaks the interpreter of Triton 3.9
        stood = inside & (element < tl.where(accept, 0, features))
        position = tl.load(position_ptr + at, mask=stood, other=0.0)
        position = tl.where(accept, trial, position)
        tl.store(position_ptr + at, position, mask=inside & (stood == 0))
        kept = position
        if KEEP_BEST:
            better = (flags & BETTER) != 0
            stays = inside & (element < tl.where(better, 0, features))
            best = tl.load(best_ptr + at, mask=stays, other=0.0)
            kept = tl.where(better, position, best)
            tl.store(best_ptr + at, position, mask=inside & (stays == 0))
        if (flags & DONE) != 0:
            row = tl.load(plan_ptr + OUTPUT_ROW * num_slots + slot)
            tl.store(out_ptr + row * features + element, kept, mask=inside)
            if (flags & TAKE) == 0:
                _write(activation_ptr, view_ptr, at, kept, inside, view_at, place_inside, VIEW, CHANNEL_TILE, BLOCK)
        elif GRAD:  # without a gradient, all that were served are done
            g = tl.load(grad_ptr + view_at, mask=place_inside, other=0.0).to(DTYPE)
            if CHANNEL_TILE > 0:
                g = _transposed(g, BLOCK // CHANNEL_TILE, CHANNEL_TILE)
            if CLIP:
                g = g * tl.load(clip_ptr + slot)
            v = tl.zeros([BLOCK], DTYPE)
            w = tl.zeros([BLOCK], DTYPE)
            s0 = tl.load(hyper_ptr).to(DTYPE)
            s1 = s0
            if VECTORS > 0:
                v = tl.load(vector0_ptr + at, mask=inside, other=0.0)
            if VECTORS > 1:
                w = tl.load(vector1_ptr + at, mask=inside, other=0.0)
            if SCALARS > 0:
                s0 = tl.load(scalar0_ptr + slot)
            if SCALARS > 1:
                s1 = tl.load(scalar1_ptr + slot)
            step = tl.load(plan_ptr + STEP * num_slots + slot)
            logit = tl.load(logit_ptr + slot)
            a, v, w = PROPOSE(position, g, accept, v, w, s0, s1, logit, step, hyper_ptr + 4, DTYPE)
            if VECTORS > 0:
                tl.store(vector0_ptr + at, v, mask=inside)
            if VECTORS > 1:
                tl.store(vector1_ptr + at, w, mask=inside)
            if NOISE:
                sample_id = tl.load(plan_ptr + SAMPLE_ID * num_slots + slot)
                a += tl.load(hyper_ptr).to(DTYPE) * normal_at(tl.load(seed_ptr), element, step, sample_id, 0, DTYPE)
            if CLAMP:
                low, high = tl.load(hyper_ptr + 1).to(DTYPE), tl.load(hyper_ptr + 2).to(DTYPE)
                a = tl.where(a < low, low, tl.where(a > high, high, a))  # NaN stays
            _write(activation_ptr, view_ptr, at, a, inside, view_at, place_inside, VIEW, CHANNEL_TILE, BLOCK)

    if (flags & TAKE) != 0:
        tl.debug_barrier()  # a load may be laid out over other threads than the store that follows it
        row = tl.load(plan_ptr + POOL_ROW * num_slots + slot)
        fresh = tl.load(pool_ptr + row * features + element, mask=inside, other=0.0)
        _write(activation_ptr, view_ptr, at, fresh, inside, view_at, place_inside, VIEW, CHANNEL_TILE, BLOCK)
        tl.store(position_ptr + at, fresh, mask=inside)
        zero = tl.zeros([BLOCK], DTYPE)
        if VECTORS > 0:
            tl.store(vector0_ptr + at, zero, mask=inside)
        if VECTORS > 1:
            tl.store(vector1_ptr + at, zero, mask=inside)
