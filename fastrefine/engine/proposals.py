"""Proposals by sample id: blocks of num_slots consecutive ids that go through the prefix together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrefine.engine.transfer import send
from fastrefine.networks.target import Target
from fastrefine.priors import Prior
from fastrefine.stopping import RealLogits, StopRule

DRAWN_TOGETHER = 16  # blocks


@dataclass(frozen=True)
class Block:
    """The samples with ids from index * size to (index + 1) * size - 1, of which those in [start, stop) were asked for."""

    index: int
    size: int
    start: int
    stop: int
    whole: bool  # every id enters the pool, so that lock-step groups are complete
    latents: Tensor
    inputs: dict[str, Tensor]  # labels and conditions
    activation: Tensor | None  # (size, F); None once every row is in the pool
    context: tuple[Tensor, ...]
    threshold: Tensor
    last_step: Tensor
    reference_logit: Tensor

    @property
    def base(self) -> int:
        """The id of row 0."""
        return self.index * self.size

    @property
    def asked(self) -> slice:
        """The rows that were asked for."""
        return slice(self.start - self.base, self.stop - self.base)

    @property
    def admitted(self) -> slice:
        """The rows that enter the pool."""
        return slice(0, self.size) if self.whole else self.asked


@dataclass(frozen=True)
class Source:
    """Where the latents, labels and conditions of ids [first, first + count) come from.

    proposals: n, of which each sample starts from one. Those of sample id are the latents that the prior draws for the ids
    n id ... n id + n - 1, or n consecutive rows of ``latents``. choice: (count,) uint8, which one, once it is known; the
    sources ``after`` this one share its memory.
    """

    first: int
    count: int
    seed: int
    prior: Prior | None
    latents: Tensor | None
    inputs: dict[str, Tensor]
    proposals: int = 1
    choice: Tensor | None = None

    def after(self, first: int) -> Source:
        """The rest of the source from id ``first`` on."""
        skip = first - self.first
        latents = None if self.latents is None else self.latents[skip * self.proposals :]
        inputs = {name: value[skip:] for name, value in self.inputs.items()}
        choice = None if self.choice is None else self.choice[skip:]
        return Source(first, self.count - skip, self.seed, self.prior, latents, inputs, self.proposals, choice)

    def given(self, ids: Tensor, dtype: torch.dtype, which: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (n, ...) and inputs of ids (n,). Ids outside the source repeat the nearest one's, but for drawn latents.

        which: of the proposals of each. None: the one that was chosen.
        """
        rows = self._rows(ids)
        among: Tensor | int = which or 0
        if which is None and self.choice is not None:
            among = self.choice[rows].long()
        if self.latents is not None:
            return self.latents[send(rows * self.proposals + among, self.latents.device)].to(dtype), self.inputs_of(ids)
        assert self.prior is not None
        return self.prior.sample(ids * self.proposals + among, self.seed, dtype), self.inputs_of(ids)

    def inputs_of(self, ids: Tensor) -> dict[str, Tensor]:
        """Labels and conditions of ids; outside the source those of the nearest id."""
        return {name: value[self._rows(ids)] for name, value in self.inputs.items()}

    def _rows(self, ids: Tensor) -> Tensor:
        return (ids - self.first).clamp(0, self.count - 1)


class Proposals:
    """Blocks of a source. A sample has place id % size in its block, so that the prefix gives it equal bits in any run."""

    def __init__(
        self, source: Source, target: Target, stop: StopRule, real: RealLogits | None,
        max_steps: int, size: int, dtype: torch.dtype, device: torch.device, whole_blocks: bool = False,
    ):  # fmt: skip
        self.source, self.generator, self.stop, self.real = source, target.generator, stop, real
        self.discriminator = target.discriminator
        self.max_steps, self.size, self.dtype, self.device, self.whole = max_steps, size, dtype, device, whole_blocks
        end = source.first + source.count
        self.indices = range(source.first // size, -(-end // size)) if source.count else range(0)
        self.first_id = self.indices.start * size if whole_blocks else source.first
        self._drawn_from = -1  # first block of the group below
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None

    def _draws(self, index: int) -> tuple[Tensor, ...]:
        """(threshold, last step, reference logit) of a block. Many blocks are drawn at once: a draw is many small ops."""
        group = index - (index - self.indices.start) % DRAWN_TOGETHER
        if group != self._drawn_from or self._drawn is None:
            ids = torch.arange(group * self.size, min(group + DRAWN_TOGETHER, self.indices.stop) * self.size)
            labels, seed = self.source.inputs_of(ids).get("labels"), self.source.seed
            classes = labels.argmax(1) if labels is not None and labels.dim() > 1 else labels
            threshold, last_step = self.stop.draw(ids, seed, self.max_steps, classes)
            unknown = torch.full((len(ids),), torch.nan)
            reference = unknown if self.real is None else self.real.reference(ids, seed, classes)
            self._drawn_from, self._drawn = group, (threshold, last_step, reference)
        rows = slice((index - group) * self.size, (index - group + 1) * self.size)
        return tuple(drawn[rows] for drawn in self._drawn)

    def block(self, index: int) -> Block:
        """Run the prefix for one block. Rows outside the source are padding: they repeat the nearest sample."""
        source, base, ids = self.source, index * self.size, torch.arange(index * self.size, (index + 1) * self.size)
        threshold, last_step, reference = self._draws(index)
        start, stop = max(base, source.first), min(base + self.size, source.first + source.count)
        if source.choice is not None:
            chosen = self._best(ids)[start - base : stop - base]
            source.choice[start - source.first : stop - source.first] = chosen.to(source.choice)
        latents, inputs, a, context = self._activation(ids)
        drawn = (send(t, self.device) for t in (threshold.to(self.dtype), last_step, reference.to(self.dtype)))
        return Block(index, self.size, start, stop, self.whole, latents, inputs, a.reshape(self.size, -1), context, *drawn)

    def _activation(
        self, ids: Tensor, which: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
        """(latents, inputs, activation, context) of ids, on the device."""
        latents, inputs = self.source.given(ids, self.dtype, which)
        latents, inputs = send(latents, self.device), {name: send(value, self.device) for name, value in inputs.items()}
        return latents, inputs, *self.generator.prefix(latents, inputs)

    def _best(self, ids: Tensor) -> Tensor:
        """(n,) which proposal of each id has the highest logit, the first of equal ones; one that is not finite is the last."""
        highest, best = torch.full((len(ids),), -torch.inf, device=self.device), torch.zeros(len(ids), device=self.device)
        for which in range(self.source.proposals):
            _, inputs, a, context = self._activation(ids, which)
            logits = self.discriminator.score(self.generator.render(a, context), inputs)
            better = torch.isfinite(logits) & (logits > highest)
            highest, best = torch.where(better, logits, highest), torch.where(better, which, best)
        return best
