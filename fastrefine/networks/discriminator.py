"""The discriminator, prepared: a private copy in evaluation mode, read as logits, without its final sigmoid where declared."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.errors import CouplingError, InputError, warn
from fastrefine.networks import probe, statistics
from fastrefine.networks.calls import LogitReader, NetworkCall, WithoutSigmoid, attempt, call_of, label_classes
from fastrefine.networks.copies import own_copy
from fastrefine.networks.freezing import FrozenDiscriminator
from fastrefine.options import Options

log = logging.getLogger(__name__)
_STREAM = 1 << 16  # the generator's draws have the streams below


class PreparedDiscriminator:
    """The discriminator as images -> logits (n, P), in evaluation mode and in the dtype of the state.

    reference: gives images and inputs on which coupling="freeze" takes the statistics of a batch.
    """

    def __init__(
        self, discriminator: nn.Module, options: Options, images: Tensor, inputs: Mapping[str, Tensor],
        reference: Callable[[], tuple[Tensor, Mapping[str, Tensor]]],
    ):  # fmt: skip
        self.scale, self.num_classes = options.discriminator_output, None
        self.rows = None if len(images) == probe.rows(options) else len(images)  # the only size of a batch that is known to run
        call = self.call = call_of(
            "discriminator", discriminator, inputs, options.discriminate, options.discriminator_kwargs or {}
        )  # fmt: skip
        self._own = lambda given: own_copy(given, images, lambda module: call(module, images.clone(), *call.values(inputs)))
        own = self._own(discriminator)
        if self.takes_labels:
            self.num_classes = label_classes([own], lambda *given: call(own, *given), images, call, inputs)

        def run(module: nn.Module, call: NetworkCall) -> Any:
            return attempt("discriminator", lambda: call(module, images.clone(), *call.values(inputs)), images)

        if options.pack > 1:
            call = replace(call, pack=options.pack)
        if options.on_noise == "freeze":
            call = call.with_draws(lambda: run(own, call), _STREAM)
        statistics.check("discriminator", discriminator, own, lambda module: run(module, call))
        self.call, self.reader = _output_form(own, options, run, images, call)
        self.module = own
        self._sizes = [head.shape[1] for head in self.reader.heads(run(own, self.call), len(images), torch.float64)]

        def logits(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            return self.logits(self.module, x, given)

        self.frozen: FrozenDiscriminator | None = None
        if options.coupling == "freeze":
            probe.check_repeatable({"discriminator": self.module}, lambda x: logits(x.clone(), inputs), images)
            try:
                probe.check_independent({"discriminator": self.module}, logits, images, inputs)
            except CouplingError:
                self._freeze(*reference(), options.group_size)
        probe.check({"discriminator": self.module}, logits, images, inputs, options.coupling)

    def _freeze(self, images: Tensor, inputs: Mapping[str, Tensor], group: int | None) -> None:
        """Hold what mixes the samples of a batch at its value on these images."""
        call, reader = self.call, self.reader

        def heads(module: nn.Module, x: Tensor, *values: Tensor) -> list[Tensor]:
            return reader.heads(call(module, x, *values), len(x), torch.float64 if x.dtype == torch.float64 else torch.float32)

        self.module = self.frozen = FrozenDiscriminator(self.module, heads, (images, *call.values(inputs)), group)
        self.call, self.reader = NetworkCall(call.names), LogitReader()
        log.info("statistics of the batch are held at their values on reference images: %s", self.report()["coupling"])

    def report(self) -> dict[str, Any]:
        """What was held, for ``Result.report``; empty where nothing was."""
        if self.frozen is None:
            return {}
        change, spread = self.frozen.change, self.frozen.spread
        return {"coupling": {"held": self.frozen.described(), "logit_change": change, "logit_spread": spread}}

    @property
    def takes_labels(self) -> bool:
        return "labels" in self.call.names

    def updated(self, discriminator: nn.Module) -> PreparedDiscriminator:
        """The same with other weights; nothing is probed again."""
        twin = copy.copy(self)
        own = self._own(discriminator)
        twin.module = own if self.frozen is None else self.frozen.updated(own)
        twin.frozen = None if self.frozen is None else twin.module  # type: ignore[assignment]
        return twin

    def logits(self, module: nn.Module, images: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, P) logits by ``module``: the exact copy, or a folded form of it. P: the entries of all heads."""
        raw = self.call(module, images, *self.call.values(inputs))
        return self.reader(raw, len(images), torch.float64 if images.dtype == torch.float64 else torch.float32)

    def score(self, images: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n,) logits by the exact copy. Where it takes whole batches or packs only, the last image fills them up."""
        n, whole = len(images), self.rows or self.call.pack
        if n % whole:
            spare = torch.arange(-(-n // whole) * whole, device=images.device).clamp(max=n - 1)
            images, inputs = images[spare], {name: value[spare] for name, value in inputs.items()}
        return attempt("discriminator", lambda: self.mean(self.logits(self.module, images, inputs)), images)[:n]

    def mean(self, values: Tensor) -> Tensor:
        """(n,): the mean over the heads of the mean over each head's entries, of values (n, P)."""
        if len(self._sizes) == 1:
            return values.squeeze(1) if self._sizes == [1] else values.mean(1)
        return torch.stack([head.mean(1) for head in values.split(self._sizes, 1)]).mean(0)


class EndsInSigmoid(InputError):
    """D was declared to return logits, and returns probabilities."""


def _output_form(
    discriminator: nn.Module, options: Options, run: Callable[[nn.Module, NetworkCall], Any], images: Tensor, call: NetworkCall
) -> tuple[NetworkCall, LogitReader]:
    """How to call our copy of D without a declared final sigmoid, and how to read it; checks the declaration.

    run: runs a module on the probe batch ``images`` by a call. With "probability" the final sigmoid is left out, so that a
    logit of 60 stays 60. InputError when declaration and network disagree.
    """
    scale, key = options.discriminator_output, options.output_key
    reader, n = LogitReader(key, pack=options.pack), len(images)
    with torch.no_grad(), WithoutSigmoid(-1) as sigmoids:
        raw = run(discriminator, call)
        if options.discriminate is None and images.dim() > 2 and isinstance(raw, Tensor) and raw.shape == images.shape:
            raise InputError(
                "the discriminator returned tensors of the images' own shape, as an autoencoder does; write its energy, e.g. "
                "discriminate=lambda D, x: -(D(x) - x).abs().flatten(1).mean(1)"
            )
        values = reader(raw, n, torch.float64)
    if values.shape[1] > 1:
        warn(f"the discriminator returns a map of {values.shape[1]} patches; their mean is the sample's logit")
    known = values[values.isfinite()]  # a sample that is not finite decides nothing
    inside, found = bool(((known >= 0) & (known <= 1)).all()), False
    if inside and sigmoids.count:
        without = replace(call, sigmoid=sigmoids.count - 1)
        with torch.no_grad():
            logits = reader(run(discriminator, without), n, torch.float64)
        found = torch.allclose(torch.sigmoid(logits), values, atol=1e-5, equal_nan=True)
    if scale != "probability":
        if len(known) and found:
            raise EndsInSigmoid(
                f"the discriminator ends in a sigmoid and returned values in [0, 1], but discriminator_output={scale!r} was "
                "declared; pass discriminator_output='probability'"
            )
        return call, reader
    if not inside:
        raise InputError(
            f"discriminator_output='probability' was declared, but the discriminator returned values from "
            f"{float(known.min()):.3g} to {float(known.max()):.3g}; pass 'logit' or 'critic'"
        )
    if found:
        return without, reader
    warn("the discriminator's sigmoid could not be found and cut: logits beyond +-16 are lost. Return logits instead")
    return call, replace(reader, invert_sigmoid=True)
