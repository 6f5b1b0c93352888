"""From output rows to results: a finished block is rendered, copied to the output device and handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrefine import noise
from fastrefine.engine.machine import Machine
from fastrefine.engine.proposals import Block
from fastrefine.engine.transfer import Transfer, send
from fastrefine.ops import slots
from fastrefine.result import Result, Snapshot


class Parcel(NamedTuple):
    """A rendered block on its way to the output device."""

    reading: int  # number of counter readings requested before it
    result: Result  # its tensors are those of ``values``
    values: Transfer


class Delivery:
    """The finished blocks of one run. side: the CUDA stream for the copies, or None to copy in line."""

    def __init__(self, machine: Machine, output_device: torch.device, side: torch.cuda.Stream | None, lag: int):
        self.machine, self.output_device, self.side, self.lag = machine, output_device, side, lag
        self.parcels: deque[Parcel] = deque()

    def harvest(self, block: Block, reading: int) -> None:
        """Render a finished block, start its copy to the output device, and free its output rows."""
        generator, out = self.machine.target.generator, self.machine.outputs
        asked, rows = block.asked, self.machine.rows(block, block.asked)
        a = out.activation[self.machine.rows(block, slice(0, block.size))].clone()
        if block.activation is not None:  # rows that were not asked for stay as they were proposed
            for rest in (slice(0, block.admitted.start), slice(block.admitted.stop, block.size)):
                a[rest] = block.activation[rest]
        shaped = a.view(len(a), *generator.shape)
        images = generator.render(shaped, block.context)[asked]
        ids = send(torch.arange(block.start, block.stop), self.output_device)
        latents = shaped if generator.at == "input" else block.latents
        reported, labels = self._reported(rows), block.inputs.get("labels")
        result = Result(
            # copies: the next block takes these rows while the images are still under way
            images=images, logits=out.logit[rows].clone(), initial_logits=out.initial_logit[rows].clone(),
            steps=out.steps[rows].clone(), status=out.status[rows].to(torch.int8), ids=ids, latents=latents[asked],
            activations=shaped[asked], logit_falls=out.logit_falls[rows].clone(),
            labels=None if labels is None else labels[asked], acceptance=reported.get("accepted"),
            scale="critic" if self.machine.target.discriminator.scale == "critic" else "logit", report={},
            step_sizes=reported.get("step_size"), snapshots=self._snapshots(block, a),
            conditions={name: value[asked] for name, value in block.inputs.items() if name not in ("labels", noise.KEY)},
        )  # fmt: skip
        values = Transfer([t.contiguous() for t in result.tensors()], self.output_device, self.side)
        out.status[self.machine.rows(block, block.admitted)] = slots.PENDING
        self.parcels.append(Parcel(reading, result, values))

    def _reported(self, rows: slice) -> dict[str, Tensor]:
        """What the sampler reports of each sample (n,), by name; accepted trials as a share of all tests."""
        out, traits = self.machine.outputs, self.machine.rule.sampler.traits
        found = {name: out.scalars[self.machine.slots.scalar_names.index(name), rows].clone() for name in traits.reports}
        if "accepted" in found:
            found["accepted"] /= out.steps[rows] // traits.transition_steps
        return found

    def _snapshots(self, block: Block, last: Tensor) -> dict[int, Snapshot]:
        """Rendered from the rows of a whole block; a sample that retired before is as it is in ``last`` (size, F)."""
        taken, generator = self.machine.snapshots, self.machine.target.generator
        if taken is None:
            return {}
        out, rows, asked = self.machine.outputs, self.machine.rows(block, slice(0, block.size)), block.asked
        found = {}
        for index, step in enumerate(taken.steps):
            over = out.steps[rows] <= step
            a = torch.where(over[:, None], last, taken.activation[index, rows])
            shaped = a.view(len(a), *generator.shape)
            images = generator.render(shaped, block.context)[asked]
            logits = torch.where(over, out.logit[rows], taken.logit[index, rows])[asked]
            found[step] = Snapshot(images, logits, shaped[asked])
        return found

    def arrived(self, reading: int, busy: bool) -> Iterator[tuple[Result, bool]]:
        """(result, whether the host waited for it) of the blocks that have arrived, in order.

        reading: the number of readings requested so far; busy: whether the run goes on. A late driver does not wait for
        copies as long as the device has steps to run.
        """
        while self.parcels:
            number, result, values = self.parcels[0]
            if self.lag and busy and (number == reading or (number + 1 == reading and not values.ready)):
                return
            self.parcels.popleft()
            arrived = result.moved(values.wait())
            yield arrived, values.blocked
