"""The networks that are measured, by name: untrained weights of the published sizes, batch statistics settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.models import (
    SAGANDiscriminator,
    SAGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
    dcgan_discriminator,
    dcgan_generator,
    mlp_discriminator,
    mlp_generator,
)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Workload:
    """A pair, its latents, its cuts, and a step size that moves the samples without making them chaotic.

    cuts: what is refined ("input" | "first" | "middle" | "output") -> the name of the cut, as ``Refiner(at=)`` takes it.
    """

    name: str
    latent: int
    generator: Callable[[], nn.Module]
    discriminator: Callable[[], nn.Module]
    cuts: dict[str, str]
    step_size: float

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        """(generator, discriminator) in eval mode, weights of seed 0, running statistics those of a few batches."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator, discriminator = self.generator().train(), self.discriminator().train()
            norms: list[Any] = [m for n in (generator, discriminator) for m in n.modules() if isinstance(m, _NORMS)]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches, with nothing left of the initial 0 and 1
            with torch.no_grad():
                for _ in range(3):
                    discriminator(generator(torch.randn(64, self.latent)))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        return generator.to(dtype).eval(), discriminator.to(dtype).eval()


def halves(generator: Any, at: str) -> tuple[nn.Module, nn.Module]:
    """(prefix, tail) of a generator cut at ``at``, by hand: the baselines must not depend on fastrefine's cut."""
    if at == "input":
        return nn.Identity(), generator
    if at == "output":
        return generator, nn.Identity()
    if isinstance(generator, nn.Sequential):
        end = int(at) + 1
        return generator[:end], nn.Sequential(*list(generator)[end:])  # a slice keeps the class, which shapes latents
    block = int(at.removeprefix("blocks."))
    return _BlocksUpTo(generator, block), _BlocksAfter(generator, block)


class _BlocksUpTo(nn.Module):
    """The part of a residual generator up to the output of blocks.k."""

    def __init__(self, generator: Any, last: int):
        super().__init__()
        self.generator, self.last = generator, last

    def forward(self, latent: Tensor) -> Tensor:
        h = self.generator.linear(latent).view(len(latent), -1, 4, 4)
        for index in range(self.last + 1):
            if index:
                h = _after_block(self.generator, index - 1, h)
            h = self.generator.blocks[index](h, None)
        return h


class _BlocksAfter(nn.Module):
    """The rest: attention where it follows, later blocks, the output layer."""

    def __init__(self, generator: Any, last: int):
        super().__init__()
        self.generator, self.last = generator, last

    def forward(self, h: Tensor) -> Tensor:
        h = _after_block(self.generator, self.last, h)
        for index in range(self.last + 1, len(self.generator.blocks)):
            h = _after_block(self.generator, index, self.generator.blocks[index](h, None))
        return torch.tanh(self.generator.to_image(torch.relu(self.generator.norm(h))))


def _after_block(generator: Any, index: int, h: Tensor) -> Tensor:
    return generator.attention(h) if index == getattr(generator, "attention_after", None) else h


WORKLOADS = {
    w.name: w
    for w in (
        Workload(  # small enough for a run of 200 samples per slot on a CPU
            "dcgan16", 32, lambda: dcgan_generator(16, 32, 32), lambda: dcgan_discriminator(16, 32),
            {"input": "input", "first": "2", "middle": "5", "output": "output"}, 0.1,
        ),
        Workload(
            "dcgan32", 100, lambda: dcgan_generator(32, 100, 64), lambda: dcgan_discriminator(32, 64),
            {"input": "input", "first": "2", "middle": "5", "output": "output"}, 0.1,
        ),
        Workload(
            "dcgan64", 100, lambda: dcgan_generator(64, 100, 64), lambda: dcgan_discriminator(64, 64),
            {"input": "input", "first": "2", "middle": "8", "output": "output"}, 0.1,
        ),
        Workload(
            "sngan32", 128, SNGANGenerator, SNGANDiscriminator,
            {"input": "input", "first": "blocks.0", "middle": "blocks.1", "output": "output"}, 0.1,
        ),
        Workload(
            "sagan128", 128, lambda: SAGANGenerator(num_classes=0), lambda: SAGANDiscriminator(num_classes=0),
            {"input": "input", "first": "blocks.0", "middle": "blocks.2", "output": "output"}, 0.1,
        ),
        Workload(
            "mlp2d", 2, mlp_generator, mlp_discriminator,
            {"input": "input", "first": "1", "middle": "3", "output": "output"}, 0.1,
        ),
    )
}  # fmt: skip
