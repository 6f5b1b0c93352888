"""Activations in, logits and gradients out: tail and discriminator as one frozen, folded, flat step."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastrefine.networks import copies, probe, recording, torch_state
from fastrefine.networks.discriminator import PreparedDiscriminator
from fastrefine.networks.generator import PreparedGenerator
from fastrefine.options import DTYPES, Options
from fastrefine.samplers.base import LOSSES, Evaluation, Sampler

log = logging.getLogger("fastrefine")

# Largest tolerated difference of the fast form from plain autograd on the probe batch, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def _relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest value; samples that are not finite must be so in both, and say no more."""
    value, reference = (t.double().reshape(len(t), -1) for t in (value, reference))
    known = reference.isfinite().all(1)
    if not torch.equal(value.isfinite().all(1), known):
        return math.inf
    if not bool(known.any()):
        return 0.0
    return float((value - reference)[known].abs().max()) / max(float(reference[known].abs().max()), 1e-30)


class Target:
    """evaluate(a, context) for a fixed number of slots, one sampler's loss and one precision.

    a: (S, F) in the dtype of the state; context: the tail's, then D's labels where D takes them. The networks run in the
    dtype of ``precision``; logits, losses and gradients come back in the dtype of the state.
    """

    def __init__(
        self, generator: PreparedGenerator, discriminator: PreparedDiscriminator, sampler: Sampler, options: Options
    ):  # fmt: skip
        self.generator, self.discriminator = generator, discriminator
        self.coupled, self.compiled = options.coupling == "lockstep", options.compile
        self.num_slots, self.precision = options.num_slots, options.precision
        self.fold = "none"  # how BatchNorms were folded: "graph" | "neighbours" (in a Sequential) | "none"
        self._loss, self._loss_scale = LOSSES[sampler.loss], sampler.logit_scale
        self._graphs: dict[tuple[bool, bool], fx.GraphModule]  # by (with gradient, reads a view)
        self.calls: dict[tuple[bool, bool], Callable[..., Any]]  # the same, compiled where that was asked for
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
        exact_tail, exact_d = self.generator.cut.tail, self.discriminator.module
        flat_a = a.reshape(len(a), -1)
        self.tail, self.d, self.channels_last, self.compute = exact_tail, exact_d, False, a.dtype
        reference = self._probe_gradient(flat_a, context)
        self._reference = (flat_a, context)
        for self.fold, fold in (
            ("graph", copies.fold_batch_norm), ("neighbours", copies.fold_in_sequentials), ("none", copy.deepcopy),
        ):  # fmt: skip
            self._fold = fold
            self.tail, self.d = fold(exact_tail), fold(exact_d)
            if self._agrees(reference, a.dtype):
                break
        self._convert()
        self._trace_if_faithful()

    @property
    def is_exact(self) -> bool:
        """Whether rounding errors of the networks do not count."""
        return self.precision in ("float64", "float32")

    def loss_error(self, a: Tensor | None = None, context: tuple[Tensor, ...] = ()) -> float:
        """Root mean square rounding error of a loss in reduced precision, at activations (n, ...) or the probe batch's."""
        if self.is_exact:
            return 0.0
        if a is None:
            a, context = self._reference
        a = a.flatten(1)
        rounded = self._values(a, *context)[1]
        frozen = self.tail, self.d, self.channels_last, self.compute
        self.tail, self.d, self.channels_last, self.compute = (
            self.generator.cut.tail,
            self.discriminator.module,
            False,
            a.dtype,
        )
        try:
            with torch_state.arithmetic("float32", False):
                exact = self._values(a, *context)[1]
        finally:
            self.tail, self.d, self.channels_last, self.compute = frozen
        error = (rounded - exact).double()
        error = error[error.isfinite()]
        return float(error.square().mean().sqrt()) if len(error) else 0.0

    def _probe_gradient(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Plain autograd on the exact networks: the oracle, and the place where a broken gradient is found."""
        roots = {"generator": self.tail, "discriminator": self.d}
        try:
            reference = self._autograd(a, *context)
        except RuntimeError as error:
            raise probe.explain_missing_gradient(roots, lambda x: self._loss_of(x, context), a) or error from error
        if not bool((reference.grad != 0).any()):
            broken = probe.explain_missing_gradient(roots, lambda x: self._loss_of(x, context), a)
            if broken is not None:
                raise broken
        return reference

    def _loss_of(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        return self._loss(self._patches(a, context, None)).sum()

    def _agrees(self, reference: Evaluation, dtype: torch.dtype) -> bool:
        flat_a, context = self._reference
        try:
            found = self._autograd(flat_a, *context)
        except Exception as error:  # a folded form that does not even run is simply not used
            log.debug("folded form failed: %s", error)
            return False
        tolerance = _TOLERANCE[dtype]
        return (
            _relative_error(found.logit, reference.logit) <= tolerance
            and _relative_error(found.grad, reference.grad) <= tolerance
        )

    def _convert(self) -> None:
        """Dtype and memory format of the frozen pair; the state keeps its own dtype."""
        self.compute = DTYPES[self.precision]
        spatial = copies.has_spatial_weights(self.tail) or copies.has_spatial_weights(self.d)
        self.channels_last = spatial and self.compute is not torch.float64
        for module in (self.tail, self.d):
            module.to(dtype=self.compute)
            if self.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _trace_if_faithful(self) -> None:
        """Use the flat graph where a small one equals plain autograd; its route is "flat", else "autograd"."""
        a, context = self._reference
        self.forget()
        self.route = "autograd"
        plain = self._autograd(a, *context)
        try:
            small = recording.record(self._step, (a, *context), (self.tail, self.d))
            from torch.utils.flop_counter import FlopCounterMode  # it imports triton

            with FlopCounterMode(display=False) as counter:
                small(a, *context)
            self.flops = counter.get_total_flops() / len(a)
            if a.device.type == "cpu":
                recording.make_rows_equal(small, a.dtype)
            logit, _, grad = small(a.flip(0), *(c.flip(0) for c in context))
        except Exception as error:  # make_fx runs the user's code: it may fail in any way
            log.info("flat step not possible, using plain autograd: %s", error)
            return
        tolerance = _TOLERANCE[self.compute]
        if max(_relative_error(logit.flip(0), plain.logit), _relative_error(grad.flip(0), plain.grad)) <= tolerance:
            self.route, self._small = "flat", small
            self._choose_block()

    def _choose_block(self) -> None:
        """Networks that mix the samples of a batch must see all slots at once."""
        a, _ = self._reference
        self._block = self.num_slots if self.coupled else recording.block_rows(self._small, len(a), self.num_slots)

    def _step(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._autograd(*given)
        return found.logit, found.loss, found.grad

    def _step_on_view(self, view: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_step``, with the gradient in the dtype and element order of the view."""
        with torch.enable_grad():
            leaf = view.detach().requires_grad_()
            logit, loss = self._values(*given, view=leaf)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return logit.detach(), loss.detach(), grad.detach()

    def view_of(self, state: torch.dtype) -> dict[str, Any]:
        """Arguments ``view`` and ``view_channels`` of ``slots.allocate`` that spare the step all conversions of ``a``."""
        channels = self.generator.shape[0] if self.channels_last and len(self.generator.shape) == 3 else 0
        if self.route != "flat" or (self.compute == state and not channels):
            return {}
        return {"view": self.compute, "view_channels": channels}

    def _patches(self, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None) -> Tensor:
        """(n, P) logits of flattened activations, or of their view; the clone shields the slots from in-place layers."""
        own, labels = self._divide(context)
        shape = self.generator.shape
        if view is None:
            x = a.view(len(a), *shape).to(self.compute)
            x = x.clone(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x.clone()
        elif self.channels_last and len(shape) == 3:
            x = view.view(len(a), *shape[1:], shape[0]).permute(0, 3, 1, 2).clone()
        else:
            x = view.view(len(a), *shape).clone()
        images = self.tail(x, *(c.to(self.compute, copy=True) if c.is_floating_point() else c for c in own))
        if labels is not None and labels.is_floating_point():
            labels = labels.to(self.compute)
        return self.discriminator.logits(self.d, images, labels).to(a.dtype)

    def _divide(self, context: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return (context[:-1], context[-1]) if self.discriminator.takes_labels else (context, None)

    def _autograd(self, a: Tensor, *context: Tensor) -> Evaluation:
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            logit, loss = self._values(leaf, *context)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return Evaluation(logit.detach(), loss.detach(), grad.detach())

    def evaluate(self, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None = None) -> Evaluation:
        """Logit, loss and gradient at ``a`` (S, F); with a view of it, the gradient is in the form of the view."""
        if self.route == "autograd":
            with recording.EqualRows(a.dtype) if a.device.type == "cpu" else contextlib.nullcontext():
                return self._autograd(a, *context)
        return Evaluation(*self._call(True, a, context, view))

    def forward(self, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None = None) -> Evaluation:
        """Logit and loss only, for a last evaluation, whose gradient nobody reads."""
        if self.route == "autograd":
            return self.evaluate(a, context)  # without grad a network may take kernels that round differently
        return Evaluation(*self._call(False, a, context, view), None)  # type: ignore[call-arg]

    def _call(self, with_grad: bool, a: Tensor, context: tuple[Tensor, ...], view: Tensor | None) -> tuple[Tensor, ...]:
        given = (a, *context) if view is None else (view, a, *context)
        kind = with_grad, view is not None
        if kind not in self.calls:
            functions: dict[tuple[bool, bool], Callable[..., Any]] = {
                (True, False): self._step, (True, True): self._step_on_view,
                (False, False): self._values, (False, True): lambda v, *rest: self._values(*rest, view=v),
            }  # fmt: skip
            record = recording.record if self.compiled else recording.trace  # a compiler rounds as it likes
            graph = self._graphs[kind] = record(functions[kind], tuple(t[: self._block] for t in given), (self.tail, self.d))
            mode = "max-autotune-no-cudagraphs" if a.device.type == "cuda" else None
            self.calls[kind] = torch.compile(graph, dynamic=False, mode=mode) if self.compiled else graph
        return self._by_blocks(self.calls[kind], given)

    def _by_blocks(self, graph: Callable[..., Any], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results of ``graph``, which was traced for a block of rows, for all rows."""
        if self._block == len(given[0]):
            return graph(*given)
        parts = [graph(*block) for block in zip(*(t.split(self._block) for t in given), strict=True)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _values(self, a: Tensor, *context: Tensor, view: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logit, loss), each (n,): a map's loss is the mean of its patches' losses, its logit the mean logit.

        An activation that overflowed has no logit, even where a squashing discriminator gives it one.
        """
        patches = self._patches(a, context, view)
        loss = self._loss(patches * self._loss_scale if self._loss_scale != 1 else patches)
        return torch.where(a.isfinite().all(1), patches.mean(1), torch.nan), loss.mean(1)

    def forget(self) -> None:
        """Drop what was traced, compiled or captured."""
        self._graphs, self.calls = {}, {}
        self.era = object()  # what was captured before is of another one
        self.refused: dict[str, str] = {}  # driver -> why it cannot repeat the step

    def resize(self, num_slots: int) -> None:
        """Evaluate batches of another size from now on."""
        if num_slots != self.num_slots:
            self.num_slots = num_slots
            self.forget()
            if self.route == "flat":
                self._choose_block()

    def refresh(self, discriminator: PreparedDiscriminator) -> None:
        """Take new discriminator weights into the same storage: nothing is traced again unless constants were derived."""
        fresh = self._fold(discriminator.module).to(dtype=self.compute)
        copies.copy_weights(fresh, self.d)
        self.discriminator = discriminator
        if any(recording.has_derived_constants(g, (self.tail, self.d)) for g in self._graphs.values()):
            self.forget()
