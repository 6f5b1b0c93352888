"""Activations in, logits and gradients out: tail and discriminator as one frozen, folded, flat step."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastrefine.errors import GradientError, InputError
from fastrefine.networks import copies, cpu_forms, prefix, probe, recording, torch_state
from fastrefine.networks.calls import attempt, failure, is_out_of_memory
from fastrefine.networks.cut import Tail
from fastrefine.networks.discriminator import PreparedDiscriminator
from fastrefine.networks.generator import PreparedGenerator
from fastrefine.networks.ladder import Form, Ladder, Pairs, too_far
from fastrefine.networks.prefix import Recording
from fastrefine.options import DTYPES, Options
from fastrefine.samplers.base import LOSSES, Evaluation, Sampler

# Largest tolerated difference of the fast form from plain autograd on the probe batch, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
_KINK = 0.03  # most that the gradient of one sample may differ by, where a ReLU has turned; more where rounding is coarser
_FEW = 32  # slots for which the first recording is made as they are


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> float:
    """Largest difference relative to the largest value. Of the gradients, the last, half must agree. A single one may be off
    by 30 tolerances, though by no more than ``_KINK``, and counts in these parts.

    Where an activation lies at the kink of a ReLU, rounding decides, and the same formula gives a sample another gradient.
    """
    *values, grads = (_errors(f, w) for f, w in zip(found, wanted, strict=True))
    loose = min(30.0, max(1.0, _KINK / tolerance))
    return max(*(float(value.max()) for value in values), float(grads.median()), float(grads.max()) / loose)


def _errors(value: Tensor, reference: Tensor) -> Tensor:
    """(n,) largest differences; samples that are not finite must be so in both, and say no more."""
    value, reference = (t.double().reshape(len(t), -1) for t in (value, reference))
    known = reference.isfinite().all(1)
    if not torch.equal(value.isfinite().all(1), known):
        return torch.full((1,), math.inf)
    if not bool(known.any()):
        return torch.zeros(1)
    largest = reference[known].abs().max().clamp(min=1e-30)
    return (value - reference)[known].abs().max(1).values / largest


def _alike(given: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether a recording for the one is one for the other."""
    kinds = [[(t.shape, t.stride(), t.dtype, t.device) for t in tensors] for tensors in (given, other)]
    return kinds[0] == kinds[1]


class Target:
    """evaluate(a, context) for a fixed number of slots, one sampler's loss and one precision.

    a: (S, F) in the dtype of the state; context: the tail's, then D's inputs (labels, conditions). The networks run in the
    dtype of ``precision``; logits, losses and gradients come back in the dtype of the state.
    """

    def __init__(
        self, generator: PreparedGenerator, discriminator: PreparedDiscriminator, sampler: Sampler, options: Options,
        num_slots: int,
    ):  # fmt: skip
        self.generator, self.discriminator = generator, discriminator
        self.coupled, self.group, self.compiled = options.coupling == "lockstep", options.lockstep_group, options.compile
        self.num_slots, self.precision, self._pack = num_slots, options.precision, options.pack
        self.form: Form
        self._pairs: Pairs = [[], []]
        self.ladder = Ladder()
        self.repeatable = "to rounding"  # or "bitwise": whether a sample has the same bits in every slot
        self._loss, self._loss_scale = LOSSES[sampler.loss], sampler.logit_scale
        self._recordings: dict[bool, Recording]  # by whether the step reads a view
        self.calls: dict[tuple[bool, bool], Callable[..., Any]]  # by (with gradient, on a view); compiled where asked for
        self.route = "autograd"  # or "flat": how the step is computed
        self._fresh: tuple[fx.GraphModule, tuple[Tensor, ...]] | None = (
            None  # a recording of present weights, and its arguments
        )
        self.is_shared = False  # by refiners of one pair: then its weights must stay
        self._whole = False  # whether gradients come by backward() alone
        self.forget()
        self.flops: float | None = None  # of one evaluation of one sample, where the flat route could count them

    def prepare(self, a: Tensor, context: tuple[Tensor, ...]) -> None:
        """Fold, convert and trace, each step verified against plain autograd on the probe batch (n, ...) given.

        Without TF32: what is verified is formulas, and its rounding exceeds the tolerances. Raises GradientError when no
        gradient reaches ``a``.
        """
        with torch_state.arithmetic("float32", False):
            self._prepare(a, context)

    def _prepare(self, a: Tensor, context: tuple[Tensor, ...]) -> None:
        a = a.reshape(len(a), -1)
        self._reference = a, context
        # the exact networks never run with gradients: some keep a tensor of theirs, and then cannot be copied any more
        exact = Form(self.generator.tail, self.discriminator.module, a.dtype)
        self.form = plain = exact.copied()
        reference = self._probe_gradient(a, context)
        made = None
        if any(type(m) in copies.NORMS for root in self._modules for m in root.modules()):
            made = self._climb("batch norm folded", lambda: self._folded(exact), reference, _TOLERANCE[a.dtype])
        if made is None:
            made, self._pairs = plain, [[], []]
        self.form = made.converted(DTYPES[self.precision])
        try:
            reference = self._autograd(a, *context)
        except Exception as error:
            if is_out_of_memory(error) or self.form.compute == a.dtype:
                raise
            text = " ".join(str(error).split())
            raise InputError(
                f"the networks do not run in precision={self.precision!r}: {type(error).__name__}: {text}; use 'float32'"
            ) from error
        if self.form.is_spatial and self.form.compute is not torch.float64:
            made = self._climb("channels_last", lambda: self.form.laid_out(True), reference, _TOLERANCE[self.form.compute])
            self.form = made or self.form.laid_out(False)
        self.forget()
        self._record_a_few(reference)

    def _folded(self, exact: Form) -> Form:
        """The networks with those BatchNorms folded that a pass of the probe batch shows to stand after a layer."""
        a, context = self._reference
        with torch.enable_grad(), self._in_place():
            leaf = a.detach().requires_grad_()
            modules = self.form.tail, self.form.d
            self._pairs = copies.norms_after_layers(modules, lambda: self._values(leaf, *context)[1].sum())
        return exact.folded(self._pairs)

    def _climb(self, rung: str, change: Callable[[], Form], reference: Evaluation, tolerance: float) -> Form | None:
        """A form of the networks, if plain autograd through it gives the reference on the probe batch."""
        before, (a, context) = self.form, self._reference

        def error(form: Form) -> float:
            self.form = form
            found = self._autograd(a, *context)
            return _error((found.logit, found.grad), (reference.logit, reference.grad), tolerance)

        try:
            return self.ladder.climb(rung, change, error, tolerance)
        finally:
            self.form = before

    @property
    def folded(self) -> int:
        """How many BatchNorms were folded."""
        return sum(map(len, self._pairs))

    @property
    def channels_last(self) -> bool:
        return self.form.channels_last

    @property
    def is_exact(self) -> bool:
        """Whether rounding errors of the networks do not count."""
        return self.precision in ("float64", "float32")

    def loss_error(self, a: Tensor, context: tuple[Tensor, ...]) -> float:
        """Root mean square rounding error of a loss in reduced precision, at activations (n, ...)."""
        if self.is_exact:
            return 0.0
        a = a.flatten(1)
        rounded = self._values(a, *context)[1]
        form, self.form = self.form, Form(self.generator.tail, self.discriminator.module, a.dtype)
        try:
            with torch_state.arithmetic("float32", False):
                exact = self._values(a, *context)[1]
        finally:
            self.form = form
        error = (rounded - exact).double()
        error = error[error.isfinite()]
        return float(error.square().mean().sqrt()) if len(error) else 0.0

    def first_evaluation(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Plain autograd at activations (n, ...)."""
        return self._autograd(a.flatten(1), *context)

    def _probe_gradient(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Plain autograd on the exact networks: the oracle, and the place where a broken gradient is found."""
        tail = self.form.tail
        roots = {"generator": tail.generator if isinstance(tail, Tail) else tail, "discriminator": self.form.d}
        try:
            reference = self._plain_step(a, context)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            found = probe.explain_missing_gradient(roots, lambda x: self._loss_of(x, context), a)
            if found is None and "not have been used" in str(error):
                found = GradientError("the loss does not depend on the refined activation, so nothing can be refined there")
            raise found or InputError(failure("networks", error, a)) from error
        if not bool((reference.grad != 0).any()):
            broken = probe.explain_missing_gradient(roots, lambda x: self._loss_of(x, context), a)
            if broken is not None:
                raise broken
        return reference

    def _plain_step(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        try:
            return self._autograd(a, *context)
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            self._whole = True  # a reentrant checkpoint refuses to be asked for one gradient alone
            return self._autograd(a, *context)

    def _loss_of(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        return self._loss(self._patches(a, context, None)).sum()

    def _record_a_few(self, plain: Evaluation) -> None:
        """Record the step of the probe batch. The route is "flat" where it equals plain autograd, else "autograd".

        Few slots are filled with the probe batch again and again, so that the recording serves them as it is.
        """
        count = len(self._reference[0])
        rows = self.num_slots if count < self.num_slots <= _FEW and not self.coupled else count
        order = torch.arange(rows, device=self._reference[0].device) % count
        given = (self._reference[0], *self._reference[1])
        if rows > count:
            given = tuple(value[order].contiguous() for value in given)

        def record() -> fx.GraphModule:
            graph = recording.record(self._step, given, self._modules)
            from torch.utils.flop_counter import FlopCounterMode  # it imports triton

            with FlopCounterMode(display=False) as counter:
                graph(*given)
            self.flops = counter.get_total_flops() / rows
            return graph

        def error(graph: fx.GraphModule) -> float:
            logit, _, grad = graph(*given)
            return _error((logit, grad), (plain.logit[order], plain.grad[order]), tolerance)

        tolerance = _TOLERANCE[self.form.compute]
        small = self.ladder.climb("step recorded", record, error, tolerance)
        if small is not None:
            self.route, self._small, self._small_rows, self._fresh = "flat", small, rows, (small, given)
            self._choose_block()

    @property
    def _modules(self) -> tuple[nn.Module, nn.Module]:
        """Those whose weights may be updated in place."""
        return self.form.tail, self.form.d

    def _choose_block(self) -> None:
        """Networks that mix the samples of a batch see a whole group at once, others as many rows as fit into the cache."""
        if not self.coupled:
            self._block = cpu_forms.block_rows(self._small, self._small_rows, self.num_slots)

    def _step(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._autograd(*given)
        return found.logit, found.loss, found.grad

    def _step_on_view(self, view: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_step``, with the gradient in the dtype and element order of the view."""
        with torch.enable_grad(), self._in_place():
            leaf = view.detach().requires_grad_()
            logit, loss = self._values(*given, view=leaf)
            grad = self._gradient(self._total(loss), leaf)
        return logit.detach(), loss.detach(), grad.detach()

    def view_of(self, state: torch.dtype) -> dict[str, Any]:
        """Arguments ``view`` and ``view_channels`` of ``slots.allocate`` that spare the step all conversions of ``a``."""
        channels = self.generator.shape[0] if self.channels_last and len(self.generator.shape) == 3 else 0
        if self.route != "flat" or (self.form.compute == state and not channels):
            return {}
        return {"view": self.form.compute, "view_channels": channels}

    def _patches(self, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None) -> Tensor:
        """(n, P) logits of flattened activations, or of their view; the clone shields the slots from in-place layers."""
        shape = self.generator.shape
        if view is None:
            x = a.view(len(a), *shape).to(self.form.compute)
            x = x.clone(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x.clone()
        elif self.channels_last and len(shape) == 3:
            x = view.view(len(a), *shape[1:], shape[0]).permute(0, 3, 1, 2).clone()
        else:
            x = view.view(len(a), *shape).clone()
        given = [c.to(self.form.compute, copy=True) if c.is_floating_point() else c for c in context]
        own, rest = given[: self.generator.num_context], given[self.generator.num_context :]
        inputs = dict(zip(self.discriminator.call.names, rest, strict=True))
        return self.discriminator.logits(self.form.d, self.form.tail(x, *own), inputs).to(a.dtype)

    def _autograd(self, a: Tensor, *context: Tensor) -> Evaluation:
        with torch.enable_grad(), self._in_place():
            leaf = a.detach().requires_grad_()
            logit, loss = self._values(leaf, *context)
            grad = self._gradient(self._total(loss), leaf)
        return Evaluation(logit.detach(), loss.detach(), grad.detach())

    def _total(self, loss: Tensor) -> Tensor:
        return loss.sum() if self._pack == 1 else loss.sum() / self._pack

    def _in_place(self) -> contextlib.AbstractContextManager[None]:
        tail = self.form.tail
        return tail.through_backward() if isinstance(tail, Tail) else contextlib.nullcontext()

    def _gradient(self, loss: Tensor, leaf: Tensor) -> Tensor:
        if not self._whole:
            return torch.autograd.grad(loss, leaf)[0]
        loss.backward()
        if leaf.grad is None:
            raise RuntimeError("the activation takes no part in the loss")
        return leaf.grad

    def carried(self, a: Tensor | None, context: tuple[Tensor, ...], on_view: bool) -> tuple[Tensor, ...]:
        """What the step reads of each sample besides its activation, (S, ...): computed once from its context.

        a: (S, F), activations of these samples, on which a step that is recorded now is verified.
        """
        if self.route == "autograd":
            return context
        if on_view not in self._recordings:
            assert a is not None
            try:
                with torch_state.arithmetic("float32", False):  # as in ``prepare``
                    self._recordings[on_view] = self._record(a, context, on_view)
            except Exception as error:  # what ran for the probe batch may fail at the slots' shape
                if is_out_of_memory(error):
                    raise
                self.ladder.refused("step recorded for all slots", error)
                self.route, self.repeatable = "autograd", "to rounding"
                return context
        graph = self._recordings[on_view].prefix
        carried = context if graph is None else self._by_blocks(graph, context)
        return tuple(value.contiguous() for value in carried)

    @property
    def is_recorded(self) -> bool:
        """Whether nothing is left to prepare."""
        return self.route == "autograd" or bool(self._recordings)

    def report(self) -> dict[str, Any]:
        """What was tried and what came of it, for ``Result.report``."""
        entries = [dict(entry) for entry in self.ladder.entries]
        return {"ladder": entries, "repeatable": self.repeatable, "route": self.route} | self.discriminator.report()

    def check_repeatable(self) -> None:
        """InputError where a sample's bits depend on its slot, for a run that must not depend on it."""
        if self.repeatable == "bitwise" or self.coupled or self.compiled:
            return
        reasons = [f"{entry['rung']}: {entry['why']}" for entry in self.ladder.entries if entry["why"]]
        raise InputError(
            "deterministic=True wants equal bits in every slot, and on this device these networks give them only to rounding "
            f"({'; '.join(reasons) or 'an operation rounds by the place in the batch'}); leave deterministic out"
        )

    def evaluate(self, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None = None) -> Evaluation:
        """Logit, loss and gradient at ``a`` (S, F), context as ``carried`` gave it; on a view, the gradient is in its form."""
        if self.route == "autograd":
            return self._plainly(a, context)
        return Evaluation(*self._call(True, a, context, view))

    def _plainly(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        what = "discriminator or the generator"
        try:
            return attempt(what, lambda: Evaluation(*self._by_blocks(self._step, (a, *context))), a)
        except InputError as error:
            if len(a) > 1:
                raise
            raise InputError(f"{error}; the networks ran for several samples: pass num_slots=2 or more") from error

    def forward(self, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None = None) -> Evaluation:
        """Logit and loss only, for a last evaluation, whose gradient is not read."""
        if self.route == "autograd":
            return self.evaluate(a, context)  # without grad a network may take kernels that round differently
        return Evaluation(*self._call(False, a, context, view)[:2], None)  # type: ignore[call-arg]

    def _call(self, with_grad: bool, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None) -> tuple[Tensor, ...]:
        kind = with_grad, view is not None
        if kind not in self.calls:
            known = self._recordings[kind[1]]
            graph = known.step if with_grad else known.forward
            mode = "max-autotune-no-cudagraphs" if a.device.type == "cuda" else None
            compiled = self.compiled
            self.calls[kind] = torch.compile(graph, dynamic=False, mode=mode) if compiled else recording.callable_of(graph)
        given = (a, *context) if view is None else (view, a, *context)
        return attempt("recorded step", lambda: self._by_blocks(self.calls[kind], given), a)

    def _record(self, a: Tensor, context: tuple[Tensor, ...], on_view: bool) -> Recording:
        """The step at the slots' shape. What does not depend on the activation is taken out, and the rows are made equal."""
        state = (self._as_view(a), a) if on_view else (a,)
        given, count = tuple(t[: self._block] for t in (*state, *context)), len(state)
        step, tolerance = self._step_on_view if on_view else self._step, _TOLERANCE[self.form.compute]
        own = step(*given)  # first: a network may prepare itself at its first call for a shape
        graph = None if on_view or self._fresh is None or not _alike(given, self._fresh[1]) else self._fresh[0]
        graph = graph or recording.record(step, given, self._modules)
        wanted, order = graph(*given), torch.arange(len(given[0]), device=a.device)
        off = _error(wanted, own, tolerance)
        if off <= tolerance:  # a value that was read while it was recorded is another one for other activations
            moved = (0.9 * a + 0.05)[: self._block]
            other = (*((self._as_view(moved), moved) if on_view else (moved,)), *given[count:])
            if not self.coupled:  # samples of a group keep their places, others may be in any slot
                order = order.flip(0)
            turned = [t[order] for t in other]
            off = _error(graph(*turned), step(*turned), tolerance)
        if not off <= tolerance:
            raise ValueError(too_far(off, tolerance))

        def carried(made: Recording) -> tuple[Tensor, ...]:
            found = given[count:] if made.prefix is None else made.prefix(*given[count:])
            return tuple(value.contiguous() for value in found)

        def run(made: Recording, order: Tensor, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """The results for the same samples in other slots, put back into their order."""
            found = made.step(*(t[order] for t in (*given[:count], *carry)))
            return tuple(value[torch.argsort(order)] for value in found)

        def error(made: Recording) -> float:
            carry = carried(made)
            made.step(*given[:count], *carry)  # which must leave what it was given as it was
            last = made.forward(*given[:count], *carry)[:2]
            off = max(float(_errors(f, w).max()) for f, w in zip(last, wanted[:2], strict=True))
            return max(off, _error(run(made, order, carry), wanted, tolerance))

        effects = functools.cache(lambda: recording.effects_of(graph))

        def without_gradient() -> Recording:
            return Recording(None, graph, prefix.first_outputs(graph, 2, effects()))

        def without_prefix() -> Recording:
            return prefix.without_prefix(graph, count, len(given[0]), effects())

        made = Recording(None, graph, graph)
        made = self.ladder.climb("last step without gradient", without_gradient, error, tolerance) or made
        if context and not self.coupled:
            made = self.ladder.climb("prefix cached", without_prefix, error, tolerance) or made
        try:
            held = made.with_held_weights()
        except Exception as reason:  # even for want of memory: the step does without
            self.ladder.refused("weights held", reason)
        else:
            if held.held is not None:
                made = self.ladder.climb("weights held", lambda: held, error, tolerance) or made
        if self.compiled or self.coupled:  # a compiler rounds as it likes; samples of a group keep their places
            return made

        if a.device.type == "cpu" and not self._has_equal_rows(made, on_view):
            equal = functools.partial(made.with_equal_rows, a.dtype, self._modules)
            made = self.ladder.climb("equal rows", equal, error, tolerance) or made
        self.repeatable = "bitwise" if self._has_equal_rows(made, on_view) else "to rounding"
        return made

    def _has_equal_rows(self, made: Recording, on_view: bool) -> bool:
        """Whether each sample of the probe batch has the same bits in every slot."""
        a, context = self._reference
        given, count = ((self._as_view(a), a) if on_view else (a,)), min(len(a), self._block)
        known: list[Tensor] = []
        for shift in range(count):
            rows = (torch.arange(self._block, device=a.device) + shift) % count
            carry = [value[rows].contiguous() for value in context]
            carry = carry if made.prefix is None else [value.contiguous() for value in made.prefix(*carry)]
            found = [torch.nan_to_num(value) for value in made.step(*(value[rows] for value in given), *carry)]
            known = known or [value[:count].clone() for value in found]
            if not all(torch.equal(value, own[rows]) for value, own in zip(found, known, strict=True)):
                return False
        return True

    def _as_view(self, a: Tensor) -> Tensor:
        """The activation in the dtype and element order of the view."""
        channels = self.generator.shape[0] if self.channels_last and len(self.generator.shape) == 3 else 0
        return (a.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1) if channels else a).to(self.form.compute)

    def _by_blocks(self, graph: Callable[..., Any], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results of ``graph``, which was recorded for a block of rows, for all rows."""
        if self._block == len(given[0]):
            return graph(*given)
        parts = [graph(*block) for block in zip(*(t.split(self._block) for t in given), strict=True)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _values(self, a: Tensor, *context: Tensor, view: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logit, loss), each (n,): a map's loss is the mean of its patches' losses, its logit the mean logit.

        An activation that overflowed has no logit, even where a squashing discriminator gives it one: it adds NaN.
        """
        patches = self._patches(a, context, view)
        loss = self._loss(patches * self._loss_scale if self._loss_scale != 1 else patches)
        return self.discriminator.mean(patches) + 0 * a.detach().sum(1), self.discriminator.mean(loss)

    def forget(self) -> None:
        """Drop what was traced, compiled or captured."""
        self._recordings, self.calls = {}, {}
        self.era = object()  # what was captured before is of another one
        self._block = self.group or self.num_slots  # rows that the networks see at once
        if self.route == "flat":
            self._choose_block()
        self.refused: dict[tuple[str, type], str] = {}  # (driver, kind of sampler) -> why it cannot repeat the step

    def resized(self, num_slots: int) -> Target:
        """The target for another number of slots, on the same networks; a run that goes on keeps its own."""
        if num_slots == self.num_slots:
            return self
        twin = copy.copy(self)
        twin.num_slots, twin.ladder = num_slots, Ladder([dict(entry) for entry in self.ladder.entries])
        twin.forget()
        return twin

    def refresh(self, discriminator: PreparedDiscriminator) -> None:
        """Take new discriminator weights into the same storage: nothing is traced again unless constants were derived."""
        fresh = copies.converted(copies.fold_batch_norms(discriminator.module, self._pairs[1]), self.form.compute)
        copies.copy_weights(fresh, self.form.d)
        self.discriminator, self._fresh = discriminator, None
        graphs = [graph for recorded in self._recordings.values() for graph in recorded[:2] if graph is not None]
        graphs += [recorded.held.values for recorded in self._recordings.values() if recorded.held is not None]
        if any(recording.has_derived_constants(graph, self._modules) for graph in graphs):
            self.forget()
        for recorded in self._recordings.values():
            if recorded.held is not None:
                recorded.held.refresh()
