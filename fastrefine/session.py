"""One call of sample, refine or stream: the engine's blocks within the right modes, regrouped, watched, retried."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastrefine import drivers, ops, settings
from fastrefine.engine import Progress, Run
from fastrefine.errors import FastrefineError, FastrefineWarning, NonFiniteError
from fastrefine.pair import is_out_of_memory, quiet_torch
from fastrefine.pool import Proposals, Source
from fastrefine.result import Result, Snapshot, Status
from fastrefine.slots import Rule
from fastrefine.steps import Tally
from fastrefine.target import Target

if TYPE_CHECKING:
    from fastrefine.refiner import Refiner

log = logging.getLogger("fastrefine")


def parts(refiner: Refiner, source: Source, chunk: int, snapshots: tuple[int, ...] = ()) -> Iterator[Result]:
    """The source's samples in consecutive parts of ``chunk``, the last one shorter; one empty part for no samples."""
    held: list[Result] = []
    count = 0
    for block in _blocks(refiner, source, snapshots):
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


def _blocks(refiner: Refiner, source: Source, snapshots: tuple[int, ...]) -> Iterator[Result]:
    """Results block by block; out of memory halves the slots for the rest, unless deterministic or in lock step."""
    progress, size, watch = Progress(), refiner.num_slots, _Watch(refiner, source.latents is None)
    stream = torch.cuda.current_stream(refiner.device) if refiner.device.type == "cuda" else None
    lockstep = refiner.coupling == "lockstep"
    with tqdm(total=source.count, unit="image", disable=not refiner.progress) as bar:
        while True:
            try:
                with _modes(refiner, None, size, stream):
                    target = refiner._prepare(source)
                    target.resize(size)
                known = copy.deepcopy(refiner._real_logits)  # the caller's own
                real: dict[str, Any] = {} if known is None else {"real_logits": known.logits, "real_labels": known.labels}
                if source.count == 0:
                    yield replace(_empty(target, source, refiner, progress, snapshots), **real)
                    return
                with _modes(refiner, target, size, stream):
                    blocks = _run(refiner, target, source, progress, bar, snapshots).parts()
                while True:
                    # modes are entered around each block alone: between two parts the caller's are in force
                    with _modes(refiner, target, size, stream) as progress.facts["threads"]:
                        part = next(blocks, None)
                        if part is not None:
                            watch.see(part)
                    if part is None:
                        break
                    source = source.after(source.first + len(part))
                    _hand_over(part, stream)
                    yield replace(part, **real)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fixed = "deterministic=True" if refiner.deterministic else "coupling='lockstep'" if lockstep else None
                if fixed or size == 1:
                    reason = f" ({fixed} never changes it by itself)" if fixed else ""
                    raise FastrefineError(f"out of memory with {size} slots; pass a smaller num_slots{reason}") from error
                size //= 2
                level = logging.INFO if size < refiner.num_slots // 2 else logging.WARNING
                log.log(level, "out of memory: going on with %d slots, which changes the bits of what follows", size)
    watch.tell()


@contextlib.contextmanager
def _modes(refiner: Refiner, target: Target | None, size: int, stream: torch.cuda.Stream | None) -> Iterator[int]:
    """stream: the current one when the call began; a stream of parts may be continued under another."""
    with contextlib.ExitStack() as stack:
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(quiet_torch(refiner.device))
        stack.enter_context(settings.arithmetic(refiner.precision, refiner.deterministic))
        flops = None
        if target is not None:
            stack.enter_context(target.generator.evaluation_mode())
            flops = None if target.flops is None else target.flops * size
        yield stack.enter_context(settings.threads_for(flops))


def _run(
    refiner: Refiner, target: Target, source: Source, progress: Progress, bar: tqdm, snapshots: tuple[int, ...]
) -> Run:  # fmt: skip
    assert refiner._bound is not None
    sampler, stop = refiner._bound
    kernel = sampler.kernel()
    backend = ops.choose(refiner.device, None if kernel is None else kernel.rule)
    driver = drivers.choose(refiner.driver, refiner.device)
    progress.facts = {
        "backend": backend, "driver": driver.name, "precision": refiner.precision, "threads": 0,
        "num_slots": target.num_slots, "route": target.route, "split": target.generator.cut.route,
        "fold": target.fold, "channels_last": target.channels_last,
    }  # fmt: skip
    lockstep = refiner.coupling == "lockstep"
    real = refiner._real_logits if refiner._needs_real else None
    proposals = Proposals(
        source, target.generator, stop, real, refiner.max_steps, target.num_slots, refiner.dtype,
        refiner.device, whole_blocks=lockstep,
    )  # fmt: skip
    rule = Rule(sampler, source.seed, refiner.keep == "best", lockstep, refiner.max_grad_norm, snapshots)
    total = bar.total
    progress.finished = progress.delivered

    def on_step(step: int, finished: int) -> None:
        bar.update(min(finished, total) - bar.n)
        if refiner.callback is not None:
            refiner.callback({"step": step, "finished": min(finished, total), "total": total})

    output, may_fall_back = refiner.output_device, refiner.driver == "auto"
    return Run(proposals, target, rule, backend, driver, progress, output, on_step, may_fall_back)


def _hand_over(part: Result, stream: torch.cuda.Stream | None) -> None:
    """Results that stay on the GPU were written on the stream of the run; the caller may be on another by now."""
    if stream is None or not part.images.is_cuda:
        return
    now = torch.cuda.current_stream(part.images.device)
    if now != stream:
        now.wait_stream(stream)
        for tensor in part.tensors():
            tensor.record_stream(now)


def _empty(
    target: Target, source: Source, refiner: Refiner, progress: Progress, snapshots: tuple[int, ...]
) -> Result:  # fmt: skip
    """No samples, with the shapes that samples would have."""
    side = target.generator
    none, whole = torch.zeros(0, dtype=refiner.dtype), torch.zeros(0, dtype=torch.int32)
    latents = source.latents if source.latents is not None else none.view(0, *refiner.prior.shape)  # type: ignore[union-attr]
    images, activations = none.view(0, *side.image_shape), none.view(0, *side.shape)
    assert refiner._bound is not None
    reports = refiner._bound[0].traits.reports
    empty = Result(
        images, none, none, whole, whole.to(torch.int8), whole.long(), latents, activations, whole, source.labels,
        none if "accepted" in reports else None, refiner.scale, progress.report(),
        step_sizes=none if "step_size" in reports else None,
        snapshots={step: Snapshot(images, none, activations) for step in snapshots},
    )  # fmt: skip
    return empty.moved([tensor.to(refiner.output_device) for tensor in empty.tensors()])


class _Watch:
    """What a run tells its caller at the end, and the error for non-finite samples where that was asked for."""

    def __init__(self, refiner: Refiner, drawn: bool):
        self.refiner, self.drawn = refiner, drawn  # drawn: latents are of the prior, which some judgements assume
        self.tally = Tally()
        self.count = 0
        self.sums: Tensor | None = None  # of the rows below, where the results are

    def see(self, part: Result) -> None:
        """Without waiting for a device, unless errors were asked for."""
        bad = part.status == Status.NONFINITE
        if self.refiner.on_nonfinite == "error" and bool(bad.any()):
            ids = part.ids[bad].tolist()
            raise NonFiniteError(f"logit or gradient not finite for {len(ids)} samples, first ids {ids[:5]}")
        real = self.refiner._real_logits
        highest = torch.inf if real is None else float(real.logits.max())
        hidden = ~part.images.isfinite()
        hidden = hidden.flatten(1).any(1) if hidden.dim() > 1 else hidden
        stalled = part.status == Status.STALLED
        rows = torch.stack([bad, hidden, stalled, part.logits > highest])
        sums = rows.sum(1, dtype=torch.int64)
        self.sums = sums if self.sums is None else self.sums + sums
        self.tally.add(part)
        self.count += len(part)

    def tell(self) -> None:
        if self.sums is None:
            return
        nonfinite, hidden, stalled, above = self.sums.tolist()
        if nonfinite:
            _warn(f"{nonfinite} of {self.count} samples met a non-finite logit or gradient (status NONFINITE)")
        if hidden:
            _warn(f"{hidden} of {self.count} images hold non-finite values")
        if self.count and stalled == self.count:
            _warn(f"0 of {self.count} samples moved: every gradient was exactly zero (status STALLED)")
        if above > self.count / 2:
            _warn(f"{above} of {self.count} logits passed the highest real logit: too many or too large steps?")
        found = self.tally.diagnosis(self.refiner.sampler)
        if not found.stable and (self.drawn or not self.refiner.sampler.traits.stochastic):
            _warn(found.advice)


def _warn(text: str) -> None:
    warnings.warn(text, FastrefineWarning, stacklevel=2)
