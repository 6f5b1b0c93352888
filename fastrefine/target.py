"""Activations in, logits and gradients out: tail and discriminator as one frozen, folded, flat step."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastrefine import freeze, probe
from fastrefine.pair import DiscriminatorSide, GeneratorSide
from fastrefine.samplers.base import LOSSES, Evaluation, Sampler

aten = torch.ops.aten
log = logging.getLogger("fastrefine")

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "tf32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
# Largest tolerated difference of the fast form from plain autograd on the probe batch, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int, mask: list[bool],
) -> tuple[Tensor, None, None]:  # fmt: skip
    """Input gradient of a convolution as a convolution: the flat graph then holds inference ops only."""
    assert not mask[1] and not mask[2], "the networks are frozen: no parameter gradient can be asked for"
    if transposed:
        return aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * len(stride), groups), None, None
    spare = [
        int(x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1))
        for i in range(len(stride))
    ]
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, spare, groups), None, None


def _relative_error(value: Tensor, reference: Tensor) -> float:
    scale = float(reference.abs().max())
    error = float((value.double() - reference.double()).abs().max()) / max(scale, 1e-30)
    return error if error == error else float("inf")


class Target:
    """evaluate(a, context) for a fixed number of slots, one sampler's loss and one precision.

    a: (S, F) in the dtype of the state; context: the tail's, then D's labels where D takes them. The networks run in the
    dtype of ``precision``; logits, losses and gradients come back in the dtype of the state.
    """

    def __init__(
        self, generator: GeneratorSide, discriminator: DiscriminatorSide, sampler: Sampler, precision: str, num_slots: int
    ):
        self.generator, self.discriminator = generator, discriminator
        self.num_slots, self._precision = num_slots, DTYPES[precision]
        self._loss, self._loss_scale = LOSSES[sampler.loss], sampler.logit_scale
        self._flat: torch.fx.GraphModule | None = None
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
        else:
            self.tail, self.d, self._fold = exact_tail, exact_d, lambda module: module
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
                module.to(memory_format=torch.channels_last)

    def _trace_if_faithful(self) -> None:
        """Use the flat graph where a small one equals plain autograd; its route is "flat", else "autograd"."""
        a, context = self._reference
        self._flat = None
        self.route = "autograd"
        plain = self._autograd(a, *context)
        try:
            small = self._trace(a, context)
            with FlopCounterMode(display=False) as counter:
                logit, _, grad = small(a.flip(0), *(c.flip(0) for c in context))
        except Exception as error:  # make_fx runs the user's code: it may fail in any way
            log.info("flat step not possible, using plain autograd: %s", error)
            return
        tolerance = _TOLERANCE[self.compute]
        if max(_relative_error(logit.flip(0), plain.logit), _relative_error(grad.flip(0), plain.grad)) <= tolerance:
            self.route = "flat"
            self.flops = counter.get_total_flops() / len(a)

    def _trace(self, a: Tensor, context: tuple[Tensor, ...]) -> torch.fx.GraphModule:
        rules = {aten.convolution_backward.default: _convolution_backward}
        return make_fx(lambda *given: tuple(self._autograd(*given))[:3], decomposition_table=rules)(a, *context)

    def _patches(self, a: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """(n, P) logits of flattened activations; the clone shields the slots from in-place layers."""
        own, labels = self._divide(context)
        x = a.view(len(a), *self.generator.shape).to(self.compute)
        if self.channels_last and x.dim() == 4:
            x = x.clone(memory_format=torch.channels_last)
        else:
            x = x.clone()
        images = self.tail(x, *(c.to(self.compute, copy=True) if c.is_floating_point() else c for c in own))
        return self.discriminator.logits(self.d, images, labels).to(a.dtype)

    def _divide(self, context: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return (context[:-1], context[-1]) if self.discriminator.takes_labels else (context, None)

    def _autograd(self, a: Tensor, *context: Tensor) -> Evaluation:
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            patches = self._patches(leaf, context)
            # a map's loss is the mean of its patches' losses; its logit the mean logit
            loss = self._loss(patches * self._loss_scale if self._loss_scale != 1 else patches).mean(1)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return Evaluation(patches.detach().mean(1), loss.detach(), grad.detach())

    def evaluate(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Logit, loss and gradient at ``a`` (S, F)."""
        if self.route == "autograd":
            return self._autograd(a, *context)
        if self._flat is None:
            self._flat = self._trace(a, context)
        return Evaluation(*self._flat(a, *context))

    def forward(self, a: Tensor, context: tuple[Tensor, ...]) -> Evaluation:
        """Logit and loss only, for a last evaluation, whose gradient nobody reads."""
        patches = self._patches(a, context)
        loss = self._loss(patches * self._loss_scale if self._loss_scale != 1 else patches).mean(1)
        return Evaluation(patches.mean(1), loss, None)  # type: ignore[arg-type]

    def resize(self, num_slots: int) -> None:
        """Evaluate batches of another size from now on."""
        if num_slots != self.num_slots:
            self.num_slots, self._flat = num_slots, None

    def refresh(self, discriminator: DiscriminatorSide) -> None:
        """Take new discriminator weights into the same storage: nothing is traced again unless constants were derived."""
        fresh = self._fold(discriminator.module).to(dtype=self.compute)
        freeze.copy_weights(fresh, self.d)
        self.discriminator = discriminator
        if self._flat is not None and self._has_derived_constants(self._flat):
            self._flat = None

    def _has_derived_constants(self, graph: torch.fx.GraphModule) -> bool:
        """Whether the trace evaluated something from the weights once: such a value does not follow a refresh."""
        own = {t.untyped_storage().data_ptr() for m in (self.tail, self.d) for t in (*m.parameters(), *m.buffers())}
        constants = (attribute(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr")
        return any(c.numel() > 1 and c.untyped_storage().data_ptr() not in own for c in constants)


def attribute(module: Any, target: str) -> Any:
    """The object at a dotted name."""
    for name in target.split("."):
        module = getattr(module, name)
    return module
