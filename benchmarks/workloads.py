"""The networks that are measured, by name: untrained weights of the published sizes, batch statistics settled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine import models

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
    channels_last: bool = True  # the layout in which B1 and B2 run

    def pair(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[nn.Module, nn.Module]:
        """(generator, discriminator) in eval mode, weights of seed 0, running statistics those of a few batches."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator, discriminator = self.generator().train().to(device), self.discriminator().train().to(device)
            norms: list[Any] = [m for n in (generator, discriminator) for m in n.modules() if isinstance(m, _NORMS)]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches, with nothing left of the initial 0 and 1
            with torch.no_grad():
                for _ in range(3 if norms else 0):
                    discriminator(generator(torch.randn(64, self.latent).to(device)))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        return generator.to(dtype).eval(), discriminator.to(dtype).eval()


def halves(generator: Any, at: str) -> tuple[nn.Module, nn.Module]:
    """(prefix, tail) of a generator cut at ``at``, by hand: the baselines must not depend on fastrefine's cut.

    prefix: latents -> the activation, or (activation, *what else the tail needs). tail: these -> images.
    """
    if at == "input":
        return nn.Identity(), generator
    if at == "output":
        return generator, nn.Identity()
    if isinstance(generator, nn.Sequential):
        end = int(at) + 1
        return generator[:end], nn.Sequential(*list(generator)[end:])  # a slice keeps the class, which shapes latents
    if isinstance(generator, models.StyleGAN2Generator):
        level = (int(at.removeprefix("layers.")) - 1) // 2
        return _LevelsUpTo(generator, level), _LevelsAfter(generator, level)
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


class _LevelsUpTo(nn.Module):
    """The part of a StyleGAN2 up to the output of the last layer of a level: (activation, styles, image so far if any)."""

    def __init__(self, generator: models.StyleGAN2Generator, last: int):
        super().__init__()
        self.generator, self.last = generator, last

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        g = self.generator
        style = g.mapping(latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + 1e-8))
        h, image = g.constant.expand(len(latent), -1, -1, -1), None
        for level in range(self.last + 1):
            if level:
                image = _with_rgb(g, level - 1, h, style, image)
            h = g.layers[2 * level + 1](g.layers[2 * level](h, style), style)
        return (h, style) if image is None else (h, style, image)


class _LevelsAfter(nn.Module):
    """The rest: the level's own colours, then the later levels."""

    def __init__(self, generator: models.StyleGAN2Generator, last: int):
        super().__init__()
        self.generator, self.last = generator, last

    def forward(self, h: Tensor, style: Tensor, image: Tensor | None = None) -> Tensor:
        g = self.generator
        image = _with_rgb(g, self.last, h, style, image)
        for level in range(self.last + 1, len(g.to_rgb)):
            h = g.layers[2 * level + 1](g.layers[2 * level](h, style), style)
            image = _with_rgb(g, level, h, style, image)
        return image


def _with_rgb(generator: models.StyleGAN2Generator, level: int, h: Tensor, style: Tensor, image: Tensor | None) -> Tensor:
    rgb = generator.to_rgb[level](h, style)
    return rgb if image is None else F.interpolate(image, scale_factor=2, mode="bilinear") + rgb


def _after_block(generator: Any, index: int, h: Tensor) -> Tensor:
    return generator.attention(h) if index == getattr(generator, "attention_after", None) else h


WORKLOADS = {
    w.name: w
    for w in (
        Workload(  # small enough for a run of 200 samples per slot on a CPU
            "dcgan16", 32, lambda: models.dcgan_generator(16, 32, 32), lambda: models.dcgan_discriminator(16, 32),
            {"input": "input", "first": "2", "middle": "5", "output": "output"}, 0.1,
        ),
        Workload(
            "dcgan32", 100, lambda: models.dcgan_generator(32, 100, 64), lambda: models.dcgan_discriminator(32, 64),
            {"input": "input", "first": "2", "middle": "5", "output": "output"}, 0.1,
        ),
        Workload(
            "dcgan64", 100, lambda: models.dcgan_generator(64, 100, 64), lambda: models.dcgan_discriminator(64, 64),
            {"input": "input", "first": "2", "middle": "8", "output": "output"}, 0.1,
        ),
        Workload(
            "sngan32", 128, models.SNGANGenerator, models.SNGANDiscriminator,
            {"input": "input", "first": "blocks.0", "middle": "blocks.1", "output": "output"}, 0.1,
        ),
        Workload(
            "sagan128", 128, lambda: models.SAGANGenerator(num_classes=0), lambda: models.SAGANDiscriminator(num_classes=0),
            {"input": "input", "first": "blocks.0", "middle": "blocks.2", "output": "output"}, 0.1,
        ),
        Workload(  # modulated convolutions: styles travel with every sample, and the layout is changed for every one
            "stylegan2", 512, models.StyleGAN2Generator, functools.partial(models.StyleGAN2Discriminator, group_size=0),
            {"input": "input", "first": "layers.1", "middle": "layers.5", "output": "output"}, 300.0, False,
        ),
        Workload(  # the same in little, to try a command
            "stylegan16", 32, functools.partial(models.StyleGAN2Generator, 16, 32, 32, 8, 32, 2),
            functools.partial(models.StyleGAN2Discriminator, 16, 8, 32, 0),
            {"input": "input", "first": "layers.1", "middle": "layers.3", "output": "output"}, 300.0, False,
        ),
        Workload(
            "mlp2d", 2, models.mlp_generator, models.mlp_discriminator,
            {"input": "input", "first": "1", "middle": "3", "output": "output"}, 0.1,
        ),
    )
}  # fmt: skip
