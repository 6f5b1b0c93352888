"""Training of GANs: short, plain, and the same bits for the same seed.

All randomness comes from a torch.Generator of the call's own; torch's global state is neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrefine.errors import InputError

M = TypeVar("M", bound=nn.Module)
Draw = Callable[[int, torch.Generator], Tensor]
Pair = tuple[nn.Module, nn.Module]
WEIGHTED = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


@dataclass(frozen=True)
class Training:
    """How a pair is trained: one update of D, then one of G, both on the non-saturating loss.

    optimizer: "sgd" | "adam" (with betas), at rates (G, D), constant: a run of n steps is the beginning of every longer
    one. r1: weight of the mean squared gradient norm at real samples [R1, Mescheder et al. 2018]; 0 leaves it out.
    bfloat16: between their first and last layer with weights sequential networks multiply in bfloat16 (twice as fast on a
    CPU that has it); weights, BatchNorm and the outer layers stay float32.
    """

    batch_size: int
    optimizer: str
    rates: tuple[float, float]
    betas: tuple[float, float] = (0.5, 0.9)
    r1: float = 0.0
    bfloat16: bool = False


def build(factory: Callable[[], M], seed: int) -> M:
    """``factory()`` with its parameters initialised from `seed`; the global random state comes back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def normal(dim: int) -> Draw:
    """Latents (n, dim), N(0, I)."""
    return lambda n, random: torch.randn(n, dim, generator=random)


def uniform(dim: int) -> Draw:
    """Latents (n, dim), uniform on (-1, 1)."""
    return lambda n, random: 2 * torch.rand(n, dim, generator=random) - 1


def images_of(data: Tensor) -> Draw:
    """Real images drawn with replacement from (N, C, H, W)."""
    return lambda n, random: data[torch.randint(len(data), (n,), generator=random)]


class Trainer:
    """A pair in training, with everything that its next step depends on.

    generator, discriminator: trained in place. real, latents: what a batch is drawn with; all randomness comes from a
    torch.Generator of the trainer's own, in the order real, latents of D, latents of G.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, real: Draw, latents: Draw, training: Training, seed: int
    ):
        self.generator, self.discriminator, self.training = generator, discriminator, training
        self.real, self.latents = real, latents
        self.random, self.step = torch.Generator().manual_seed(seed), 0
        self.optimizers = [
            _optimizer(training, net, rate) for net, rate in zip((generator, discriminator), training.rates, strict=True)
        ]

    def advance(self, steps: int) -> Iterator[int]:
        """Train up to ``steps`` in all, giving each finished step; the networks are in train mode meanwhile."""
        self.generator.train()
        self.discriminator.train()
        while self.step < steps:
            self._update()
            self.step += 1
            yield self.step
        self.generator.eval()
        self.discriminator.eval()

    def _update(self) -> None:
        n, r1 = self.training.batch_size, self.training.r1
        opt_g, opt_d = self.optimizers
        real = self.real(n, self.random).requires_grad_(r1 > 0)
        with torch.no_grad():
            fake = self._apply(self.generator, self.latents(n, self.random))
        logits = self._apply(self.discriminator, real)
        loss = F.softplus(-logits).mean() + F.softplus(self._apply(self.discriminator, fake)).mean()
        if r1 > 0:
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + r1 * slope.square().flatten(1).sum(1).mean()
        descend(opt_d, loss)

        self.discriminator.requires_grad_(False)
        fake = self._apply(self.generator, self.latents(n, self.random))
        descend(opt_g, F.softplus(-self._apply(self.discriminator, fake)).mean())
        self.discriminator.requires_grad_(True)

    def _apply(self, network: nn.Module, x: Tensor) -> Tensor:
        """On the network's own device; its output is float32."""
        device = next(network.parameters()).device
        x = x.to(device)
        if not self.training.bfloat16:
            return network(x)
        assert isinstance(network, nn.Sequential)
        weighted = [i for i, layer in enumerate(network) if isinstance(layer, WEIGHTED)]
        first, last = weighted[0] + 1, weighted[-1]
        h = network[:first](x)
        with torch.autocast(device.type, torch.bfloat16):
            for layer in list(network)[first:last]:  # a slice is of the network's class, which may do more at its input
                h = layer(h)
        h = h.float()
        for layer in list(network)[last:]:
            h = layer(h)
        return h

    def state(self) -> dict[str, Tensor]:
        """Everything as named tensors."""
        found = {"random": self.random.get_state(), "step": torch.tensor(self.step)}
        for name, net, optimizer in self._parts():
            found |= {f"{name}.net.{key}": tensor for key, tensor in net.state_dict().items()}
            for index, slots in optimizer.state_dict()["state"].items():
                found |= {f"{name}.optimizer.{index}.{key}": torch.as_tensor(value) for key, value in slots.items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up ``state``."""
        self.random.set_state(state["random"])
        self.step = int(state["step"])
        for name, net, optimizer in self._parts():
            net.load_state_dict({key.split(".net.", 1)[1]: t for key, t in state.items() if key.startswith(f"{name}.net.")})
            slots: dict[int, dict[str, Tensor]] = {}
            for key, tensor in state.items():
                if key.startswith(f"{name}.optimizer."):
                    index, slot = key.split(".")[2:]
                    slots.setdefault(int(index), {})[slot] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})

    def _parts(self) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
        yield "generator", self.generator, self.optimizers[0]
        yield "discriminator", self.discriminator, self.optimizers[1]


def _optimizer(training: Training, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), rate)
    return torch.optim.Adam(network.parameters(), rate, betas=training.betas)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def train_gan(
    generator: nn.Module,
    discriminator: nn.Module,
    images: Tensor,
    *,
    latent_dim: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: tuple[float, float] = (3e-4, 3e-4),
    r1: float = 0.2,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
) -> None:
    """Trains both networks in place with the non-saturating loss [Goodfellow et al. 2014] and leaves them in eval mode.

    images: (N, C, H, W); latents are N(0, I) of shape (batch_size, latent_dim). One step updates the discriminator,
    then the generator, with Adam (betas .5, .9) at learning_rate = (generator, discriminator). `r1` weighs the squared
    gradient norm at real images, mean over the batch [R1, Mescheder et al. 2018]; 0 leaves it out. Rates are constant:
    a run of n steps is the beginning of every longer run of one seed. `callback` gets the number of finished steps.
    """
    if images.ndim != 4 or not len(images):
        raise InputError(f"got images of shape {tuple(images.shape)}; wanted (N, C, H, W) with N >= 1")
    if steps < 0 or batch_size < 1:
        raise InputError(f"got steps={steps}, batch_size={batch_size}; wanted steps >= 0 and batch_size >= 1")
    training = Training(batch_size, "adam", learning_rate, r1=r1)
    trainer = Trainer(generator, discriminator, images_of(images), normal(latent_dim), training, seed)
    for step in trainer.advance(steps):
        if callback is not None:
            callback(step)
