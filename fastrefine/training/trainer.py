"""One update of a discriminator on real against generated images: what shaping, tuning and fitting share."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from fastrefine import checks, noise
from fastrefine.errors import InputError
from fastrefine.networks import copies
from fastrefine.networks.calls import LogitReader, attempt, call_of, takes_labels
from fastrefine.networks.copies import unwrap
from fastrefine.networks.torch_state import seed_torch
from fastrefine.noise import Stream
from fastrefine.refiner import Refiner
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.training.batches import Batch

# With max_steps=0 it moves nothing: the engine is then the generator, by sample id.
RAW = Collaborative(step_size=1.0, loss="wasserstein")


def trainable(discriminator: nn.Module, device: torch.device) -> nn.Module:
    """A copy with its parametrizations in place and every parameter trainable; the original keeps its graph and grads."""
    with torch.inference_mode(False):
        twin = copies.twin(unwrap(discriminator)).to(device)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin.requires_grad_(True)


def _has_spectral_norm(module: nn.Module) -> bool:
    return isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in module._forward_pre_hooks.values())


class Kept:
    """The weights of a network at its lowest loss. since: losses seen after it. improved: whether it is not the first one."""

    def __init__(self, student: nn.Module, loss: float = math.inf):
        self.loss, self.weights, self.since, self.improved = loss, copy.deepcopy(student.state_dict()), 0, False

    def see(self, student: nn.Module, loss: float) -> float:
        """Keep the weights if the loss is the lowest so far; returns it."""
        if loss < self.loss:
            self.loss, self.weights, self.since, self.improved = loss, copy.deepcopy(student.state_dict()), 0, True
        else:
            self.since += 1
        return loss

    def restore(self, student: nn.Module) -> None:
        """Give the network the kept weights."""
        student.load_state_dict(self.weights)


class Trainer:
    """One update of D on real against generated images; to be used under ``quiet_torch``."""

    def __init__(
        self, student: nn.Module, refiner: Refiner, optimizer: str, learning_rate: float, betas: tuple[float, float],
        gradient_penalty: float | None, batch_norm: str, seed: int,
    ):  # fmt: skip
        checks.number("learning_rate", learning_rate, 0.0, open_low=True)
        checks.choice("optimizer", optimizer, ("adam", "sgd"))
        checks.choice("batch_norm", batch_norm, ("eval", "train"))
        if gradient_penalty is not None:
            checks.number("gradient_penalty", gradient_penalty, 0.0)
        self.student, self.refiner, self.training = student, refiner, batch_norm == "train"
        self.read, self.updates = LogitReader(refiner.output_key), 0
        self.seed, g = seed, refiner.generator
        self.reads_labels, required = takes_labels(student, refiner.discriminator_kwargs)
        by_generator, needed = takes_labels(g, refiner.generator_kwargs)
        if refiner.discriminate is not None or refiner.generate is not None:  # the functions say what they read
            self.labelled, self.required = True, False
        else:
            self.labelled, self.required = self.reads_labels or by_generator, required or needed
        self.scale = refiner.discriminator_output
        self.penalty = (10.0 if self.scale == "critic" else 0.0) if gradient_penalty is None else gradient_penalty
        parameters = list(student.parameters())
        if not parameters:
            raise InputError(f"the discriminator, a {type(student).__name__}, has no parameters to train")
        self.dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, learning_rate, betas=betas)
            if optimizer == "adam"
            else torch.optim.SGD(parameters, learning_rate)
        )

    def checked(self, batch: Batch) -> Batch:
        """The batch with the inputs that a network takes; InputError if one needs labels and there are none."""
        x, inputs = batch
        if "labels" not in inputs and self.required:
            raise InputError(
                "the generator or the discriminator needs labels: give `real` as (image, label), or pass real_labels=(N,)"
            )
        return x, inputs if self.labelled else {}

    def update(self, real: Tensor, fake: Tensor, inputs: dict[str, Tensor]) -> dict[str, float]:
        """One step of the optimizer; returns loss and mean logits. What D draws is a function of (seed, update)."""
        device = self.refiner.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            seed_torch(device, (self.seed * 1_000_003 + self.updates) % 2**63)
            self.student.train(self.training)
            for module in self.student.modules():
                if _has_spectral_norm(module):  # which follows its weights in training mode only
                    module.training = True
            real = real.detach().to(device, self.dtype).requires_grad_(self.penalty > 0)
            fake = fake.detach().to(device, self.dtype)
            inputs = {k: v.to(device, self.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
            d_real, d_fake = self._heads(real, inputs), self._heads(fake, inputs)
            if self.scale == "critic":
                loss = _mean(d_fake) - _mean(d_real)
            else:
                loss = _mean([F.softplus(-head) for head in d_real]) + _mean([F.softplus(head) for head in d_fake])
            if self.penalty:
                loss = loss + self.penalty * self._gradient_penalty(real, fake, d_real, inputs)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.student.eval()
        self.updates += 1
        return {"loss": loss.item(), "real_logit": _mean(d_real).item(), "fake_logit": _mean(d_fake).item()}

    def _heads(self, x: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
        """(n, P) logits of each head; a probability is turned back into its logit, for the module keeps its final sigmoid."""
        call = call_of("discriminator", self.student, inputs, self.refiner.discriminate, self.refiner.discriminator_kwargs)
        raw = attempt("discriminator", lambda: call(self.student, x, *call.values(inputs)), x)
        heads = self.read.heads(raw, len(x), torch.promote_types(x.dtype, torch.float32))
        return [torch.logit(head, eps=1e-6) for head in heads] if self.scale == "probability" else heads

    def _gradient_penalty(self, real: Tensor, fake: Tensor, d_real: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        if self.scale != "critic":
            (grad,) = torch.autograd.grad(_score(d_real).sum(), real, create_graph=True)
            return grad.flatten(1).square().sum(1).mean()
        n = min(len(real), len(fake))
        ids = torch.arange(n)
        u = noise.uniform(0, ids, torch.full_like(ids, self.updates), 1, Stream.BATCH).to(real).view(n, *[1] * (real.dim() - 1))
        middle = (u * real[:n] + (1 - u) * fake[:n]).detach().requires_grad_()
        d = self._heads(middle, {name: value[:n] for name, value in inputs.items()})
        (grad,) = torch.autograd.grad(_score(d).sum(), middle, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def _mean(heads: list[Tensor]) -> Tensor:
    """The mean over heads of the mean of a head's entries, over the batch."""
    return heads[0].mean() if len(heads) == 1 else torch.stack([head.mean() for head in heads]).mean()


def _score(heads: list[Tensor]) -> Tensor:
    """(n,): the same mean for each sample."""
    return heads[0].mean(1) if len(heads) == 1 else torch.stack([head.mean(1) for head in heads]).mean(0)
