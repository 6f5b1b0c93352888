"""Measures how fast a pair is refined here, by layer and precision, beside the usual loop (B0) and a careful one (B1)."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine.networks import copies, torch_state
from fastrefine.networks.calls import LogitReader, NetworkCall, call_of
from fastrefine.networks.cut import Tail, find, image_of, layers
from fastrefine.options import DTYPES, MOST_SLOTS
from fastrefine.refiner import Refiner
from fastrefine.result import Result
from fastrefine.samplers import Collaborative

BATCHES = (64, 256, 1024)


class Bench:
    """Images/s of a refiner's networks with ``steps`` updates for every sample; each figure takes about ``seconds``.

    labelled: networks that take labels get those of class 0. conditions: further inputs (N, ...) by name, whose rows are used
    in turn. On a CPU with one thread the time of this process counts, else that of the clock: then nothing else should run.
    """

    def __init__(
        self, refiner: Refiner, steps: int, seconds: float = 2.0, *, labelled: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
    ):  # fmt: skip
        assert isinstance(refiner.generator, nn.Module) and refiner.prior is not None
        self.refiner, self.prior, self.steps, self.seconds = refiner, refiner.prior, steps, seconds
        alone = refiner.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter
        self.generator, self.discriminator = copies.unwrap(refiner.generator), copies.unwrap(refiner.discriminator)
        self.label, self.conditions, r = 0 if labelled else None, conditions or {}, refiner
        some = self._inputs(1)
        self.to_g = call_of("generator", self.generator, some, r.generate, r.generator_kwargs)
        self.to_d = call_of("discriminator", self.discriminator, some, r.discriminate, r.discriminator_kwargs)

    def _conditions(self, n: int) -> dict[str, Tensor] | None:
        return {name: value[torch.arange(n) % len(value)] for name, value in self.conditions.items()} or None

    def _inputs(self, n: int) -> dict[str, Tensor]:
        """Labels and conditions of n samples, where the networks are."""
        found = self.refiner.options.own_inputs(self.label, self._conditions(n), n)
        return {name: value.to(self.refiner.device) for name, value in found.items()}

    def candidates(self) -> list[str]:
        """The input, the output, and up to two layers between whose tail costs clearly less than that of the one before."""
        z, given = self._example()
        names = [name for name in self.to_g.names if name != "labels"]
        conditions = {name: given[name] for name in names}
        labels = given["labels"] if "labels" in self.to_g.names else None
        found, share = [], 2.0
        for layer in layers(self.generator, z, labels, dict(self.to_g.kwargs), self.to_g.function, conditions):
            if layer.name in ("input", "output") or layer.tail_share < 0.95 * share - 0.02:
                found.append(layer.name)
                share = layer.tail_share
        return [*found[:3], found[-1]] if len(found) > 4 else found

    def rows(self, names: Sequence[str], precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
        """For each layer and precision: images/s of fastrefine, of ``b0`` and of ``b1``, and how the networks were prepared.

        Raises SplitError and InputError at once, before anything is measured, where a name or a precision does not fit.
        """
        z, given = self._example()
        for name in names:
            _cut(self.generator, self.to_g, name, z, self.to_g.values(given))
        for precision in precisions:
            self._ours(names[0], precision)
        return self._rows(names, precisions)

    def _example(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A few latents and their further inputs, on the generator's device."""
        device = next((p.device for p in self.generator.parameters()), torch.device("cpu"))
        given = {name: value.to(device) for name, value in self._inputs(8).items()}
        return self.prior.sample(torch.arange(8), 0).to(device), given

    def _ours(self, name: str, precision: str) -> Refiner:
        return self.refiner.replaced(
            sampler=Collaborative(0.01, control="fixed"), at=name, max_steps=self.steps, stop=None, real=None, real_labels=None,
            keep="last", num_slots=self.refiner.num_slots or MOST_SLOTS, precision=precision,
        )  # fmt: skip

    def _rows(self, names: Sequence[str], precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
        for name in names:
            base = self.b0(name)
            for precision in precisions:
                ours = self._ours(name, precision)
                n = ours.num_slots
                _, first = self._timed(ours, n)
                for _ in range(2):  # the first pass shows how many images take ``seconds``
                    out, took = self._timed(ours, n)
                    speed = n / took
                    n = max(int(speed * self.seconds) // ours.num_slots, 1) * ours.num_slots
                careful = self.b1(name, precision)
                yield {
                    "at": name, "precision": precision, "steps": self.steps, "images_per_second": speed,
                    "b0_images_per_second": base, "ratio_b0": speed / base, "b1_images_per_second": careful,
                    "ratio_b1": speed / careful, "preparation_seconds": max(0.0, first - ours.num_slots / speed),
                    **{k: out.report[k] for k in ("backend", "driver", "threads", "num_slots", "repeatable", "ladder")},
                }  # fmt: skip

    def _timed(self, ours: Refiner, n: int) -> tuple[Result, float]:
        began = self.clock()
        out = ours.sample(n, labels=self.label, conditions=self._conditions(n))
        return out, self.clock() - began

    @torch_state.arithmetic("float32", False)
    def b0(self, name: str) -> float:
        """Images/s of the usual loop at a layer: float32, prefix once a batch, ``.backward()`` with parameter gradients.

        It runs a fixed number of steps for all samples, at the best of three batch sizes.
        """
        g, d = (copy.deepcopy(net).to(self.refiner.device).float().eval().requires_grad_(True)
                for net in (self.generator, self.discriminator))  # fmt: skip
        return self._rate(name, g, d, torch.float32, self.seconds)

    def b1(self, name: str, precision: str) -> float:
        """Images/s of a careful loop at a layer: frozen copies in this precision, BatchNorm folded, one gradient alone.

        Otherwise as ``b0``, in the better of two memory formats.
        """
        dtype, best = DTYPES[precision], 0.0
        with torch_state.arithmetic(precision, False):
            g, d = self._frozen(name)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                with contextlib.suppress(RuntimeError):  # weights of another rank, or a view that the format forbids
                    for network in (g, d):
                        copies.converted(network, dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
                    best = max(best, self._rate(name, g, d, dtype, self.seconds / 2))
        return best

    def _frozen(self, name: str) -> tuple[nn.Module, nn.Module]:
        """Frozen copies of both networks, BatchNorm folded where a pass shows that it follows a layer after the place."""
        g, d = (copies.private_copy(net).to(self.refiner.device).float() for net in (self.generator, self.discriminator))
        z, given = self._example()
        to_g, to_d = self.to_g.values(given), self.to_d.values(given)
        tail, read = _cut(g, self.to_g, name, z, to_g), LogitReader(self.refiner.output_key)
        with torch.no_grad():
            leaf = image_of(self.to_g(g, z, *to_g)) if name == "output" else tail.activation(z, *to_g)
        leaf = leaf.detach().requires_grad_()

        def run() -> Tensor:
            x = leaf.clone()
            image = x if name == "output" else tail(x, *(to_g if name == "input" else (z, *to_g)))
            return read(self.to_d(d, image, *to_d), len(image), image.dtype).sum()

        folds = copies.norms_after_layers((g, d), run)
        return copies.fold_batch_norms(g, folds[0]), copies.fold_batch_norms(d, folds[1])

    def _rate(self, name: str, g: nn.Module, d: nn.Module, dtype: torch.dtype, seconds: float) -> float:
        """Images/s of the loop over these networks, at the best of three batch sizes."""
        device = self.refiner.device
        z = self.prior.sample(torch.arange(max(BATCHES)), 0).to(device, dtype)
        given, best = self._inputs(max(BATCHES)), 0.0
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        read = LogitReader(self.refiner.output_key)
        few = slice(0, BATCHES[0])
        tail = _cut(g, self.to_g, name, z[few], [value[few] for value in self.to_g.values(given)])

        def batch(size: int, steps: int) -> None:
            to_g, to_d = ([value[:size] for value in call.values(given)] for call in (self.to_g, self.to_d))
            _loop(tail, lambda x: read(self.to_d(d, x, *to_d), len(x), x.dtype), z[:size], to_g, steps)

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        for size in BATCHES:
            batch(size, 1)  # warm-up
            wait()
            images, started = 0, self.clock()
            while images == 0 or self.clock() - started < seconds / len(BATCHES):
                batch(size, self.steps)
                images += size
            wait()
            best = max(best, images / (self.clock() - started))
        return best


def prepared(row: Mapping[str, Any]) -> str:
    """In words, how the networks of a row of ``Bench.rows`` were prepared, how long that took, and whether it paid."""
    used = [entry["rung"] for entry in row["ladder"] if entry["kept"]]
    dropped = [f"{entry['rung']} ({entry['why']})" for entry in row["ladder"] if not entry["kept"]]
    told = f"prepared in {row['preparation_seconds']:.1f} s; used: {', '.join(used) or 'plain autograd'}"
    told += f"; not used: {', '.join(dropped)}" if dropped else ""
    return told + ("; here the careful loop, B1, is faster" if row["ratio_b1"] < 1 else "")


def _cut(generator: nn.Module, call: NetworkCall, name: str, z: Tensor, to_g: Sequence[Tensor]) -> Tail:
    return Tail(generator, call, name) if name in ("input", "output") else find(generator, call, name, (z, *to_g))


def _loop(tail: Tail, logits: Callable[[Tensor], Tensor], z: Tensor, to_g: Sequence[Tensor], steps: int) -> Tensor:
    """The peers' loop at one place; the modules before it run once."""
    name, given = tail.at, to_g if tail.at == "input" else (z, *to_g)
    with contextlib.ExitStack() as kept:
        with torch.no_grad():
            if name == "output":
                a = image_of(tail.call(tail.generator, z, *to_g))
            else:
                a = z if name == "input" else kept.enter_context(_prefix_once(tail, given))
        return _steps(tail, a, given, logits, steps)


def _steps(tail: Tail, a: Tensor, given: Sequence[Tensor], logits: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    def image(a: Tensor) -> Tensor:
        return a if tail.at == "output" else tail(a, *given)

    for _ in range(steps):
        a = a.detach().requires_grad_()
        F.softplus(-logits(image(a))).sum().backward()  # where all weights are frozen, it computes this gradient alone
        assert a.grad is not None
        a = a - 0.01 * a.grad
    with torch.no_grad():
        return image(a)


@contextlib.contextmanager
def _prefix_once(tail: Tail, given: Sequence[Tensor]) -> Iterator[Tensor]:
    """The activation; meanwhile modules that end before the place, and run once, give again what they gave."""
    place, open_ = tail.generator.get_submodule(tail.at), True
    ended: dict[nn.Module, list[Any]] = {}

    def end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal open_
        open_ = open_ and module is not place
        if open_:
            ended.setdefault(module, []).append(output)

    handles = [module.register_forward_hook(end) for module in tail.generator.modules()]
    a = tail.activation(*given)
    for handle in handles:
        handle.remove()
    inside = {child for module in place.modules() for child in module.modules()}
    once = [module for module, outputs in ended.items() if len(outputs) == 1 and module not in inside]
    for module in once:
        module.forward = lambda *args, _given=ended[module][0], **kwargs: _given  # type: ignore[method-assign]
    try:
        yield a
    finally:
        for module in once:
            del module.forward
