"""Activations in, logits and gradients out: tail and discriminator as one frozen, folded, flat step."""

from __future__ import annotations

import contextlib
import copy
import logging
import math

import torch
from torch import Tensor, fx

from fastrefine import flatten, freeze, probe
from fastrefine.pair import DiscriminatorSide, GeneratorSide
from fastrefine.samplers.base import LOSSES, Evaluation, Sampler

log = logging.getLogger("fastrefine")

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "tf32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
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
        self,
        generator: GeneratorSide,
        discriminator: DiscriminatorSide,
        sampler: Sampler,
        precision: str,
        num_slots: int,
        coupled: bool = False,
    ):
        self.generator, self.discriminator, self.coupled = generator, discriminator, coupled
        self.num_slots, self._precision = num_slots, DTYPES[precision]
        self._loss, self._loss_scale = LOSSES[sampler.loss], sampler.logit_scale
        self._flat: fx.GraphModule | None = None
        self._flat_forward: fx.GraphModule | None = None
        self.flops: float | None = None  # of one evaluation of one sample, where the flat route could count them

    def prepare(self, a: Tensor, context: tuple[Tensor, ...]) -> None:
        """Fold, convert and trace, each step verified against plain autograd on the probe batch (n, ...) given.

        Raises GradientError when no gradient reaches ``a``.
        """
        exact_tail, exact_d = self.generator.cut.tail, self.discriminator.module
        flat_a = a.reshape(len(a), -1)
        self.tail, self.d, self.channels_last, self.compute = exact_tail, exact_d, False, a.dtype
        reference = self._probe_gradient(flat_a, context)
        self._reference = (flat_a, context)
        for fold in (freeze.fold_batch_norm, freeze.fold_in_sequentials, copy.deepcopy):
            self._fold = fold
            self.tail, self.d = fold(exact_tail), fold(exact_d)
            if self._agrees(reference, a.dtype):
                break
        self._convert()
        self._trace_if_faithful()

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
        return self._loss(self._patches(a, context)).sum()

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
        self.compute = self._precision
        spatial = freeze.has_spatial_weights(self.tail) or freeze.has_spatial_weights(self.d)
        self.channels_last = spatial and self.compute is not torch.float64
        for module in (self.tail, self.d):
            module.to(dtype=self.compute)
            if self.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _trace_if_faithful(self) -> None:
        """Use the flat graph where a small one equals plain autograd; its route is "flat", else "autograd"."""
        a, context = self._reference
        self._flat = self._flat_forward = None
        self.route = "autograd"
        plain = self._autograd(a, *context)
        try:
            small = flatten.record(self._step, (a, *context))
            from torch.utils.flop_counter import FlopCounterMode  # it imports triton

            with FlopCounterMode(display=False) as counter:
                small(a, *context)
            self.flops = counter.get_total_flops() / len(a)
            if a.device.type == "cpu":
                flatten.make_rows_equal(small, a.dtype)
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
        self._block = self.num_slots if self.coupled else flatten.block_rows(self._small, len(a), self.num_slots)

    def _trace(self, a: Tensor, context: tuple[Tensor, ...]) -> fx.GraphModule:
        return flatten.trace(self._step, (a, *context))

    def _step(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._autograd(*given)
        return found.logit, found.loss, found.grad

    def _patches(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """(n, P) logits of flattened activations; the clone shields the slots from in-place layers."""
        own, labels = self._divide(context)
        x = a.view(len(a), *self.generator.shape).to(self.compute)
        if self.channels_last and x.dim() == 4:
            x = x.clone(memory_format=torch.channels_last)
        else:
            x = x.clone()
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

    def evaluate(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Logit, loss and gradient at ``a`` (S, F)."""
        if self.route == "autograd":
            with flatten.EqualRows(a.dtype) if a.device.type == "cpu" else contextlib.nullcontext():
                return self._autograd(a, *context)
        if self._flat is None:
            self._flat = self._trace(*self._first_block(a, context))
        return Evaluation(*self._by_blocks(self._flat, a, context))

    def forward(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Logit and loss only, for a last evaluation, whose gradient nobody reads."""
        if self.route == "autograd":
            return self.evaluate(a, context)  # without grad a network may take kernels that round differently
        if self._flat_forward is None:
            first, own = self._first_block(a, context)
            self._flat_forward = flatten.trace(self._values, (first, *own))
        return Evaluation(*self._by_blocks(self._flat_forward, a, context), None)  # type: ignore[call-arg]

    def _first_block(self, a: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return a[: self._block], tuple(c[: self._block] for c in context)

    def _by_blocks(self, graph: fx.GraphModule, a: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results of ``graph``, which was traced for a block of rows, for all rows."""
        if self._block == len(a):
            return graph(a, *context)
        parts = [graph(*block) for block in zip(*(t.split(self._block) for t in (a, *context)), strict=True)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _values(self, a: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(logit, loss), each (n,): a map's loss is the mean of its patches' losses, its logit the mean logit.

        An activation that overflowed has no logit, even where a squashing discriminator gives it one.
        """
        patches = self._patches(a, context)
        loss = self._loss(patches * self._loss_scale if self._loss_scale != 1 else patches)
        return torch.where(a.isfinite().all(1), patches.mean(1), torch.nan), loss.mean(1)

    def resize(self, num_slots: int) -> None:
        """Evaluate batches of another size from now on."""
        if num_slots != self.num_slots:
            self.num_slots, self._flat, self._flat_forward = num_slots, None, None
            if self.route == "flat":
                self._choose_block()

    def refresh(self, discriminator: DiscriminatorSide) -> None:
        """Take new discriminator weights into the same storage: nothing is traced again unless constants were derived."""
        fresh = self._fold(discriminator.module).to(dtype=self.compute)
        freeze.copy_weights(fresh, self.d)
        self.discriminator = discriminator
        graphs = [g for g in (self._flat, self._flat_forward) if g is not None]
        if any(flatten.has_derived_constants(g, (self.tail, self.d)) for g in graphs):
            self._flat = self._flat_forward = None
