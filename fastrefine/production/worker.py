"""One worker of a run: it prepares the networks, makes its share of the shards, and writes each with its marker."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrefine import stopping
from fastrefine.diagnosis.calibration import check_trust
from fastrefine.diagnosis.findings import Finding
from fastrefine.diagnosis.tally import Tally, summary
from fastrefine.engine.watch import findings_of
from fastrefine.errors import FastrefineWarning, InputError, warn
from fastrefine.networks.copies import is_shaped
from fastrefine.noise import Stream, uniform
from fastrefine.production import formats, per_image_selection, saved_pair
from fastrefine.production.conditions import load_conditions
from fastrefine.production.configuration import CLASSES, USUAL_RANGE, Configuration, Shard, in_ranges, ranges
from fastrefine.production.images import load_labelled, scaled
from fastrefine.production.named_code import Trust
from fastrefine.production.per_image_selection import Chooser
from fastrefine.production.run_folder import Folder
from fastrefine.production.weights_file import digest
from fastrefine.progress import ProgressBar
from fastrefine.refiner import Refiner
from fastrefine.result import Result, Status

log = logging.getLogger(__name__)
HELD = 4096  # proposals in memory at once, about
STREAMED = 2**20  # proposals of one stream; their labels are in memory (with conditions: HELD)


@dataclass
class Outcome:
    """What a worker did. made, found: shards it made, and that were done already; images: in both. refined: images that were
    not there before.

    seconds: of the whole; seconds_writing: of its writing thread. unselected, nonfinite: images with that fate. summary: of the
    whole run as far as it is done, by all workers, as the manifest has it: ``Worker.summary``.
    """

    made: int = 0
    found: int = 0
    images: int = 0
    refined: int = 0
    seconds: float = 0.0
    seconds_writing: float = 0.0
    unselected: int = 0
    nonfinite: int = 0
    summary: dict[str, Any] = field(default_factory=dict)


class Worker:
    """The networks of a configuration, prepared once; any number of shards may be made with it.

    device: as for Refiner. labels: the caller gives labels itself, so networks may need them without ``classes`` in the
    configuration. trust_code: code that is no torch.nn.Module class may be named too, as in ``load_pair``; a ``Trust`` says of
    which texts. Raises InputError on what does not fit.
    """

    def __init__(
        self, configuration: Configuration, *, device: str | None = None, allow_pickle: bool = False, labels: bool = False,
        trust_code: bool | Trust = False,
    ):  # fmt: skip
        trust = trust_code if isinstance(trust_code, Trust) else Trust(trust_code)
        pair, configuration = saved_pair.configured(configuration, trust=trust, allow_pickle=allow_pickle)
        self.pair, self.configuration = pair, configuration
        c = configuration
        if c.select != "none" and c.discriminator_output == "critic":
            raise InputError(f"select={c.select} reads logits of a probability, and a critic has none; use select=none")
        taken = [pair.takes_labels(caller) for caller in saved_pair.FUNCTIONS]
        required = any(needs for _, needs in taken)
        if required and c.classes is None and not labels:
            number = "" if c.num_classes else ", and --num-classes, how many there are"
            raise InputError(f"the networks need labels: pass --class 3, or --class balanced (or random){number}")
        if c.classes in CLASSES and c.num_classes < 1:
            raise InputError(f"{c.classes} classes need --num-classes (num_classes), how many there are")
        self.labelled = c.classes is not None or required or (labels and c.num_classes > 0 and any(takes for takes, _ in taken))
        real, classes = self.real_images(c.real) if c.real else (None, None)
        if real is not None and classes is None and self.labelled and (taken[1][0] or (labels and required)):
            raise InputError(f"the networks take labels, and {c.real} has none: wanted class folders, or arr_1 in a .npz")
        self.real_classes = classes
        self.refiner = Refiner.from_pair(
            pair, sampler=c.sampler, max_steps=c.max_steps, stop=c.stop, real=real,
            real_labels=classes if self.labelled else None, num_slots=c.num_slots, device=device, precision=c.precision,
            keep=c.keep, proposals=c.best_of, callback=self._on_step,
        )  # fmt: skip
        self._bar: ProgressBar | None = None
        self._before = 0  # images of this worker's earlier streams
        self.conditions = load_conditions(c.conditions) if c.conditions else {}
        self.group = (c.group_size or c.num_slots) if c.coupling == "lockstep" else 1
        self.facts: dict[str, Any] = {
            "generator_sha256": digest(pair.generator), "discriminator_sha256": digest(pair.discriminator),
            "code": [[_code(spec.code), spec.arguments] for spec in pair.specs],
            "real_sha256": None if real is None else _sha256(real, self.refiner.real_labels),
            "conditions_sha256": hashlib.sha256(Path(c.conditions).read_bytes()).hexdigest() if c.conditions else None,
        }  # fmt: skip
        # networks that do not fit raise here, before a folder is claimed
        few = torch.arange(min(4, *map(len, self.conditions.values())) if self.conditions else 0)
        first = self.refiner.replaced(max_steps=0)
        made = first.sample(len(few), labels=0 * few if self.labelled else None, conditions=self._conditions(few))
        shape = made.images.shape[1:]
        if c.classes is not None:
            sampled = range(c.num_classes) if c.classes in CLASSES else range(int(c.classes), int(c.classes) + 1)
            self.refiner.check_labels(torch.tensor(sampled[-1:]))
            missing = set(sampled) - set(sampled if classes is None else classes.tolist())
            if missing:
                raise InputError(f"{c.real} has no image of class {min(missing)}; wanted some of every class that is sampled")
        formats.check_shape(c.format, tuple(shape))
        self.chooser = self._chooser()
        self.trust_checked = self.chooser is None or self.chooser.calibration is not None
        self.facts["selection"] = per_image_selection.described(self.chooser)

    def folder(self, outdir: Path) -> Folder:
        """The run's folder; InputError where it is another run's, or where an image has no row of the conditions."""
        c, last = self.configuration, ranges(self.configuration.ids)[-1].stop
        rows = min(map(len, self.conditions.values()), default=last)
        if rows < last:
            raise InputError(
                f"{c.conditions} has {rows} rows, but image {last - 1} is asked for; wanted a row for each, from 0"
            )
        if (c.classes in CLASSES or self.conditions) and c.shard_size * c.proposals % self.group:
            each = f"{c.proposals} proposals of each image" if c.proposals > 1 else "images"
            raise InputError(
                f"shard_size is {c.shard_size}; in lock step labels and conditions of a whole group decide, so wanted shards "
                f"whose {each} are whole groups of {self.group}"
            )
        return Folder.claim(outdir, self.configuration, self.facts)

    def run(self, outdir: Path, *, worker: int = 0, workers: int = 1, progress: bool | None = False) -> Outcome:
        """Make this worker's share of the run (``Folder.share``), except for the images that are there.

        progress: as for ``ProgressBar``. A shard is written while the next is made.
        """
        folder, outcome, started = self.folder(outdir), Outcome(), time.perf_counter()

        def count(shard: Shard, facts: dict[str, Any]) -> None:
            outcome.images += shard.count
            outcome.unselected += facts.get("unselected", 0)
            outcome.nonfinite += facts.get("status", {}).get("NONFINITE", 0)
            outcome.seconds = time.perf_counter() - started

        todo: list[Shard] = []
        whole: dict[int, Shard] = {}
        kept: dict[int, tuple[formats.Batch, dict[str, Any]]] = {}
        for shard in folder.share(worker, workers):
            problem = folder.problem(shard)
            if not problem:
                outcome.found += 1
                count(shard, folder.facts(shard))
                continue
            whole[shard.index] = shard
            if problem != "missing":
                there = folder.kept(shard)
                if there is None:
                    log.warning("%s: %s; made anew", folder.file(shard).name, problem)
                else:
                    kept[shard.index] = there
                    has = set(there[0].columns["ids"].tolist())
                    shard = Shard(shard.index, in_ranges(one for one in shard.ids if one not in has))
            todo.append(shard)
        known = outcome.images + sum(facts["count"] for _, facts in kept.values())
        total, self._before = known + sum(shard.count for shard in todo), known
        made = self.make(todo)
        name = "refining" if workers == 1 else f"worker {worker} refining"
        with ProgressBar(total, name, "images", progress, done=known) as self._bar:
            following = next(made, None)
            with ThreadPoolExecutor(1, "fastrefine-writer") as writer:
                while following is not None:
                    shard, batch, facts = following
                    outcome.refined += shard.count
                    if shard.index in kept:
                        there = kept.pop(shard.index)
                        batch, facts = formats.joined([there[0], batch]), _added(there[1], facts)
                    written = writer.submit(folder.write, whole[shard.index], batch, facts)
                    following = next(made, None)
                    outcome.seconds_writing += written.result()
                    outcome.made += 1
                    count(whole[shard.index], facts)
        self._bar = None
        outcome.summary = folder.record(lambda: self.summary(folder))
        return outcome

    def summary(self, folder: Folder) -> dict[str, Any]:
        """What the run did as far as it is done, from the markers of its shards: ``tally.summary``, and what is wrong with it.

        of: images of the whole run. seconds: of work, those of all workers added up; images_per_second: of one worker.
        findings: {"code", "text", "advice"}. Logits and steps are those of the images, under selection of the chosen ones.
        """
        sums: Counter[str] = Counter()
        seconds, unselected = 0.0, 0
        for facts in folder.done():
            sums.update(facts.get("tally", {}))  # markers of before have none
            seconds += facts.get("seconds", 0.0)
            unselected += facts.get("unselected", 0)
        found = findings_of(sums, self.refiner.options, shaped=is_shaped(self.refiner.discriminator))
        images = int(sums["samples"])
        if unselected:
            found.append(Finding(
                "unselected", f"{unselected} of {images} images had no proposal accepted and hold their first one "
                '("selected" is false)', command="a longer --chain-length makes them fewer",
            ))  # fmt: skip
        total = sum(shard.count for shard in folder.shards())
        return {
            **summary(sums), "of": total, "complete": images == total, "seconds": seconds,
            "images_per_second": images / seconds if seconds else 0.0, "findings": [one.entry(command=True) for one in found],
        }  # fmt: skip

    def _on_step(self, facts: dict[str, int]) -> None:
        if self._bar is not None:
            self._bar.to(self._before + facts["finished"] // self.configuration.proposals)

    def make(self, todo: list[Shard]) -> Iterator[tuple[Shard, formats.Batch, dict[str, Any]]]:
        """(shard, its images, further facts for its marker); each depends on the configuration only.

        Shards that follow one another are refined as one stream, so that slots run empty only at its end.
        """
        pieces = self._pieces([run for shard in todo for run in shard.runs])
        for shard in todo:
            began, tally = time.perf_counter(), Tally()
            outs, selected = zip(*(next(pieces) for _ in shard.runs), strict=True)
            images = torch.cat([out.images for out in outs])
            names = ["logits", "steps", "status", *(["labels"] if outs[0].labels is not None else [])]
            columns = {name: torch.cat([getattr(out, name) for out in outs]).cpu().numpy() for name in names}
            columns = {"ids": np.array(shard.ids, np.int64), **columns}
            counts = Counter(Status(int(s)).name for s in columns["status"])
            facts: dict[str, Any] = {"status": dict(counts), "num_slots": min(out.report["num_slots"] for out in outs)}
            for out in outs:
                tally.add(out, self.refiner.options.highest(out.real_logits))
            facts |= {"tally": {name: value for name, value in tally.sums.items() if value}}
            if self.chooser is not None:
                columns["selected"] = torch.cat(selected).numpy()
                facts["unselected"] = int((~columns["selected"]).sum())
            facts["seconds"] = time.perf_counter() - began
            yield shard, formats.Batch(images, columns, self.configuration.value_range), facts

    def _pieces(self, runs: list[range]) -> Iterator[tuple[Result, Tensor]]:
        """Result of each run of ids, and which of its images were selected."""
        together = HELD if self.conditions else STREAMED
        for group in _streams(runs, max(together // self.configuration.proposals, 1)):
            parts = self._parts(range(group[0].start, group[-1].stop))
            held: list[Result] = []
            chosen: list[Tensor] = []
            for run in group:
                while sum(len(part) for part in held) < len(run):
                    part, selected = next(parts)
                    held.append(part)
                    chosen.append(selected)
                out, selected = Result.concatenate(held), torch.cat(chosen)
                yield out.select(slice(0, len(run))), selected[: len(run)]
                held, chosen = [out.select(slice(len(run), None))], [selected[len(run) :]]

    def _parts(self, ids: range) -> Iterator[tuple[Result, Tensor]]:
        """Results of consecutive ids in parts, and which of their images were selected."""
        c, length = self.configuration, self.configuration.proposals
        owners = torch.arange(ids.start, ids.stop).repeat_interleave(length)
        labels, conditions = self._labels(owners), self._conditions(owners)
        per_part = max(min(HELD, c.num_slots) // length, 1) * length
        first: list[Result] = []  # as long as whether D may be trusted is not checked
        steps = done = 0
        stream = self.refiner.stream(
            len(ids) * length, first_id=ids.start * length, seed=c.seed, chunk=per_part, labels=labels,
            conditions=conditions,
        )  # fmt: skip
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FastrefineWarning)  # the command prints counts of the whole run
                part = next(stream, None)
            if part is None:
                return
            done += len(part)
            if self._bar is not None:
                steps += int(part.steps.sum())
                self._bar.note = f"mean steps {steps / done:.1f}"
            last = done == len(owners)
            self._before += len(ids) * last
            if not self.trust_checked:
                first.append(part)
                if last or done >= HELD:
                    check_trust(Result.concatenate(first), f"select={c.select}", "warn")
                    self.trust_checked, first = True, []
            selected = torch.ones(len(part) // length, dtype=torch.bool)
            if self.chooser is not None:
                images = part.ids[::length] // length
                classes = None if part.labels is None else part.labels[::length].cpu()
                column, selected = self.chooser.choose(part.logits.view(-1, length), images, classes)
                part = part.select(torch.arange(len(images)) * length + column)
            yield part, selected

    def conditions_of(self, n: int) -> dict[str, Tensor] | None:
        """The conditions of n samples that are no images of a run."""
        return self._conditions(torch.arange(n))

    def _conditions(self, ids: Tensor) -> dict[str, Tensor] | None:
        """The rows of images; ids beyond the last row, which no image has, begin again."""
        return {name: value[ids % len(value)] for name, value in self.conditions.items()} or None

    def _labels(self, ids: Tensor) -> Tensor | None:
        c = self.configuration
        if c.classes is None:
            return None
        if c.classes == "random":
            u = uniform(c.seed, ids, torch.ones_like(ids), 1, Stream.BATCH)[:, 0]
            return (u * c.num_classes).long().clamp(max=c.num_classes - 1)
        if c.classes == "balanced":
            return ids % c.num_classes
        return torch.full_like(ids, int(c.classes))

    def _chooser(self) -> Chooser | None:
        """The chooser with what it needs to know before the first image; None without selection."""
        c = self.configuration
        if c.select == "none":
            return None
        real = held_out = None
        if self.refiner.real is not None:
            real = stopping.RealLogits(self.refiner.real_logits(f"select={c.select}"), self.refiner.real_labels)
            held_out = real.logits if c.calibrate else None
        if c.held_out:
            images, classes = self.real_images(c.held_out)
            reads = self.labelled and self.pair.takes_labels("discriminate")[0]
            if reads and classes is None:
                raise InputError(f"the discriminator takes labels, and {c.held_out} has none")
            held_out = self.refiner.score(images, classes if reads else None).double().cpu()
            self.facts["held_out_sha256"] = _sha256(images, classes)
        if c.select == "mh" and held_out is None:  # needs no pilot pass
            return Chooser(c, {}, real)
        n = per_image_selection.pilot_size(c)
        ids = torch.arange(n)
        labels = ids % c.num_classes if c.classes in CLASSES else self._labels(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastrefineWarning)
            pilot = self.refiner.sample(  # with ids that no image owns
                n, first_id=2**32 - n, seed=c.seed, labels=labels, conditions=self._conditions(ids)
            )
        chooser = Chooser.piloted(c, pilot.logits.cpu(), labels, real, held_out)
        after = chooser.calibration and chooser.calibration.after
        if after and not after.trusted:
            text = (
                f"after {c.calibrate} calibration D's logits are no density ratio yet: z = {after.z:.1f}, ece = {after.ece:.3f}"
            )
            more = "more --held-out images, or another --calibrate, may do better"
            warn(Finding("uncalibrated", text, more, more).warning())
        return chooser

    @property
    def num_classes(self) -> int:
        """How many classes there are: as configured, else by the labels of the real images; 0 where neither says it."""
        seen = self.real_classes
        return self.configuration.num_classes or (0 if seen is None else int(seen.max()) + 1)

    def real_images(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Real samples of ``path``, and their labels; images and sound in the generator's range."""
        usual = self.configuration.value_range == USUAL_RANGE
        real, classes = load_labelled(path, signed=not usual, images_only=False)
        return (real if usual or real.ndim not in (3, 4) else scaled(real, self.configuration.value_range)), classes


def _added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The facts of two parts of a shard as those of the whole."""
    facts: dict[str, Any] = {name: a[name] + b[name] for name in ("seconds", "unselected") if name in b}
    for name in ("status", "tally"):
        facts[name] = Counter(a[name])
        facts[name].update(b[name])  # + would drop what is negative
    return {**facts, "num_slots": min(a["num_slots"], b["num_slots"])}


def _streams(runs: list[range], limit: int) -> list[list[range]]:
    """The runs in groups that follow one another without a gap, of at most ``limit`` ids unless one run is longer."""
    groups: list[list[range]] = []
    for run in runs:
        if groups and groups[-1][-1].stop == run.start and run.stop - groups[-1][0].start <= limit:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _code(where: str) -> str:
    """What makes a network: "package.module:callable", or the sha256 of an archive."""
    return hashlib.sha256(Path(where).read_bytes()).hexdigest() if where.endswith(".pt2") else where


def _sha256(images: Tensor, labels: Tensor | None) -> str:
    found = hashlib.sha256(images.numpy().tobytes())
    if labels is not None:
        found.update(labels.numpy().tobytes())
    return found.hexdigest()
