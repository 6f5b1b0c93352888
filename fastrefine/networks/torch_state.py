"""The state of the whole process that a run changes: torch's modes, random states, threads, TF32. The caller's come back."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

SMALL_WORK = 2e8  # FLOPs of an evaluation of all slots below which one thread beats several (OpenMP barriers)
_process = threading.RLock()  # tracing, threads, TF32 and random states are the whole process's: one thread at a time


def _renew() -> None:
    global _process
    _process = threading.RLock()


os.register_at_fork(after_in_child=_renew)  # a thread of the parent's may have held it


@contextlib.contextmanager
def quiet_torch(device: torch.device | None = None) -> Iterator[None]:
    """No grad, no inference mode, no autocast, as the engine wants it; the caller's modes come back afterwards.

    So does the state of the CPU's and the device's generator, for networks may draw numbers that change nothing. Other
    threads wait meanwhile.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process)
        stack.enter_context(torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


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


def seed_torch(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of this device alone; torch.manual_seed would disturb the other GPUs'."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
