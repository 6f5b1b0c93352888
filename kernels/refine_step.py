"""The step of the engine in three Triton kernels; specification: ``fastrefine.ops.refine_step``.

refine_reduce  a program per slot: largest |gradient|, norm and the rule's sums, in a fixed order
refine_decide  one program, a lane per slot: observe, retire, refill; writes the plan (5, S) int64
refine_apply   slots x blocks of features: does what the plan says. One grid that reads and rewrites slot state races.

Numbers that another rule of the same kind may change are read from device memory, never passed: a captured graph goes on
with the new ones. hyper (float64): clamp low, clamp high, max_grad_norm, steps of a transition, then the rule's own.
"""

import triton
import triton.language as tl

from .blocks import clip_of, places, prior_of, scalars_of, transposed, vectors_of, write
from .philox import normal_at, uniform_at

FLAGS, OUTPUT_ROW, POOL_ROW, SAMPLE_ID, STEP = (tl.constexpr(row) for row in range(5))  # rows of the plan
ACCEPT, BETTER, UPDATE, DONE, TAKE, FINITE = (tl.constexpr(1 << bit) for bit in range(6))  # bits of its flags


@triton.jit(do_not_specialize=["num_slots", "channels", "pixels"])
def refine_reduce(
    grad_ptr, sample_id_ptr, step_ptr, last_step_ptr, peak_ptr, norm_ptr,
    activation_ptr, position_ptr, vectors_ptr, scalars_ptr, latent_ptr, hyper_ptr, seed_ptr, sums_ptr,
    num_slots, features, channels, pixels,
    SUMS: tl.constexpr, TERMS: tl.constexpr, SCALARS: tl.constexpr, VECTORS: tl.constexpr, LATENT: tl.constexpr,
    REORDERED: tl.constexpr, GRAD: tl.constexpr, CLIP: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """peak (S,): inf where any gradient is not finite, in the state's type. sums (4, S): those of a rule that has some.

    Without sums a last gradient is never read: 0. They are of the clipped gradient, 0 where its peak is inf or GRAD is off,
    and only taken where a transition ends.
    """
    slot = tl.program_id(0).to(tl.int64)
    step, last_step = tl.load(step_ptr + slot), tl.load(last_step_ptr + slot)
    read = tl.load(sample_id_ptr + slot) >= 0
    if not GRAD:
        read = read & (step >= last_step)
    elif TERMS == 0:
        read = read & (step < last_step)
    peak = tl.zeros([BLOCK], DTYPE)
    square = tl.zeros([BLOCK], tl.float64)
    if GRAD:
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
    if TERMS > 0:
        known = tl.max(peak, 0) < float("inf")
        clip = clip_of(tl.sqrt(tl.sum(square, 0)), hyper_ptr, DTYPE)
        sample_id, stride = tl.load(sample_id_ptr + slot), num_slots.to(tl.int64) * features
        scalars = scalars_of(scalars_ptr, slot, num_slots, SCALARS, DTYPE)
        q0 = tl.zeros([BLOCK], tl.float64)
        q1 = q0
        q2 = q0
        q3 = q0
        end = tl.where(read & (step % tl.load(hyper_ptr + 3).to(tl.int32) == 0), features, 0)
        block = 0
        while block * BLOCK < end:
            place = block * BLOCK + tl.arange(0, BLOCK)
            inside = place < features
            element = place
            if REORDERED:
                element = place % channels * pixels + place // channels
            at = slot * features + element
            g = tl.zeros([BLOCK], DTYPE)
            if GRAD:
                g = tl.load(grad_ptr + slot * features + place, mask=inside, other=0.0).to(DTYPE)
                if CLIP:
                    g = g * clip
                g = tl.where(known, g, 0.0)
            trial = tl.load(activation_ptr + at, mask=inside, other=0.0)
            position = tl.load(position_ptr + at, mask=inside, other=0.0)
            vectors = vectors_of(vectors_ptr, at, stride, inside, VECTORS, DTYPE, BLOCK)
            prior = prior_of(latent_ptr, element, features, inside, LATENT, DTYPE, BLOCK)
            terms = SUMS(position, trial, g, vectors, scalars, element, step, sample_id, prior, seed_ptr, hyper_ptr + 4, DTYPE)
            q0 += tl.where(inside, terms[0], 0.0)
            q1 += tl.where(inside, terms[1], 0.0)
            if TERMS > 2:
                q2 += tl.where(inside, terms[2], 0.0)
                q3 += tl.where(inside, terms[3], 0.0)
            block += 1
        tl.store(sums_ptr + slot, tl.sum(q0, 0))
        tl.store(sums_ptr + num_slots + slot, tl.sum(q1, 0))
        if TERMS > 2:
            tl.store(sums_ptr + 2 * num_slots + slot, tl.sum(q2, 0))
            tl.store(sums_ptr + 3 * num_slots + slot, tl.sum(q3, 0))


@triton.jit(do_not_specialize=["num_slots", "pool_rows", "output_rows", "features"])
def refine_decide(
    trial_logit_ptr, trial_loss_ptr, peak_ptr, norm_ptr,
    sample_id_ptr, source_ptr, step_ptr, last_step_ptr, logit_falls_ptr, threshold_ptr, reference_ptr, initial_ptr,
    grad_peak_ptr, logit_ptr, best_logit_ptr, scalars_ptr,
    pool_last_step_ptr, pool_threshold_ptr, pool_reference_ptr, counters_ptr,
    out_logit_ptr, out_initial_ptr, out_steps_ptr, out_falls_ptr, out_status_ptr, out_scalars_ptr,
    plan_ptr, clip_ptr, hyper_ptr, seed_ptr, sums_ptr, num_slots, pool_rows, output_rows, features,
    OBSERVE: tl.constexpr, START: tl.constexpr, SCALARS: tl.constexpr, REJECTS: tl.constexpr, STALLS: tl.constexpr,
    TERMS: tl.constexpr, TESTS: tl.constexpr, LATE: tl.constexpr, CLIP: tl.constexpr, KEEP_BEST: tl.constexpr,
    LOCKSTEP: tl.constexpr, EVALUATED: tl.constexpr, GRAD: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr,
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
        here = tl.where(inside, slot, 0)
        scalars = scalars_of(scalars_ptr, here, num_slots, SCALARS, DTYPE)

        unread = last
        if TESTS:
            unread = done  # none
        met = served & (unread == 0) & (peak < float("inf"))
        finite = (tl.abs(trial) < float("inf")) & (tl.abs(loss) < float("inf")) & ((peak < float("inf")) | unread)
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
        q0, q1, q2 = scalars_of(sums_ptr, here, num_slots, TERMS, tl.float64)
        q3 = q2
        if TERMS > 3:
            q3 = tl.load(sums_ptr + 3 * num_slots + here)
        uniform = tl.zeros([LANES], tl.float64)
        if TESTS:
            uniform = uniform_at(tl.load(seed_ptr), slot * 0, step, sample_id, 1)
        accept, s = OBSERVE(
            seen_logit, seen_loss, first, step, scalars, (q0, q1, q2, q3), uniform, features, hyper_ptr + 4, DTYPE
        )
        accept = good & accept
        s0, s1, s2 = tl.where(good, s[0], scalars[0]), tl.where(good, s[1], scalars[1]), tl.where(good, s[2], scalars[2])
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
        if STALLS:
            status = tl.where(last & (step > 0) & (grad_peak == 0), 3, status)
        status = tl.where(bad, 2, tl.where(reached, 0, status))
        row = tl.where(done, sample_id % output_rows, 0)
        tl.store(out_logit_ptr + row, reported, mask=done)
        tl.store(out_initial_ptr + row, initial, mask=done)
        tl.store(out_steps_ptr + row, step, mask=done)
        tl.store(out_falls_ptr + row, falls, mask=done)
        tl.store(out_status_ptr + row, status, mask=done)
        told = s0, s1, s2
        if LATE:
            told = scalars
        if SCALARS > 0:
            tl.store(out_scalars_ptr + row, told[0], mask=done)
        if SCALARS > 1:
            tl.store(out_scalars_ptr + (output_rows + 1) + row, told[1], mask=done)
        if SCALARS > 2:
            tl.store(out_scalars_ptr + 2 * (output_rows + 1) + row, told[2], mask=done)
        if CLIP:
            norm = tl.load(norm_ptr + slot, mask=inside, other=0.0)
            tl.store(clip_ptr + slot, clip_of(norm, hyper_ptr, DTYPE), mask=inside)

        flags = tl.where(accept, ACCEPT, 0) | tl.where(better, BETTER, 0)
        if TESTS:
            flags = flags | tl.where(finite, FINITE, 0)
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
    start = START(reference, hyper_ptr + 4, DTYPE)
    if EVALUATED:
        tl.store(logit_falls_ptr + slot, tl.where(take, 0, falls), mask=inside)
        tl.store(grad_peak_ptr + slot, tl.where(take, 0.0, grad_peak), mask=inside)
        tl.store(initial_ptr + slot, initial, mask=inside)
        tl.store(logit_ptr + slot, tl.where(take, float("nan"), standing), mask=inside)
        s0, s1, s2 = tl.where(take, start[0], s0), tl.where(take, start[1], s1), tl.where(take, start[2], s2)
    else:
        tl.store(logit_falls_ptr + slot, tl.zeros([LANES], tl.int32), mask=take)
        tl.store(grad_peak_ptr + slot, tl.zeros([LANES], DTYPE), mask=take)
        tl.store(logit_ptr + slot, tl.full([LANES], float("nan"), DTYPE), mask=take)
        s0, s1, s2 = start
    changed = take
    if EVALUATED:
        changed = inside
    if SCALARS > 0:
        tl.store(scalars_ptr + slot, s0, mask=changed)
    if SCALARS > 1:
        tl.store(scalars_ptr + num_slots + slot, s1, mask=changed)
    if SCALARS > 2:
        tl.store(scalars_ptr + 2 * num_slots + slot, s2, mask=changed)

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


@triton.jit(do_not_specialize=["num_slots", "schedule_steps"])
def refine_apply(
    activation_ptr, view_ptr, position_ptr, grad_ptr, best_ptr, vectors_ptr, scalars_ptr, logit_ptr, latent_ptr, schedule_ptr,
    pool_ptr, out_ptr, plan_ptr, clip_ptr, hyper_ptr, seed_ptr, num_slots, features, channels, pixels, schedule_steps,
    PROPOSE: tl.constexpr, PACE: tl.constexpr, SCALARS: tl.constexpr, VECTORS: tl.constexpr, TESTS: tl.constexpr,
    LATENT: tl.constexpr, SCHEDULE: tl.constexpr, NOISE: tl.constexpr, CLAMP: tl.constexpr, CLIP: tl.constexpr,
    KEEP_BEST: tl.constexpr, GRAD: tl.constexpr, VIEW: tl.constexpr, CHANNEL_TILE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    element, inside, place, place_inside = places(tl.program_id(1), features, channels, pixels, CHANNEL_TILE, BLOCK)
    at, view_at = slot * features + element, slot * features + place
    stride = num_slots.to(tl.int64) * features
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
                write(activation_ptr, view_ptr, at, kept, inside, view_at, place_inside, VIEW, CHANNEL_TILE, BLOCK)
        elif GRAD:  # without a gradient, all that were served are done
            g = tl.load(grad_ptr + view_at, mask=place_inside, other=0.0).to(DTYPE)
            if CHANNEL_TILE > 0:
                g = transposed(g, BLOCK // CHANNEL_TILE, CHANNEL_TILE)
            if CLIP:
                g = g * tl.load(clip_ptr + slot)
            if TESTS:
                g = tl.where((flags & FINITE) != 0, g, 0.0)
            step = tl.load(plan_ptr + STEP * num_slots + slot)
            sample_id = tl.load(plan_ptr + SAMPLE_ID * num_slots + slot)
            logit = tl.load(logit_ptr + slot)
            scalars = scalars_of(scalars_ptr, slot, num_slots, SCALARS, DTYPE)
            vectors = vectors_of(vectors_ptr, at, stride, inside, VECTORS, DTYPE, BLOCK)
            prior = prior_of(latent_ptr, element, features, inside, LATENT, DTYPE, BLOCK)
            pace = logit, logit
            if SCHEDULE:
                column = schedule_ptr + tl.minimum(step, schedule_steps - 1)
                pace = tl.load(column), tl.load(column + schedule_steps)
            if PACE is not None:
                pace = PACE(scalars, step, sample_id, seed_ptr, hyper_ptr + 4, DTYPE)
            xi = g
            if NOISE:
                xi = normal_at(tl.load(seed_ptr), element, step, sample_id, 0, DTYPE)
            a, vectors = PROPOSE(
                position, trial, g, xi, accept, vectors, scalars, logit, step, prior, pace, hyper_ptr + 4, NOISE, DTYPE
            )
            if VECTORS > 0:
                tl.store(vectors_ptr + at, vectors[0], mask=inside)
            if VECTORS > 1:
                tl.store(vectors_ptr + stride + at, vectors[1], mask=inside)
            if VECTORS > 2:
                tl.store(vectors_ptr + 2 * stride + at, vectors[2], mask=inside)
            if CLAMP:
                low, high = tl.load(hyper_ptr).to(DTYPE), tl.load(hyper_ptr + 1).to(DTYPE)
                a = tl.where(a < low, low, tl.where(a > high, high, a))  # NaN stays
            write(activation_ptr, view_ptr, at, a, inside, view_at, place_inside, VIEW, CHANNEL_TILE, BLOCK)

    if (flags & TAKE) != 0:
        tl.debug_barrier()  # a load may be laid out over other threads than the store that follows it
        row = tl.load(plan_ptr + POOL_ROW * num_slots + slot)
        fresh = tl.load(pool_ptr + row * features + element, mask=inside, other=0.0)
        write(activation_ptr, view_ptr, at, fresh, inside, view_at, place_inside, VIEW, CHANNEL_TILE, BLOCK)
        tl.store(position_ptr + at, fresh, mask=inside)
        zero = tl.zeros([BLOCK], DTYPE)
        if VECTORS > 0:
            tl.store(vectors_ptr + at, zero, mask=inside)
        if VECTORS > 1:
            tl.store(vectors_ptr + stride + at, zero, mask=inside)
        if VECTORS > 2:
            tl.store(vectors_ptr + 2 * stride + at, zero, mask=inside)
