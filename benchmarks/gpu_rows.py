"""What benchmarks.gpu_bench measures: the rows in order of importance, the work in each and the seconds it may take.

Nothing here is a measurement. The seconds of a plan come from assumed rates (``ASSUMED``, after the first row corrected by
what rows really took) and decide only what is tried within the budget and how many samples a row gets.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.workloads import WORKLOADS, halves

K = 50
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STOPS = ("none", "median", "uniform")
# "collaborative": control="fixed", what the baselines do
SAMPLERS = ("collaborative", "backtracking", "dgflow", "dot", "ddls", "mala", "hmc")
OF_LATENTS = ("ddls", "mala", "hmc")  # at the input, whatever cut was asked for
DEFAULT_WORKLOADS = ("dcgan64", "sngan32", "dcgan32", "sagan128", "mlp2d")
DEFAULT_PRECISIONS = ("bfloat16", "tf32", "float32")

# For planning only: FLOP/s that a loop reaches by precision, seconds of a step however small, of building and of compiling.
ASSUMED = {"float32": 25e12, "tf32": 100e12, "bfloat16": 200e12, "float16": 200e12}
STEP_SECONDS, SETUP_SECONDS, COMPILE_SECONDS = 1e-3, 6.0, 40.0

TARGET_SECONDS, MOST_SECONDS = 2.0, 4.0  # of one timed run of ours
FEWEST_ROUNDS, STOP_ROUNDS = 8, 200  # samples per slot: at least with fixed steps, at most with a stop
OUTPUT_BYTES = 3e9  # what the results of one run may occupy on the device
MOST_SAMPLES = 400_000


@dataclass(frozen=True)
class Row:
    """One row of the table before it is measured; ``cut`` is a name of Workload.cuts."""

    workload: str
    cut: str
    sampler: str
    precision: str
    driver: str
    stop: str

    @property
    def module(self) -> str:
        """The cut as ``Refiner(at=)`` takes it."""
        return WORKLOADS[self.workload].cuts[self.cut]

    @property
    def pair_key(self) -> tuple[str, str]:
        """What rows share that refine the same activations of the same networks."""
        return self.workload, self.cut

    def facts(self) -> dict[str, Any]:
        """The row's own keys of the results."""
        own = asdict(self)
        return {"workload": own.pop("workload"), "at": own.pop("cut"), "module": self.module, **own}


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample: ``evaluation`` = tail, discriminator and input gradient; ``peers`` with parameter gradients."""

    evaluation: float
    forward: float
    peers: float
    output_bytes: int  # of a refined sample: image and activation in float32


def order(rows: Sequence[Row]) -> list[Row]:
    """The rows by importance: those behind the goals first, then what completes the table."""
    workloads = {"dcgan64": 0, "sngan32": 1, "dcgan32": 1, "mlp2d": 2, "sagan128": 2}
    precisions = {"bfloat16": 0, "tf32": 0, "float32": 2, "float16": 3}

    def rank(row: Row) -> int:
        extra = 3 * (row.cut != "first") + 3 * (row.sampler != "collaborative") + 2 * (row.driver not in ("graph", "host"))
        return workloads.get(row.workload, 4) + precisions[row.precision] + STOPS.index(row.stop) + extra

    return sorted(rows, key=rank)


def rows(
    workloads: Sequence[str], cuts: Sequence[str], samplers: Sequence[str], precisions: Sequence[str],
    drivers: Sequence[str], stops: Sequence[str],
) -> list[Row]:  # fmt: skip
    """All combinations, the most important first."""
    found = (Row(*given) for given in itertools.product(workloads, cuts, samplers, precisions, drivers, stops))
    return order(list(dict.fromkeys(replace(row, cut="input") if row.sampler in OF_LATENTS else row for row in found)))


@functools.cache
def work(workload: str, cut: str) -> Work:
    """Counted on the meta device from the networks themselves, so that it needs no GPU and no engine."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    def count(at: str, parameters: bool, gradient: bool) -> tuple[float, int]:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            prefix, tail = halves(generator.requires_grad_(parameters), at)
            with torch.no_grad():
                a = prefix(torch.empty(2, known.latent))
            before = counter.get_total_flops()
            images = tail(a.requires_grad_())
            loss = F.softplus(-discriminator.requires_grad_(parameters)(images)).sum()
            if gradient:
                loss.backward()
            return (counter.get_total_flops() - before) / 2, 4 * (images[0].numel() + a[0].numel())

    known = WORKLOADS[workload]
    with torch.device("meta"):
        generator, discriminator = known.generator().eval(), known.discriminator().eval()
    at = known.cuts[cut]
    evaluation, size = count(at, False, True)
    return Work(evaluation, count(at, False, False)[0], count(at, True, True)[0], size)


def slots_to_try(workload: str) -> tuple[int, ...]:
    """Numbers of slots that may be best; large activations need few, tiny networks many.

    Not 32768: the decision's kernel, one program for all slots, takes 16 s to compile then, for each specialisation.
    """
    return {"sagan128": (64, 128, 256), "mlp2d": (512, 2048, 8192)}.get(workload, (256, 512, 1024, 2048))


def batches_to_try(workload: str) -> tuple[int, ...]:
    """The baselines' batches; SAGAN's parameter gradients at 1024 would not fit."""
    return {"sagan128": (16, 64, 256), "mlp2d": (256, 1024, 8192)}.get(workload, (64, 256, 1024))


def samples(row: Row, num_slots: int, rate: float) -> int:
    """How many samples one timed run of ours refines, a whole number per slot, from the images per second expected.

    At least FEWEST_ROUNDS per slot unless that takes more than MOST_SECONDS: with a stop, filling and draining
    count, so as many as MOST_SECONDS and OUTPUT_BYTES allow.
    """
    in_time = rate * MOST_SECONDS / num_slots
    if row.stop == "none":
        wanted = min(max(FEWEST_ROUNDS, rate * TARGET_SECONDS / num_slots), max(in_time, 2))
    else:
        wanted = min(STOP_ROUNDS, max(in_time, 8))
    fits = min(OUTPUT_BYTES / work(*row.pair_key).output_bytes, MOST_SAMPLES) / num_slots
    return num_slots * max(1, int(min(wanted, fits)))


def expected_rate(row: Row, num_slots: int) -> float:
    """Images per second of ours, before anything was measured; a stop is taken to halve the steps."""
    step = max(work(*row.pair_key).evaluation * num_slots / ASSUMED[row.precision], 0.2 * STEP_SECONDS)
    return num_slots / (step * (K + 1) * (1 if row.stop == "none" else 0.5))


def expected_seconds(row: Row, repetitions: int) -> float:
    """What a row may take, without compiling B2: preparation, choice of sizes, warm runs and the repetitions of all."""
    own = work(*row.pair_key)
    slots, batch = slots_to_try(row.workload)[1], batches_to_try(row.workload)[1]
    rate = expected_rate(row, slots)
    ours = samples(row, slots, rate) / rate
    b1 = max(own.evaluation * batch / ASSUMED[row.precision], STEP_SECONDS) * K
    if row.stop == "none":
        rivals = 2 * b1 + sum(max(own.peers * batch / ASSUMED[p], STEP_SECONDS) * K for p in b0_precisions(row))
    else:
        rivals = 4 * b1  # B0 was timed for the row without a stop
    return SETUP_SECONDS + ours + repetitions * (ours + rivals)


def b0_precisions(row: Row) -> tuple[str, ...]:
    """B0 is float32 with the row's own TF32 setting; rows of 16 bits show it with TF32 too."""
    return (row.precision,) if row.precision in ("float32", "tf32") else ("float32", "tf32")


class Budget:
    """Seconds of the whole command, and how rows really compare with what was expected of them."""

    def __init__(self, seconds: float, clock: Any, compile_share: float = 0.5):
        self.seconds, self.clock, self.started = seconds, clock, clock()
        self.compile_limit, self.compiling, self.compiles = seconds * compile_share, 0.0, 0
        self.expected = self.taken = 0.0

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.seconds - (self.clock() - self.started)

    def forecast(self, row: Row, repetitions: int) -> float:
        """Expected seconds of a row, corrected within a factor of 4 by the rows so far."""
        factor = min(max(self.taken / self.expected, 0.25), 4.0) if self.expected else 1.0
        return expected_seconds(row, repetitions) * factor

    def may_compile(self, rest: float = 0.0) -> bool:
        """Whether one more torch.compile fits and leaves ``rest`` seconds; at most ``compile_share`` of all goes into B2."""
        each = self.compiling / self.compiles if self.compiles else COMPILE_SECONDS
        return self.compiling + each <= self.compile_limit and 1.25 * each + rest < self.left

    @contextlib.contextmanager
    def measuring(self, row: Row, repetitions: int) -> Iterator[None]:
        """Time a row against its expectation; what it compiled does not count."""
        started, compiling = self.clock(), self.compiling
        try:
            yield
        finally:
            self.expected += expected_seconds(row, repetitions)
            self.taken += self.clock() - started - (self.compiling - compiling)

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Count the seconds of a torch.compile."""
        started = self.clock()
        try:
            yield
        finally:
            self.compiling += self.clock() - started
            self.compiles += 1
