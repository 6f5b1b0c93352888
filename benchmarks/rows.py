"""The rows of the table: what is refined, how, against whom; which rows a machine gets; the work in each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.machine import cpu_flags
from benchmarks.workloads import WORKLOADS, halves

CUTS = ("input", "first", "middle", "output")
STOPS = ("none", "median", "uniform")  # all steps; a logit that is reached half way; a random last step
SAMPLERS = ("collaborative", "backtracking", "dgflow", "dot", "ddls", "mala", "hmc")  # the first: control="fixed"
OF_LATENTS = ("ddls", "mala", "hmc")  # at the input, whatever cut was asked for


@dataclass(frozen=True)
class Row:
    """One row before it is measured. num_slots: None for the best of a few."""

    workload: str
    cut: str = "first"
    precision: str = "float32"
    stop: str = "none"
    driver: str = "auto"
    sampler: str = "collaborative"
    num_slots: int | None = None

    @property
    def module(self) -> str:
        """The cut as ``Refiner(at=)`` takes it."""
        return WORKLOADS[self.workload].cuts[self.cut]

    @property
    def label(self) -> str:
        """The row in words, of which no two rows have the same."""
        slots = f"{self.num_slots} slots" if self.num_slots else "best slots"
        return f"{self.workload} {self.cut} {self.precision} {self.stop} {self.driver} {self.sampler} {slots}"

    @property
    def rivals(self) -> tuple[str, ...]:
        """Whom ours is raced against: the baselines, ours without a stop ("fixed"), ours by replays ("graph")."""
        of_ours = ("fixed",) * (self.stop != "none") + ("graph",) * (self.driver == "loop")
        # the baselines are written for the first sampler; B0 knows no stop and takes all steps
        return (*(("b0", "b1", "b2") if self.sampler == "collaborative" else ()), *of_ours)

    def facts(self) -> dict[str, Any]:
        """The row's own keys of the results."""
        return {**asdict(self), "module": self.module, "label": self.label}


@dataclass(frozen=True)
class Scale:
    """How much work the measurements may be."""

    steps: int  # K
    rounds: int
    slots: tuple[int, ...]  # to choose from, where a row does not say
    batches: tuple[int, ...]  # the baselines' batches to choose from
    seconds: float  # of one timed run of ours, about
    rival_seconds: float  # of one timed run of a baseline, about
    samples: tuple[int, int]  # per slot: at least, and at most with a stop
    peak_size: int
    checked: int = 64  # samples whose results are compared
    exactly: int | None = None  # samples of every run, whatever its rate
    race_seconds: float = float("inf")  # rounds that would take longer in all are left out, but for the first
    compile: bool = True  # B2
    compile_mode: str | None = None

    own_sizes: bool = True  # whether networks of unusual size have (slots, batches) of their own

    def sized(self, row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(slots, batches) to choose from for the networks of a row."""
        usual = self.slots, self.batches
        return SIZES.get(row.workload, usual) if self.own_sizes else usual


# large activations need few, and SAGAN's parameter gradients at 1024 would not fit; tiny networks need many
SIZES = {"sagan128": ((64, 128, 256), (16, 64, 256)), "mlp2d": ((512, 2048, 8192), (256, 1024, 8192))}
CPU = Scale(20, 3, (64, 256), (64, 256), 3.0, 1.5, (1, 100), 1024)
GPU = Scale(
    50, 3, (256, 512, 1024, 2048), (64, 256, 1024), 2.0, 0.5, (8, 200), 8192, race_seconds=30, compile_mode="reduce-overhead"
)  # fmt: skip
TINY = Scale(4, 1, (8,), (8,), 1.0, 0.1, (1, 4), 256, checked=8, exactly=24, compile=False, own_sizes=False)
OUTPUT_BYTES, MOST_SAMPLES = 3e9, 400_000  # of the results of one run


def cpu_rows() -> list[Row]:
    """What a CPU measures: fixed steps at two cuts, then what a random stop gains; bfloat16 where it is not emulated."""
    precisions = ("float32", "bfloat16") if {"avx512_bf16", "amx_bf16"} & cpu_flags()[1] else ("float32",)
    fixed = [Row("dcgan32", cut, precision) for cut, precision in itertools.product(("first", "output"), precisions)]
    stop = [Row("dcgan32", "first", precision, "uniform", num_slots=64) for precision in precisions]
    return [*fixed, Row("dcgan16", stop="uniform", num_slots=64), *stop]


def gpu_rows() -> list[Row]:
    """What a GPU measures, the most important first: what stands behind the goals, then what completes the table."""

    def rows(workload: str, precision: str, stops: Sequence[str] = ("none", "median"), **own: Any) -> list[Row]:
        return [Row(workload, "first", precision, stop, **{"driver": "graph", "num_slots": 512, **own}) for stop in stops]

    return [
        *rows("dcgan64", "bfloat16"), *rows("dcgan64", "float32"), *rows("sngan32", "bfloat16", ("none",)),
        *rows("stylegan2", "bfloat16", ("none",)), *rows("sagan128", "bfloat16", ("none",), num_slots=128),
        *rows("dcgan64", "bfloat16", ("median", "none"), driver="loop"), *rows("sngan32", "bfloat16", ("median",)),
        *rows("dcgan64", "tf32"), *rows("dcgan32", "bfloat16"), *rows("mlp2d", "float32", num_slots=8192),
        *rows("dcgan64", "bfloat16", num_slots=None),
    ]  # fmt: skip


def product(values: Sequence[Sequence[Any]]) -> list[Row]:
    """All combinations of values for each field of a row, in its order; rules of latents at the input, once."""
    found = (Row(*given) for given in itertools.product(*values))
    return list(dict.fromkeys(replace(row, cut="input") if row.sampler in OF_LATENTS else row for row in found))


def tiny(rows: Sequence[Row], device: str) -> list[Row]:
    """Stand-ins for rows, on networks that take no time: each kind of row once."""
    networks = {"mlp2d": "mlp2d", "stylegan2": "stylegan16"}
    found = [replace(row, workload=networks.get(row.workload, "dcgan16"), num_slots=8) for row in rows]
    if device == "cpu":  # replays need a GPU, and not every CPU multiplies matrices in bfloat16
        found = [
            replace(row, driver="host", precision="float32" if row.workload != "dcgan16" else row.precision) for row in found
        ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample: ``evaluation`` = tail, discriminator and input gradient; ``forward`` without gradient."""

    evaluation: float
    forward: float
    output_bytes: int  # of a refined sample: image and activation in float32


@functools.cache
def work(workload: str, cut: str) -> Work:
    """Counted on the meta device from the networks themselves, so that it needs no GPU and no engine."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    known = WORKLOADS[workload]
    with torch.device("meta"):
        generator, discriminator = known.generator().eval(), known.discriminator().eval()
    prefix, tail = halves(generator.requires_grad_(False), known.cuts[cut])
    discriminator.requires_grad_(False)

    def count(gradient: bool) -> tuple[float, int]:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            found = prefix(torch.empty(2, known.latent))
            a, *context = found if isinstance(found, tuple) else (found,)
            a, before = a.detach(), counter.get_total_flops()
            images = tail(a.requires_grad_(), *context)
            loss = F.softplus(-discriminator(images)).sum()
            if gradient:
                loss.backward()
            return (counter.get_total_flops() - before) / 2, 4 * (images[0].numel() + a[0].numel())

    evaluation, size = count(True)
    return Work(evaluation, count(False)[0], size)


def samples(row: Row, scale: Scale, num_slots: int, rate: float) -> int:
    """How many samples one timed run of ours refines, a whole number per slot, from the images per second expected.

    With a stop, filling and draining the slots count, so twice the time is given.
    """
    if scale.exactly:
        return scale.exactly
    least, most = scale.samples
    in_time = rate * scale.seconds / num_slots
    wanted = max(least, in_time) if row.stop == "none" else min(most, max(least, 2 * in_time))
    wanted = min(wanted, max(2 * in_time, 2))  # never much longer than the time, whatever the least
    fits = min(OUTPUT_BYTES / work(row.workload, row.cut).output_bytes, MOST_SAMPLES) / num_slots
    return num_slots * max(1, int(min(wanted, fits)))
