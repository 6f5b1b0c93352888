"""One step of the engine after the networks were evaluated (docs/design.md: evaluate -> observe -> retire or propose)."""

import torch
from torch import Tensor

from fastrefine.noise import Noise
from fastrefine.ops import slots as S
from fastrefine.ops.registry import op
from fastrefine.ops.slots import Outputs, Pool, Rule, Slots
from fastrefine.samplers.base import Evaluation, Sample, State, per_slot


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new, old)


def _merge(mask: Tensor, new: State, old: State) -> None:
    """Write ``new`` into the persistent entries ``old`` where ``mask``."""
    for name, tensor in old.items():
        if name in new:
            tensor.copy_(_where(mask, new[name], tensor))


@op
def refine_step(slots: Slots, evaluation: Evaluation | None, pool: Pool, outputs: Outputs, rule: Rule) -> None:
    """Observe the evaluation, retire what is done, propose for the rest, refill the empty slots; all in place.

    evaluation: at ``slots.activation``; None only refills. Its grad is in the dtype and order of ``slots.view`` where
    that exists (see below). Without a gradient it serves the slots at their last step only, for the gradient of a last
    evaluation is never read; all other live slots wait one step, untouched and uncounted.

    Per live slot that does not wait, with first = (step == 0) and last = (step >= last_step):
      finite     logit, loss and gradient are finite; of a last evaluation the gradient counts only for a sampler with
                 ``needs_last_gradient``, which is never given an evaluation without one
      falls      += 1 when not first and the logit is below the standing one
      observe    sampler.observe where finite, or where the sampler rejects trials (then with logit -inf, loss inf, grad 0);
                 log_prior and prior_score are of ``sampler.latent``, where it has one
      bad        not finite, and first or the sampler cannot reject: the standing state stays
      retire     bad (NONFINITE) | standing logit >= threshold (REACHED) | last (EXHAUSTED, or STALLED when every
                 gradient before was exactly 0 and nothing else moves the sample, neither noise nor its prior): position,
                 or the best iterate with keep_best, to output row id % W; so do all scalars of its state
      propose    otherwise: activation <- sampler.propose, step += 1
    Empty slots then take the next proposals in slot order (a prefix sum, never a race); under ``lockstep`` only when no
    slot is live. ``slots.source`` says which pool row each slot took (-1: none), by which ``copy_context`` copies contexts.
    A slot that stays empty keeps the retired position as its activation; its sampler state means nothing.

    ``slots.view``, where it is given, is what the networks read: the activation rounded to their dtype, and with C =
    ``view_channels`` > 0 with element (c, p) of the flattened (C, P) activation at p C + c. It is written whenever the
    activation is, and the gradient comes back in its dtype and order. Nothing is computed from the view.
    """
    live, done = slots.sample_id >= 0, torch.zeros_like(slots.sample_id, dtype=torch.bool)
    if evaluation is not None:
        if evaluation.grad is None:
            live = live & (slots.step >= slots.last_step)
        else:
            evaluation = evaluation._replace(grad=_of_view(slots, evaluation.grad))
        done = _observe_and_retire(slots, evaluation, outputs, rule, live)
        pool.counters[S.EVALUATIONS] += live.sum()
        pool.counters[S.ITERATIONS] += 1
    _refill(slots, pool, rule, done)
    _write_view(slots)
    left, occupied = slots.last_step - slots.step, slots.sample_id >= 0
    least, most = torch.where(occupied, left, 2**31 - 1).amin(), torch.where(occupied, left, -(2**31)).amax()
    pool.counters[S.FINISHED] += done.sum()
    pool.counters[S.LIVE] = occupied.sum()
    pool.counters[S.SHORTEST] = torch.where(occupied.any(), least, 0)
    pool.counters[S.LONGEST] = torch.where(occupied.any(), most, 0)


def _of_view(slots: Slots, grad: Tensor) -> Tensor:
    """A gradient in the dtype and order of the view -> in those of the activation."""
    if slots.view_channels:
        grad = grad.unflatten(1, (-1, slots.view_channels)).transpose(1, 2).flatten(1)
    return grad.to(slots.activation.dtype)


def _write_view(slots: Slots) -> None:
    if slots.view is not None:
        c = slots.view_channels
        a = slots.activation
        slots.view.copy_(a.unflatten(1, (c, -1)).transpose(1, 2).flatten(1) if c else a)


def _observe_and_retire(slots: Slots, evaluation: Evaluation, outputs: Outputs, rule: Rule, live: Tensor) -> Tensor:
    """``live``: the slots that this evaluation serves; returns those that retired."""
    sampler, traits, state, a = rule.sampler, rule.sampler.traits, slots.state, slots.activation
    first, last = slots.step == 0, slots.step >= slots.last_step
    grad = torch.zeros_like(a) if evaluation.grad is None else evaluation.grad
    peak = grad.abs().amax(1)
    unread = torch.zeros_like(last) if traits.needs_last_gradient else last
    assert evaluation.grad is not None or not traits.needs_last_gradient, sampler
    finite = torch.isfinite(evaluation.logit) & torch.isfinite(evaluation.loss) & (torch.isfinite(peak) | unread)
    met = live & torch.isfinite(peak) & ~unread
    slots.grad_peak.copy_(torch.where(met, torch.maximum(slots.grad_peak, peak), slots.grad_peak))
    if rule.max_grad_norm is not None:
        norm = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64)
        clip = torch.where(norm > rule.max_grad_norm, rule.max_grad_norm / norm, torch.ones_like(norm))
        grad = grad * per_slot(clip.to(grad.dtype))
    bad = live & ~finite & (first if traits.rejects else torch.ones_like(first))
    slots.logit_falls += (live & ~first & (evaluation.logit < state["logit"])).int()

    clean = evaluation._replace(
        logit=torch.where(finite, evaluation.logit, -torch.inf),
        loss=torch.where(finite, evaluation.loss, torch.inf),
        grad=torch.where(per_slot(finite & torch.isfinite(peak)), grad, 0.0),
    )
    if (latent := sampler.latent) is not None:
        clean = clean._replace(log_prior=latent.log_prob(a), prior_score=latent.score(a))
    noise = Noise(rule.seed, slots.sample_id, slots.step, a.shape[1], a.dtype)
    observed = sampler.observe(a, clean, state, slots.step, noise)
    _merge(live & ~bad, observed, state)
    state["logit"].copy_(torch.where(live & first & bad, evaluation.logit, state["logit"]))
    slots.initial_logit.copy_(torch.where(live & first, evaluation.logit, slots.initial_logit))
    position, logit = sampler.position(state), state["logit"]
    if slots.best is not None and slots.best_logit is not None:
        better = live & (first | (~bad & (logit > slots.best_logit)))
        slots.best.copy_(_where(better, position, slots.best))
        slots.best_logit.copy_(torch.where(better, logit, slots.best_logit))

    reached = live & ~bad & (logit >= slots.threshold)
    done = bad | reached | (live & last)
    stalled = last & (slots.step > 0) & (slots.grad_peak == 0) & (not (traits.stochastic or traits.reads_prior))
    status = torch.where(stalled, S.STALLED, S.EXHAUSTED)
    status = torch.where(bad, S.NONFINITE, torch.where(reached, S.REACHED, status))
    kept = position if slots.best is None else slots.best
    rows = torch.where(done, slots.sample_id % (len(outputs.status) - 1), len(outputs.status) - 1)
    outputs.activation[rows] = kept
    outputs.logit[rows] = logit if slots.best_logit is None else slots.best_logit
    outputs.initial_logit[rows] = slots.initial_logit
    outputs.steps[rows] = slots.step
    outputs.logit_falls[rows] = slots.logit_falls
    outputs.status[rows] = status.int()
    outputs.scalars[:, rows] = slots.scalars

    moved = a
    if evaluation.grad is not None:  # without, all that were served are done
        proposed, after = sampler.propose({**observed, **state}, slots.step, noise)
        update = live & ~done
        _merge(update, after, state)
        moved = _where(update, proposed, a)
        slots.step += update.int()
    slots.activation.copy_(_where(done, kept, moved))
    return done


def _refill(slots: Slots, pool: Pool, rule: Rule, done: Tensor) -> None:
    empty = (slots.sample_id < 0) | done
    may = empty & empty.all() if rule.lockstep else empty
    ids = pool.counters[S.NEXT] + torch.cumsum(may, 0) - 1
    take = may & (ids < pool.counters[S.END])
    rows = torch.where(take, ids % len(pool.threshold), 0)
    for name in ("activation", "last_step", "threshold", "reference_logit"):
        own = getattr(slots, name)
        own.copy_(_where(take, getattr(pool, name)[rows], own))
    if slots.label is not None and pool.label is not None:
        slots.label.copy_(_where(take, pool.label[rows], slots.label))
    slots.sample_id.copy_(torch.where(take, ids, torch.where(empty, -1, slots.sample_id)))
    slots.source.copy_(torch.where(take, rows, -1))
    for counter in (slots.step, slots.logit_falls, slots.grad_peak):
        counter.masked_fill_(take, 0)
    sample = Sample(slots.sample_id, slots.label, slots.reference_logit)
    _merge(take, rule.sampler.init(slots.activation, sample), slots.state)
    pool.counters[S.NEXT] += take.sum()
