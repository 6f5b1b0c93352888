"""The tensors of a run: slots, pool window and output window. Nothing here acts; ``ops.refine_step`` does.

S slots, F features of a flattened activation, P pool rows, W output rows; "real" = float32, or float64 under
precision="float64". Row of sample i: i % P in the pool, i % W among the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastrefine.samplers.base import Sample, Sampler, State

# Entries of Pool.counters
NEXT, END, LIVE, FINISHED, EVALUATIONS, ITERATIONS, SHORTEST, LONGEST = range(8)

PENDING, REACHED, EXHAUSTED, NONFINITE, STALLED = -1, 0, 1, 2, 3


@dataclass(eq=False)
class Slots:
    """What belongs to the sample in each slot; everything is reset when the slot is refilled."""

    activation: Tensor  # (S, F) real: the trial to evaluate
    sample_id: Tensor  # (S,) int64; -1: empty
    step: Tensor  # (S,) int32 proposals made so far
    last_step: Tensor  # (S,) int32
    threshold: Tensor  # (S,) real; retire when logit >= threshold
    reference_logit: Tensor  # (S,) real
    initial_logit: Tensor  # (S,) real
    logit_falls: Tensor  # (S,) int32 evaluations below the sample's standing logit
    grad_peak: Tensor  # (S,) real: largest |gradient| met; 0 at the end means stalled
    source: Tensor  # (S,) int64 pool row that refilled the slot in the last step; -1: none
    state: State  # the sampler's: position, logit, and views of the rows of the next two
    scalars: Tensor  # (n, S) real, its other numbers of each slot, in the order of its ``init``
    vectors: Tensor  # (n, S, F) real, its other vectors
    scalar_names: tuple[str, ...]  # which entry of the state each row of ``scalars`` is
    vector_names: tuple[str, ...]
    best: Tensor | None = None  # (S, F) real, with keep="best"
    best_logit: Tensor | None = None  # (S,)
    label: Tensor | None = None  # (S, ...) where labels were given; kept by the reference step, for a sampler's init
    view: Tensor | None = None  # (S, F) the activation as the networks read it: their dtype, and the order below
    view_channels: int = 0  # 0: elements in the order of the activation; C: (C, F / C) is stored as (F / C, C)
    cache: dict[str, object] = field(default_factory=dict)  # a backend's own view of these tensors


@dataclass(eq=False)
class Pool:
    """Proposals in order of sample id, waiting for a slot."""

    activation: Tensor  # (P, F) real
    last_step: Tensor  # (P,) int32
    threshold: Tensor  # (P,) real
    reference_logit: Tensor  # (P,) real
    counters: Tensor  # (8,) int64: next id to admit, end of the pool's ids, live, finished, evaluations, iterations,
    # least and most updates (last_step - step) that any live slot has left, 0 where none is live
    label: Tensor | None = None  # (P, ...)


@dataclass(eq=False)
class Outputs:
    """Finished samples by id; row W is a sink for slots that did not finish."""

    activation: Tensor  # (W + 1, F) real
    logit: Tensor  # (W + 1,) real
    initial_logit: Tensor  # (W + 1,) real
    steps: Tensor  # (W + 1,) int32
    logit_falls: Tensor  # (W + 1,) int32
    status: Tensor  # (W + 1,) int32; -1: pending
    scalars: Tensor  # (n, W + 1) real, those of the slots


@dataclass(frozen=True)
class Rule:
    """What a step does besides the sampler's formulas."""

    sampler: Sampler
    seed: int
    keep_best: bool = False
    lockstep: bool = False
    max_grad_norm: float | None = None
    snapshots: tuple[int, ...] = ()  # steps after which a sample is recorded as it stands


class Snapshots(NamedTuple):
    """Samples as they stood after so many steps, by id like the outputs; J numbers of steps."""

    steps: tuple[int, ...]
    activation: Tensor  # (J, W + 1, F) real
    logit: Tensor  # (J, W + 1) real


def allocate(
    num_slots: int, features: int, pool_rows: int, output_rows: int, rule: Rule, dtype: torch.dtype, device: torch.device,
    labels: Tensor | None = None, view: torch.dtype | None = None, view_channels: int = 0,
) -> tuple[Slots, Pool, Outputs]:  # fmt: skip
    """All tensors of a run, empty; labels: some (n, ...), for their shape and dtype.

    view, view_channels: dtype and order of the networks' own copy of the activation (see Slots), if they want one.
    """
    assert view is not None or not view_channels, view_channels
    assert not view_channels or features % view_channels == 0, (features, view_channels)

    def real(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def integer(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, fill, dtype=dtype, device=device)

    s, w = num_slots, output_rows + 1
    empty = integer(s, fill=-1, dtype=torch.int64)
    a = real(s, features)
    label, pool_label = (None if labels is None else labels.new_zeros(n, *labels.shape[1:]).to(device) for n in (s, pool_rows))
    state = {k: v.clone() for k, v in rule.sampler.init(a, Sample(empty, label, real(s))).items()}
    scalar_names, vector_names = (_entries(state, like) for like in (state["logit"], a))
    scalars, vectors = real(len(scalar_names), s), real(len(vector_names), s, features)
    for names, stack in ((scalar_names, scalars), (vector_names, vectors)):
        state |= {name: row.copy_(state[name]) for name, row in zip(names, stack, strict=True)}
    slots = Slots(
        a, empty, integer(s), integer(s), real(s), real(s), real(s), integer(s), real(s), empty.clone(), state,
        scalars, vectors, scalar_names, vector_names,
        best=real(s, features) if rule.keep_best else None, best_logit=real(s) if rule.keep_best else None,
        label=label, view=None if view is None else torch.zeros(s, features, dtype=view, device=device),
        view_channels=view_channels,
    )  # fmt: skip
    p = pool_rows
    pool = Pool(real(p, features), integer(p), real(p), real(p), integer(8, dtype=torch.int64), pool_label)
    status, columns = integer(w, fill=PENDING), real(len(scalar_names), w)
    outputs = Outputs(real(w, features), real(w), real(w), integer(w), integer(w), status, columns)
    return slots, pool, outputs


def _entries(state: State, like: Tensor) -> tuple[str, ...]:
    """Names of the sampler's own entries of the shape and type of ``like``, in order."""
    own = ((name, tensor) for name, tensor in state.items() if name not in ("position", "logit"))
    return tuple(name for name, tensor in own if tensor.shape == like.shape and tensor.dtype == like.dtype)


def snapshots(own: Slots, outputs: Outputs, steps: tuple[int, ...]) -> Snapshots:
    """Room for the samples of these outputs after so many steps each."""
    (w,), j = outputs.logit.shape, len(steps)
    return Snapshots(steps, own.activation.new_zeros(j, w, own.activation.shape[1]), own.activation.new_zeros(j, w))
