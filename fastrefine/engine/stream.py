"""One call of sample, refine or stream: a run of the engine in the right modes, its blocks regrouped, watched, retried."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fastrefine import noise, ops
from fastrefine.engine.idle import IdleMachines
from fastrefine.engine.initial import InitialImages
from fastrefine.engine.proposals import Proposals, Source
from fastrefine.engine.run import Run, drivers
from fastrefine.engine.watch import Watch, told_when_slow
from fastrefine.errors import FastrefineError, warn
from fastrefine.networks import torch_state
from fastrefine.networks.calls import is_out_of_memory
from fastrefine.networks.copies import is_shaped
from fastrefine.networks.prepared import Networks
from fastrefine.networks.target import Target
from fastrefine.ops.slots import Rule
from fastrefine.options import Options
from fastrefine.progress import ProgressBar
from fastrefine.result import Progress, Result, Snapshot
from fastrefine.samplers.base import Sampler
from fastrefine.stopping import StopRule

log = logging.getLogger(__name__)


class SampleStream:
    """The samples of a source, with one refiner's networks. snapshots: steps after which samples are recorded."""

    def __init__(self, networks: Networks, options: Options, source: Source, snapshots: tuple[int, ...], idle: IdleMachines):
        self.networks, self.options, self.source = networks, options, source
        self.snapshots, self.idle, self.progress = snapshots, idle, Progress()
        on_gpu = self.options.device.type == "cuda"
        self.stream = torch.cuda.current_stream(self.options.device) if on_gpu else None

    def parts(self, chunk: int) -> Iterator[Result]:
        """Consecutive parts of ``chunk`` samples, the last one shorter; one empty part for no samples."""
        held: list[Result] = []
        count = 0
        for block in self._blocks():
            held.append(block)
            count += len(block)
            while count >= chunk:
                together = Result.concatenate(held)
                rest = together.select(slice(chunk, None))
                # a part owns its memory: a view would keep, and torch.save write, the whole block
                yield Result.concatenate([together.select(slice(0, chunk))]) if len(rest) else together
                held, count = [rest] if len(rest) else [], len(rest)
        if held:
            yield Result.concatenate(held)

    def _blocks(self) -> Iterator[Result]:
        """Results block by block; out of memory halves the slots for the rest, unless deterministic or in lock step."""
        options, source = self.options, self.source
        size = options.slots_for(source.count)
        watch, found = Watch(options, source.latents is None, is_shaped(self.networks.discriminator)), []
        initial = InitialImages(options, source)
        with ProgressBar(source.count, "refining", "images", options.progress) as bar:
            while True:
                try:
                    with self._modes(None, size), told_when_slow(not self.networks.is_prepared):
                        target = self.networks.prepare(source.latents, source.inputs, source.seed, size)
                        bound, known = self.networks.bound, copy.deepcopy(self.networks.real)  # the caller's own
                    initial.use(target)
                    kept: dict[str, Any] = {"initial": initial}
                    kept |= {} if known is None else {"real_logits": known.logits, "real_labels": known.labels}
                    highest = options.highest(None if known is None else known.logits)
                    if source.count == 0:
                        yield replace(self._empty(target), **kept)
                        return
                    blocks: Iterator[Result] | None = None
                    while source.count:
                        # modes are entered around each block alone: between two parts the caller's are in force
                        with self._modes(target, size) as threads, told_when_slow(not self.networks.is_prepared):
                            blocks = blocks or self._run(target, source, bar, bound).parts()
                            self.progress.facts["threads"] = threads
                            part = next(blocks)
                            watch.see(part if known is None else replace(part, real_logits=known.logits), highest)
                            source = source.after(source.first + len(part))
                            if not source.count:
                                next(blocks, None)
                        self._hand_over(part)
                        if not source.count:
                            found = watch.findings()
                        told = {"findings": [one.entry() for one in found]}
                        yield replace(part, **kept, report=part.report | told)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.idle.machine = None
                    size = self._fewer_slots(size, error)
        for one in found:
            warn(one.warning())

    def _fewer_slots(self, size: int, error: BaseException) -> int:
        """Half the slots after memory ran out; FastrefineError where their number may not change."""
        options = self.options
        fixed = "deterministic=True" if options.deterministic else None
        fixed = fixed or ("coupling='lockstep'" if options.coupling == "lockstep" else None)
        if fixed or size == 1:
            reason = f" ({fixed} never changes it by itself)" if fixed else ""
            raise FastrefineError(f"out of memory with {size} slots; pass a smaller num_slots{reason}") from error
        size //= 2
        level = logging.INFO if size < options.slots_for(self.source.count) // 2 else logging.WARNING
        log.log(level, "out of memory: going on with %d slots, which changes the bits of what follows", size)
        return size

    @contextlib.contextmanager
    def _modes(self, target: Target | None, size: int) -> Iterator[int]:
        """torch's modes for our work, on the CUDA stream that was current when the call began; yields the threads."""
        options = self.options
        with contextlib.ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            stack.enter_context(torch_state.quiet_torch(options.device))
            stack.enter_context(torch_state.arithmetic(options.precision, options.deterministic))
            flops = None
            if target is not None:
                stack.enter_context(target.generator.evaluation_mode())
                flops = None if target.flops is None else target.flops * size
            yield stack.enter_context(torch_state.threads_for(flops))

    def _run(self, target: Target, source: Source, bar: ProgressBar, bound: tuple[Sampler, StopRule] | None) -> Run:
        options, progress = self.options, self.progress
        assert bound is not None
        sampler, stop = bound
        kernel = sampler.kernel()
        backend = ops.choose(options.device, None if kernel is None else kernel.rule)
        driver = drivers.choose(options.driver, options.device)
        progress.facts = {
            "backend": backend, "driver": driver.name, "precision": options.precision, "threads": 0,
            "num_slots": target.num_slots, "route": target.route,
            "folded": target.folded, "channels_last": target.channels_last, "repeatable": target.repeatable,
        }  # fmt: skip
        lockstep = options.coupling == "lockstep"
        real = self.networks.real if options.needs_real else None
        proposals = Proposals(
            source, target, stop, real, options.max_steps, target.num_slots, options.dtype, options.device,
            whole_blocks=lockstep,
        )  # fmt: skip
        rule = Rule(sampler, source.seed, options.keep == "best", lockstep, options.max_grad_norm, self.snapshots)
        total = bar.total
        progress.finished = progress.delivered

        def on_step(step: int, finished: int) -> None:
            bar.to(min(finished, total))
            if options.callback is not None:
                options.callback({"step": step, "finished": min(finished, total), "total": total})

        made = Run(
            proposals, target, rule, backend, driver, progress, options.output_device, self.idle, on_step,
            may_fall_back=options.driver == "auto",
        )  # fmt: skip
        if options.deterministic and options.device.type == "cpu":
            target.check_repeatable()
        return made

    def _hand_over(self, part: Result) -> None:
        """Results that stay on the GPU were written on the stream of the run; the caller may be on another by now."""
        if self.stream is None or not part.images.is_cuda:
            return
        now = torch.cuda.current_stream(part.images.device)
        if now != self.stream:
            now.wait_stream(self.stream)
            for tensor in part.tensors():
                tensor.record_stream(now)

    def _empty(self, target: Target) -> Result:
        """No samples, with the shapes that samples would have."""
        options, source, g = self.options, self.source, target.generator
        none, whole = torch.zeros(0, dtype=options.dtype), torch.zeros(0, dtype=torch.int32)
        latents = source.latents if source.latents is not None else none.view(0, *options.prior.shape)  # type: ignore[union-attr]
        images, activations = none.view(0, *g.image_shape), none.view(0, *g.shape)
        assert self.networks.bound is not None
        reports, report = self.networks.bound[0].traits.reports, self.progress.report() | {"findings": []}
        empty = Result(
            images, none, none, whole, whole.to(torch.int8), whole.long(), latents, activations, whole,
            source.inputs.get("labels"), none if "accepted" in reports else None, options.scale, report,
            step_sizes=none if "step_size" in reports else None,
            snapshots={step: Snapshot(images, none, activations) for step in self.snapshots},
            conditions={name: value for name, value in source.inputs.items() if name not in ("labels", noise.KEY)},
        )  # fmt: skip
        return empty.moved([tensor.to(options.output_device) for tensor in empty.tensors()])
