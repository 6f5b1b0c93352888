"""Drives ``refine_step`` with random evaluations, the same for every backend, and records everything it wrote."""

import functools
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from fastrefine import ops
from fastrefine.ops import registry, slots
from fastrefine.samplers import DDLS, DOT, HMC, MALA, PCN, Collaborative, DGflow, Evaluation, Latent

FIRST_ID = 2**31 + 5  # ids are 32-bit words of a counter: beyond the signed range
SAMPLERS = {
    "sgd": Collaborative(0.3, control="fixed"),
    "backtracking": Collaborative(0.3),
    "barzilai_borwein": Collaborative(0.3, control="barzilai_borwein"),
    "slack": Collaborative(0.3, slack=0.5),
    "adaptive": Collaborative(0.3, adaptive=True),
    "momentum": Collaborative(0.3, optimizer="momentum"),
    "adam": Collaborative(0.3, optimizer="adam"),
    "ladam": Collaborative(0.3, optimizer="ladam", real_score=0.7),
    "noise": DGflow(0.3, gamma=0.5),
    "ddls": DDLS((0.3, 0.2), (1.0, 0.5, 0.0)),
    "mala": MALA(0.3, adapt=3),
    "mala_global": MALA(0.3, global_every=2, adapt=3),
    "pcn": PCN(0.3, adapt=3),
    "hmc": HMC(0.3, leapfrog=2, adapt=4, jitter=0.5),
    "dot_adam": DOT(0.3, lipschitz=2.0),
    "dot_sgd": DOT(0.3, "sgd", lipschitz=2.0, projection="published"),
    "dot_clip": DOT(0.3, lipschitz=0.5, projection="none"),
}


needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: compiled kernels and CUDA graphs"),
]


@dataclass(frozen=True)
class Options:
    """What a run does besides its rule."""

    keep_best: bool = False
    lockstep: bool = False
    max_grad_norm: float | None = None
    seed: int = 2**63 + 12345
    pool_rows: int = 7
    view: torch.dtype | None = None
    view_channels: int = 0


def device_of(backend):
    """Where the backend runs here; skips the test where it is absent."""
    if registry.available()[backend] != "ok":
        pytest.skip(registry.available()[backend])
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def bound(sampler, features, dtype, device):
    """The sampler with what a Refiner would tell it: its own prior, or normal, uniform and truncated elements in turn."""
    if not sampler.traits.reads_prior:
        return sampler
    table = torch.tensor([[1, 0, 1], [-torch.inf, -1, -1.5], [torch.inf, 1, 1.5]], dtype=dtype)
    if isinstance(sampler, DOT) and features == 1:  # every direction is radial: what is left would be rounding alone
        sampler = replace(sampler, projection="none")
    if isinstance(sampler, PCN) or getattr(sampler, "projection", "none") != "none" or getattr(sampler, "global_every", None):
        table = table[:, :1]  # of normal priors alone
    table = table if sampler.latent is None else sampler.latent.table.to(dtype)
    latent = Latent(table.repeat(1, features)[:, :features].contiguous().to(device))
    return sampler.over(latent) if isinstance(sampler, DDLS) else replace(sampler, latent=latent)


class Recorder:
    """A kernel that is launched as ever, and remembered."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((self.kernel[grid], args, constants))
            self.kernel[grid](*args, **constants)

        return launch


def special(x: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """``x`` (S,) with some entries NaN, inf, -inf."""
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
    pick = odd[torch.randint(3, x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < share, pick, x)


def coarse(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(S,) normals rounded to quarters, so that equal values meet."""
    return ((torch.randn(count, generator=generator) * 4).round() / 4).to(dtype)


def random_evaluation(
    count: int, features: int, dtype: torch.dtype, generator: torch.Generator, always: bool = False
) -> Evaluation:
    """Logits, losses and gradients, ties and non-finite ones among them; slot 0's gradient is 0, at times there is none.

    always: there is always one.

    All numbers are float32 ones, so that machines of both types can be given the same script.
    """
    logit = special(coarse(count, dtype, generator), generator, 0.08)
    loss = special(coarse(count, dtype, generator), generator, 0.08)
    grad = torch.randn(count, features, generator=generator).to(dtype)
    where = torch.randint(features, (count, 1), generator=generator)
    grad.scatter_(1, where, special(grad.gather(1, where)[:, 0], generator, 0.08)[:, None])
    grad[0] = 0
    nothing = torch.rand((), generator=generator) < 0.1 and not always
    return Evaluation(logit, loss, None if nothing else grad)


def fill(pool: slots.Pool, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Between none (often) and all of the free rows of the pool get proposals."""
    begin, end = pool.counters[:2].tolist()
    rows = len(pool.threshold)
    more = int(torch.randint(-rows, rows - (end - begin) + 1, (), generator=generator).clamp(min=0))
    for row in ((end + k) % rows for k in range(more)):
        pool.activation[row] = torch.randn(pool.activation.shape[1], generator=generator).to(dtype)
        pool.threshold[row] = 1.25 + coarse(1, dtype, generator)[0]
        pool.last_step[row] = torch.randint(6, (), generator=generator)
        pool.reference_logit[row] = torch.randn((), generator=generator).to(dtype)
    pool.counters[slots.END] += more


def record(own: slots.Slots, pool: slots.Pool, outputs: slots.Outputs) -> dict[str, Tensor]:
    """Copies of all that has a meaning: not the sink row, not the sampler's state of empty slots."""
    seen = {f"slots.{f.name}": getattr(own, f.name) for f in fields(own)}
    seen |= {f"pool.{f.name}": getattr(pool, f.name) for f in fields(pool)}
    seen |= {f"outputs.{f.name}": getattr(outputs, f.name)[:-1] for f in fields(outputs)}
    seen["outputs.scalars"] = outputs.scalars[:, :-1]
    for name in ("scalars", "vectors"):
        del seen[f"slots.{name}"]  # the state's entries are views of these
    seen |= {f"state.{name}": tensor[own.sample_id >= 0] for name, tensor in own.state.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in seen.items() if isinstance(tensor, Tensor)}


def drive(backend, sampler, shape, dtype, options=None, steps=12, mutate=None):
    """The records of a run; ``mutate`` changes the evaluations that the backend gets."""
    options, device = options or Options(), device_of(backend)
    sampler = bound(sampler, shape[1], dtype, device)
    rule = slots.Rule(sampler, options.seed, options.keep_best, options.lockstep, options.max_grad_norm)
    rows = max(options.pool_rows, shape[0]), 7 * shape[0] + 1  # a sample lives at most 6 evaluations: no row is shared
    own, pool, outputs = slots.allocate(
        *shape, *rows, rule, dtype, torch.device(device), None, options.view, options.view_channels
    )
    pool.counters[: slots.END + 1] = FIRST_ID
    generator = torch.Generator().manual_seed(7)
    records = []
    for index in range(steps):
        fill(pool, dtype, generator)
        evaluation = random_evaluation(*shape, dtype, generator, always=sampler.traits.needs_last_gradient)
        evaluation = evaluation._replace(**{k: v.to(device) for k, v in evaluation._asdict().items() if v is not None})
        if evaluation.grad is not None and options.view is not None:
            evaluation = evaluation._replace(grad=evaluation.grad.to(options.view))
        if mutate is not None:
            evaluation = mutate(evaluation)
        ops.refine_step(own, evaluation if index else None, pool, outputs, rule, backend=backend)
        records.append(record(own, pool, outputs))
    return records


@functools.lru_cache(maxsize=64)
def driven(backend, sampler, shape, dtype, options=None, steps=12):
    """As ``drive``, kept for other tests of the same run, which must not change the records."""
    return drive(backend, sampler, shape, dtype, options, steps)


# (rtol, atol). float32: a GPU approximates exp, sqrt and division. A rounded view may fall to the other side, and the
# interpreter of Triton truncates to bfloat16.
TOLERANCES = {
    torch.float64: (1e-12, 1e-13), torch.float32: (5e-6, 5e-6), torch.float16: (2**-10, 2**-16),
    torch.bfloat16: (2**-7, 2**-16),
}  # fmt: skip


def compare(records, expected):
    """Integers equal, numbers to rounding; NaN equals NaN. Names the step and the tensor that differ."""
    for index, (ours, theirs) in enumerate(zip(records, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, wanted in theirs.items():
            rtol, atol = TOLERANCES.get(wanted.dtype, (0, 0))
            message = f"step {index}, {name}: "
            torch.testing.assert_close(
                ours[name], wanted, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, m=message: m + text
            )
