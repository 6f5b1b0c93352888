"""What a run works on: its tensors, its target, and one step over them, which a driver repeats."""

from __future__ import annotations

from typing import Any

import torch

from fastrefine import ops
from fastrefine.engine.proposals import Block
from fastrefine.networks.target import Target
from fastrefine.ops import slots
from fastrefine.ops.slots import Rule


class Machine:
    """Tensors of fixed shapes and addresses. A step has no decision of the host in it, so that it can be captured."""

    def __init__(self, target: Target, rule: Rule, backend: str, window: int, pool_rows: int, block: Block):
        self.target, self.rule, self.backend = target, rule, backend
        self.window, self.pool_rows = window, pool_rows
        a = block.activation
        assert a is not None
        view = target.view_of(a.dtype) if backend == "triton" else {}
        self.slots, self.pool, self.outputs = slots.allocate(
            target.num_slots, a.shape[1], pool_rows, window, rule, a.dtype, a.device, block.inputs.get("labels"), **view
        )
        self.snapshots = slots.snapshots(self.slots, self.outputs, rule.snapshots) if rule.snapshots else None
        given = self._step_context(block)
        self.context = tuple(c.clone() for c in given)
        self.pool_context = tuple(c.new_zeros(pool_rows, *c.shape[1:]) for c in given)
        self.captured: dict[str, Any] = {}  # a driver's recordings of the step
        self.era, self._kept = target.era, target.calls  # a captured step goes on reading their constants

    def reset(self, rule: Rule, first_id: int) -> None:
        """Empty the slots and the pool; the next proposal will be ``first_id``."""
        self.rule = rule
        self.slots.sample_id.fill_(-1)
        for tensor in (self.slots.step, self.slots.last_step, self.slots.activation, self.pool.counters):
            tensor.zero_()
        if self.slots.view is not None:
            self.slots.view.zero_()
        self.outputs.status.fill_(slots.PENDING)
        self.pool.counters[: slots.END + 1] = first_id

    def rows(self, block: Block, part: slice) -> slice:
        """Output rows of a part of a block; the window is a whole number of blocks, so they are consecutive."""
        base = block.base % self.window
        return slice(base + part.start, base + part.stop)

    def admit(self, block: Block) -> None:
        """Put the block's proposals into the pool; its rows there must be free."""
        assert block.activation is not None
        base, part = block.base % self.pool_rows, block.admitted  # the pool is a whole number of blocks
        rows = slice(base + part.start, base + part.stop)
        for name in ("activation", "threshold", "last_step", "reference_logit"):
            getattr(self.pool, name)[rows] = getattr(block, name)[part]
        if self.pool.label is not None:
            self.pool.label[rows] = block.inputs["labels"][part]
        for own, new in zip(self.pool_context, self._step_context(block), strict=True):
            own[rows] = new[part]
        self.pool.counters[slots.END] = block.base + part.stop

    def refill(self) -> None:
        """Fill the slots, all of which are empty. Where the rule's numbers live on the device, they are loaded."""
        ops.refine_step(self.slots, None, self.pool, self.outputs, self.rule, backend=self.backend)
        self._copy_context()

    def step(self, forward_only: bool = False) -> None:
        """Evaluate every slot, then observe, retire or propose, refill. An empty slot computes along without harm.

        forward_only: without a gradient; serves the slots at their last step, all others wait.
        """
        own = self.slots
        evaluate = self.target.forward if forward_only else self.target.evaluate
        evaluation = evaluate(own.activation, self.context, own.view)
        if forward_only:
            evaluation = evaluation._replace(grad=None)  # type: ignore[arg-type]
        ops.refine_step(own, evaluation, self.pool, self.outputs, self.rule, backend=self.backend)
        if self.snapshots is not None:
            self._record(self.snapshots)
        self._copy_context()

    def _record(self, snapshots: slots.Snapshots) -> None:
        """Samples that have just been moved for the (k + 1)-th time: the sampler's state is of the k-th evaluation."""
        own, window = self.slots, len(self.outputs.status) - 1
        position = self.rule.sampler.position(own.state) if own.best is None else own.best
        logit = own.state["logit"] if own.best_logit is None else own.best_logit
        for index, step in enumerate(snapshots.steps):
            rows = torch.where((own.sample_id >= 0) & (own.step == step + 1), own.sample_id % window, window)
            snapshots.activation[index].index_copy_(0, rows, position)
            snapshots.logit[index].index_copy_(0, rows, logit)

    def _copy_context(self) -> None:
        """Copy the context of the samples that have just entered a slot from the pool."""
        if self.context:
            ops.copy_context(self.slots, self.context, self.pool_context, backend=self.backend)

    def _step_context(self, block: Block) -> tuple[torch.Tensor, ...]:
        """What the target needs of a sample besides its activation, as far as it does not depend on the activation."""
        given = *block.context, *self.target.discriminator.call.values(block.inputs)
        return self.target.carried(block.activation, given, self.slots.view is not None)
