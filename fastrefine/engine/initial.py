"""Samples as they were before refinement, rendered again on demand: nothing of them is kept but where they come from."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastrefine.engine.proposals import Source
from fastrefine.engine.transfer import send
from fastrefine.errors import InputError
from fastrefine.networks import torch_state
from fastrefine.networks.copies import Weights
from fastrefine.networks.target import Target
from fastrefine.options import Options


class InitialImages:
    """The initial images of one stream's samples by their ids, with the bits of a run of no steps.

    It holds the run's own copy of the generator, so updates of the caller's do no harm. What is borrowed (modules that a
    plain function reads, given latents, labels and conditions) is watched: once it has changed, a call raises InputError.
    """

    def __init__(self, options: Options, source: Source):
        self.options, self.source = options, source
        self.versions = self._versions()

    def use(self, target: Target) -> None:
        """Render with this target's generator, in blocks of its number of slots, from now on."""
        self.generator, self.size = target.generator, target.num_slots
        self.flops = None if target.flops is None else target.flops * target.num_slots
        self.weights = [Weights(module) for module in self.generator.borrowed]

    def __call__(self, ids: Tensor) -> Tensor:
        """Images (n, ...) of samples with these ids (n,) of the stream, on the output device. Whole blocks are rendered."""
        if self._versions() != self.versions:
            raise InputError(
                "initial_images are rendered from the given latents, labels and conditions, and these were changed in place "
                "since the run; read initial_images before you change them, or pass copies"
            )
        if [Weights(module) for module in self.generator.borrowed] != self.weights:
            raise InputError(
                "initial_images are rendered on demand, and a module that the generator's function reads was updated since the "
                "run; read initial_images before the update, or sample anew with max_steps=0"
            )
        options, device = self.options, self.options.device
        ids, found = ids.cpu(), None
        with ExitStack() as modes:
            modes.enter_context(torch_state.quiet_torch(device))
            modes.enter_context(torch_state.arithmetic(options.precision, options.deterministic))
            modes.enter_context(self.generator.evaluation_mode())
            modes.enter_context(torch_state.threads_for(self.flops))
            for index in (ids // self.size).unique().tolist():
                latents, inputs = self.source.given(torch.arange(index * self.size, (index + 1) * self.size), options.dtype)
                a, context = self.generator.prefix(
                    send(latents, device), {name: send(value, device) for name, value in inputs.items()}
                )
                images = self.generator.render(a, context).to(options.output_device)
                found = images.new_empty(len(ids), *images.shape[1:]) if found is None else found
                here = (ids // self.size == index).nonzero()[:, 0]
                found[here.to(found.device)] = images[(ids[here] % self.size).to(images.device)]
        assert found is not None
        return found

    def _versions(self) -> list[int]:
        given = [value for value in (self.source.latents, *self.source.inputs.values()) if value is not None]
        return [0 if value.is_inference() else value._version for value in given]

    def __deepcopy__(self, memo: dict[int, Any]) -> InitialImages:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a file holds the result, not the networks
