"""How fast a pair is refined here: candidate layers and precisions against B0, the usual loop, in one run."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine.refiner import Refiner
from fastrefine.samplers import Collaborative
from fastrefine.split import Cut, layers, split, unwrap

BATCHES = (64, 256, 1024)


def candidates(generator: nn.Module, latents: Tensor, most: int = 4) -> list[str]:
    """The input, the output, and layers between whose tails cost visibly less than the one before."""
    found, share = [], 2.0
    for layer in layers(generator, latents):
        if layer.name in ("input", "output") or layer.tail_share < 0.95 * share - 0.02:
            found.append(layer.name)
            share = layer.tail_share
    return [found[0], *found[1:-1][: most - 2], found[-1]] if len(found) > most else found


def rows(
    refiner: Refiner, names: Sequence[str], precisions: Sequence[str], steps: int, seconds: float = 2.0
) -> Iterator[dict[str, Any]]:
    """For each layer and precision: images/s of ours and of B0 (float32) with ``steps`` updates for every sample.

    B0: prefix once a batch, ``.backward()`` with parameter gradients on, at the best of three batch sizes. Both take
    about ``seconds`` a figure; wall clock, so nothing else should run. Names and precisions are checked at once, by
    SplitError and InputError, before anything is measured.
    """
    assert isinstance(refiner.generator, nn.Module) and refiner.prior is not None
    generator, z = unwrap(refiner.generator), example(refiner)
    for name in names:
        split(generator, name, z)
    for precision in precisions:
        _ours(refiner, names[0], precision, steps)
    return _rows(refiner, names, precisions, steps, seconds)


def example(refiner: Refiner) -> Tensor:
    """A few latents, where the caller's generator lies."""
    assert isinstance(refiner.generator, nn.Module) and refiner.prior is not None
    device = next((p.device for p in refiner.generator.parameters()), torch.device("cpu"))
    return refiner.prior.sample(torch.arange(8), 0).to(device)


def _ours(refiner: Refiner, name: str, precision: str, steps: int) -> Refiner:
    return Refiner(
        refiner.generator, refiner.discriminator, Collaborative(0.01, control="fixed"), at=name, max_steps=steps,
        prior=refiner.prior, discriminator_output=refiner.discriminator_output, num_slots=refiner.num_slots,
        device=refiner.device, precision=precision,
    )  # fmt: skip


def _rows(
    refiner: Refiner, names: Sequence[str], precisions: Sequence[str], steps: int, seconds: float
) -> Iterator[dict[str, Any]]:
    for name in names:
        base = _b0(refiner, name, steps, seconds)
        for precision in precisions:
            ours = _ours(refiner, name, precision, steps)
            ours.sample(ours.num_slots)
            n, speed = ours.num_slots, 0.0
            for _ in range(2):  # the first says how many make up the time
                out = ours.sample(n)
                speed = out.report["images_per_second"]
                n = max(int(speed * seconds) // ours.num_slots, 1) * ours.num_slots
            yield {
                "at": name, "precision": precision, "steps": steps, "images_per_second": speed, "b0_images_per_second": base,
                "ratio_b0": speed / base, **{k: out.report[k] for k in ("backend", "driver", "threads", "num_slots")},
            }  # fmt: skip


def _b0(refiner: Refiner, name: str, steps: int, seconds: float) -> float:
    assert isinstance(refiner.generator, nn.Module) and refiner.prior is not None
    device = refiner.device
    g, d = (copy.deepcopy(unwrap(net)).to(device).float().eval().requires_grad_(True)
            for net in (refiner.generator, refiner.discriminator))  # fmt: skip
    z = refiner.prior.sample(torch.arange(max(BATCHES)), 0).to(device)
    cut, best = split(g, name, z[:8]), 0.0
    for size in BATCHES:
        _loop(cut, d, z[:size], 1)  # warm-up
        images, started = 0, time.perf_counter()
        while images == 0 or time.perf_counter() - started < seconds / len(BATCHES):
            _loop(cut, d, z[:size], steps)
            images += size
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, images / (time.perf_counter() - started))
    return best


def _loop(cut: Cut, discriminator: nn.Module, z: Tensor, steps: int) -> Tensor:
    with torch.no_grad():
        a, context = cut.prefix(z)
    for _ in range(steps):
        a = a.detach().requires_grad_()
        F.softplus(-discriminator(cut.tail(a, *context))).flatten(1 if a.dim() > 1 else 0).sum().backward()
        assert a.grad is not None
        a = a - 0.01 * a.grad
    with torch.no_grad():
        return cut.tail(a, *context)
