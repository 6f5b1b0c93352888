"""WGAN-GP on two-dimensional data (Gulrajani et al. 2017), with the networks of [DDLS]; the same bits for one seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrefine.demo.gan import build

LATENT_DIM = 2


def mlp(
    inputs: int, width: int, outputs: int, activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2)
) -> nn.Sequential:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for size in (inputs, width, width):
        layers += [nn.Linear(size, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def generator() -> nn.Sequential:
    """2 -> 256 x 3 -> 2, leaky ReLU ([DDLS] 5.1)."""
    return steep(mlp(LATENT_DIM, 256, 2))


def critic() -> nn.Sequential:
    """2 -> 512 x 3 -> 1, leaky ReLU ([DDLS] 5.1)."""
    return steep(mlp(2, 512, 1))


def steep(network: nn.Sequential) -> nn.Sequential:
    """He's initialisation with a first layer 1.5 times as steep: torch's own starts so flat that the modes take far longer."""
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        nn.init.kaiming_normal_(layer.weight, 0.2)
    with torch.no_grad():
        linear[0].weight.mul_(1.5)
        linear[0].bias.uniform_(-1.5, 1.5)
    return network


def train_wgan_gp(
    real: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    batch_size: int = 100,
    critic_steps: int = 3,
    learning_rate: tuple[float, float] = (2e-4, 1e-3),
    penalty: float = 0.1,
    constant: float = 0.3,
    seed: int = 0,
    callback: Callable[[int, nn.Sequential], None] | None = None,
) -> tuple[nn.Sequential, nn.Sequential]:
    """A generator and its critic, in eval mode. real(n, random): (n, 2) fresh samples.

    Adam (betas .5, .9) at learning_rate = (generator, critic), held for the share ``constant`` of the steps, then falling
    linearly to a fiftieth. penalty: on (|grad D| - 1)^2 between real and fake. The critic's two wide layers multiply in
    bfloat16 while it is trained (three times faster on a CPU that has it); weights, sums and the generator are float32.
    """
    g, d = build(generator, seed), build(critic, seed + 1)
    random = torch.Generator().manual_seed(seed)
    adam = [
        torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.9), fused=True)
        for net, rate in zip((g, d), learning_rate, strict=True)
    ]
    for step in range(1, steps + 1):
        left = (steps - step) / max(steps * (1 - constant), 1)
        for optimizer, rate in zip(adam, learning_rate, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 0.02 + 0.98 * left)
        for _ in range(critic_steps):
            x = real(batch_size, random)
            with torch.no_grad():
                fake = g(torch.randn(batch_size, LATENT_DIM, generator=random))
            u = torch.rand(batch_size, 1, generator=random)
            between = (u * x + (1 - u) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(_score(d, between).sum(), between, create_graph=True)
            scores = _score(d, torch.cat([x, fake]))
            loss = scores[batch_size:].mean() - scores[:batch_size].mean()
            loss = loss + penalty * (slope.norm(dim=1) - 1).square().mean()
            adam[1].zero_grad(set_to_none=True)
            loss.backward()
            adam[1].step()
        d.requires_grad_(False)
        loss = -_score(d, g(torch.randn(batch_size, LATENT_DIM, generator=random))).mean()
        adam[0].zero_grad(set_to_none=True)
        loss.backward()
        adam[0].step()
        d.requires_grad_(True)
        if callback is not None:
            callback(step, g)
    return g.eval(), d.eval()


def _score(d: nn.Sequential, x: Tensor) -> Tensor:
    h = d[:2](x)
    with torch.autocast("cpu", torch.bfloat16):
        h = d[2:6](h)
    return d[6](h.float())


class Scaled(nn.Module):
    """x -> factor x: a logit with features .018 wide is learned far faster when they are not so small."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def ratio() -> nn.Sequential:
    """Backbone of the fitted logit: 2 -> 256 x 3 -> 1, SiLU, for Langevin steps want a smooth gradient."""
    return nn.Sequential(Scaled(15.0), *mlp(2, 256, 1, nn.SiLU))
