"""torch's global settings while a run goes on: threads, TF32, deterministic algorithms; the caller's come back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

SMALL_WORK = 2e8  # FLOPs of an evaluation of all slots below which one thread beats several (OpenMP barriers)


@contextlib.contextmanager
def threads_for(flops: float | None) -> Iterator[int]:
    """Use one thread where the work of an evaluation is small, else as many as torch has; put back afterwards."""
    before = torch.get_num_threads()
    count = 1 if flops is not None and flops < SMALL_WORK else before
    if count != before:
        torch.set_num_threads(count)
    try:
        yield count
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def arithmetic(precision: str, deterministic: bool) -> Iterator[None]:
    """TF32 on only for "tf32", deterministic algorithms on request; the caller's settings come back afterwards."""
    with _tf32(precision == "tf32"), _deterministic() if deterministic else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """TF32 on or off. torch has two sets of switches: both are set and put back, or reading the older set raises."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    places = [backends.cuda.matmul, cudnn.conv, cudnn.rnn, backends.mkldnn.matmul]
    was = [place.fp32_precision for place in places]
    matmul, convolution = "highest", True  # torch's defaults, where a caller who used the newer set has no older state
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolution = cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    cudnn.allow_tf32 = on
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = convolution
        for place, precision in zip(places, was, strict=True):
            place.fp32_precision = precision
