"""Training of GANs for the experiments: plain, the same bits for the same seed, and taken up again after a cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastrefine.experiments.cells import Cells

Draw = Callable[[int, torch.Generator], Tensor]
Pair = tuple[nn.Module, nn.Module]
WEIGHTED = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
SAVE_EVERY = 60.0  # seconds between states that a cut training is taken up from


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


def normal(dim: int) -> Draw:
    """Latents (n, dim), N(0, I)."""
    return lambda n, random: torch.randn(n, dim, generator=random)


def uniform(dim: int) -> Draw:
    """Latents (n, dim), uniform on (-1, 1)."""
    return lambda n, random: 2 * torch.rand(n, dim, generator=random) - 1


def images(data: Tensor) -> Draw:
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


def checkpoints(cells: Cells, name: str, make: Callable[[], Trainer], steps: Sequence[int]) -> dict[int, Pair]:
    """The pair after each of ``steps``, in eval mode: from ``cells``, or trained now, from where a cut training stood.

    make: the trainer at step 0; called once more for each pair, whose weights are loaded into its networks.
    """
    missing = [k for k in sorted(steps) if not cells.has(f"{name}-{k}")]
    state = f"{name}-state"
    if missing:
        trainer = make()
        if cells.has(state):
            trainer.load(cells.tensors(state, dict))
        if trainer.step > missing[0]:  # a checkpoint was added: begin again
            trainer = make()
        saved = time.monotonic()
        with tqdm(total=missing[-1], initial=trainer.step, desc=name, disable=None) as bar:
            for target in missing:
                for _ in trainer.advance(target):
                    bar.update()
                    if time.monotonic() - saved > SAVE_EVERY:
                        cells.put(state, trainer.state())
                        saved = time.monotonic()
                pair = nn.ModuleList([trainer.generator, trainer.discriminator])
                cells.put(f"{name}-{target}", pair.state_dict())
                cells.put(state, trainer.state())
    return {k: _loaded(cells, f"{name}-{k}", make()) for k in steps}


def _loaded(cells: Cells, key: str, trainer: Trainer) -> Pair:
    pair = nn.ModuleList([trainer.generator, trainer.discriminator])
    pair.load_state_dict(cells.tensors(key, dict))
    return trainer.generator.eval(), trainer.discriminator.eval()


def _optimizer(training: Training, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), rate)
    return torch.optim.Adam(network.parameters(), rate, betas=training.betas)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
