"""Measures how fast a pair is refined here, by layer and precision, and the usual loop (B0) beside it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine.networks import torch_state
from fastrefine.networks.calls import takes_labels
from fastrefine.networks.copies import unwrap
from fastrefine.networks.cut import Cut, layers, split
from fastrefine.refiner import Refiner
from fastrefine.samplers import Collaborative

BATCHES = (64, 256, 1024)


class Bench:
    """Images/s of a refiner's networks with ``steps`` updates for every sample; each figure takes about ``seconds``.

    labelled: networks that take labels get those of class 0. Wall-clock time, so nothing else should run.
    """

    def __init__(self, refiner: Refiner, steps: int, seconds: float = 2.0, *, labelled: bool = False):
        assert isinstance(refiner.generator, nn.Module) and refiner.prior is not None
        self.refiner, self.prior, self.steps, self.seconds = refiner, refiner.prior, steps, seconds
        self.generator, self.discriminator = unwrap(refiner.generator), unwrap(refiner.discriminator)
        g, d = (labelled and takes_labels(network, {})[0] for network in (self.generator, self.discriminator))
        self.labels = torch.zeros(max(BATCHES), dtype=torch.int64) if g or d else None
        self.to_g, self.to_d = (self.labels if takes else None for takes in (g, d))

    def candidates(self) -> list[str]:
        """The input, the output, and up to two layers between whose tail costs clearly less than that of the one before."""
        z, y = self._example()
        found, share = [], 2.0
        for layer in layers(self.generator, z, y):
            if layer.name in ("input", "output") or layer.tail_share < 0.95 * share - 0.02:
                found.append(layer.name)
                share = layer.tail_share
        return [*found[:3], found[-1]] if len(found) > 4 else found

    def rows(self, names: Sequence[str], precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
        """For each layer and precision: images/s of fastrefine and of ``b0``.

        Raises SplitError and InputError at once, before anything is measured, where a name or a precision does not fit.
        """
        z, y = self._example()
        for name in names:
            split(self.generator, name, z, y)
        for precision in precisions:
            self._ours(names[0], precision)
        return self._rows(names, precisions)

    def _example(self) -> tuple[Tensor, Tensor | None]:
        """A few latents and their labels, on the generator's device."""
        device = next((p.device for p in self.generator.parameters()), torch.device("cpu"))
        y = None if self.to_g is None else self.to_g[:8].to(device)
        return self.prior.sample(torch.arange(8), 0).to(device), y

    def _ours(self, name: str, precision: str) -> Refiner:
        r = self.refiner
        return Refiner(
            r.generator, r.discriminator, Collaborative(0.01, control="fixed"), at=name, max_steps=self.steps, prior=r.prior,
            discriminator_output=r.discriminator_output, num_slots=r.num_slots, device=r.device, precision=precision,
        )  # fmt: skip

    def _rows(self, names: Sequence[str], precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
        label = None if self.labels is None else 0
        for name in names:
            base = self.b0(name)
            for precision in precisions:
                ours = self._ours(name, precision)
                ours.sample(ours.num_slots, labels=label)
                n, speed = ours.num_slots, 0.0
                for _ in range(2):  # the first pass shows how many images take ``seconds``
                    out = ours.sample(n, labels=label)
                    speed = out.report["images_per_second"]
                    n = max(int(speed * self.seconds) // ours.num_slots, 1) * ours.num_slots
                yield {
                    "at": name, "precision": precision, "steps": self.steps, "images_per_second": speed,
                    "b0_images_per_second": base, "ratio_b0": speed / base,
                    **{k: out.report[k] for k in ("backend", "driver", "threads", "num_slots")},
                }  # fmt: skip

    @torch_state.arithmetic("float32", False)
    def b0(self, name: str) -> float:
        """Images/s of the usual loop at a layer: float32, prefix once a batch, ``.backward()`` with parameter gradients.

        It runs a fixed number of steps for all samples, at the best of three batch sizes.
        """
        device = self.refiner.device
        g, d = (copy.deepcopy(net).to(device).float().eval().requires_grad_(True)
                for net in (self.generator, self.discriminator))  # fmt: skip
        z = self.prior.sample(torch.arange(max(BATCHES)), 0).to(device)
        to_g, to_d = (() if y is None else (y.to(device),) for y in (self.to_g, self.to_d))
        cut, best = split(g, name, z[:8], to_g[0][:8] if to_g else None), 0.0

        def batch(size: int, steps: int) -> None:
            _loop(cut, d, z[:size], tuple(y[:size] for y in to_g), tuple(y[:size] for y in to_d), steps)

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        for size in BATCHES:
            batch(size, 1)  # warm-up
            wait()
            images, started = 0, time.perf_counter()
            while images == 0 or time.perf_counter() - started < self.seconds / len(BATCHES):
                batch(size, self.steps)
                images += size
            wait()
            best = max(best, images / (time.perf_counter() - started))
        return best


def _loop(
    cut: Cut, discriminator: nn.Module, z: Tensor, to_g: tuple[Tensor, ...], to_d: tuple[Tensor, ...], steps: int
) -> Tensor:
    with torch.no_grad():
        a, context = cut.prefix(z, *to_g)
    for _ in range(steps):
        a = a.detach().requires_grad_()
        logits = discriminator(cut.tail(a, *context), *to_d)
        F.softplus(-logits).flatten(1 if a.dim() > 1 else 0).sum().backward()
        assert a.grad is not None
        a = a - 0.01 * a.grad
    with torch.no_grad():
        return cut.tail(a, *context)
