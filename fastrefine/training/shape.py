"""Discriminators that suit refinement: shaped on refined samples, tuned on raw ones, or fitted from nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from tqdm import tqdm

from fastrefine import checks, stopping
from fastrefine.diagnosis.calibration import diagnose
from fastrefine.errors import InputError
from fastrefine.models.default import default_discriminator
from fastrefine.networks import copies
from fastrefine.networks.calls import Readout, takes_labels
from fastrefine.networks.copies import unwrap
from fastrefine.networks.cut_check import seed_noise
from fastrefine.networks.split import Split
from fastrefine.networks.torch_state import quiet_torch
from fastrefine.noise import Stream, uniform
from fastrefine.priors import Prior
from fastrefine.refiner import Refiner
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.stopping import StopRule
from fastrefine.training.batches import Batch, RealBatches

Callback = Callable[[dict[str, float]], None]
# With max_steps=0 it moves nothing: the engine is then the generator, by sample id.
_RAW = Collaborative(step_size=1.0, loss="wasserstein")
MIN_HELD_OUT, HELD_OUT = 16, 1000  # real and generated images that fit_discriminator stops on


def shape_discriminator(
    refiner: Refiner,
    real: Any,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    *,
    real_labels: Any = None,
    latents: Tensor | None = None,
    stop: StopRule | float | None = None,
    optimizer: str = "adam",
    betas: tuple[float, float] = (0.5, 0.999),
    gradient_penalty: float | None = None,
    batch_norm: str = "eval",
    seed: int = 0,
    progress: bool | None = False,
    callback: Callback | None = None,
) -> nn.Module:
    """Shape D for refinement ([CS] Alg. 2): alternate a refined batch by the current D and one update of D on it.

    refiner: with a prior, or pass ``latents`` (N, ...) to draw proposals from. Its D and G stay as they are.
    real: images (N, ...) as a tensor or array, a Dataset or a loader, of images or (image, label). real_labels: labels of
        a tensor, array or Dataset, in place of its own. The proposals get the labels of the real batch.
    stop: when refined samples leave; None is [CS]'s "probabilistic" refinement, a step drawn uniformly from
        0 ... max_steps (stopping.UniformStep), so that D sees every stage. Pass ``refiner.stop`` to use its own rule. A
        rule or sampler that reads the refiner's ``real`` scores all of it anew in every iteration.
    optimizer: "adam" (with betas) | "sgd". gradient_penalty: on a logit the weight of |grad D|^2 at real images (R1 of
        Mescheder et al. 2018 without its factor 1/2), default 0; on a critic of WGAN-GP's two-sided penalty, default 10.
    batch_norm: "eval" keeps D's BatchNorm and dropout in eval mode while it is updated; "train" updates its statistics
        and draws dropout by (seed, iteration). Spectral norms of torch follow their weights in both.
    Proposals have consecutive ids under ``seed``, from 0, as many in each iteration as there are real images.
    progress: a tqdm bar on stderr; None shows it on a terminal only.
    callback: called each iteration with {"iteration", "loss", "real_logit", "fake_logit"}.

    Returns a new module in eval mode; use it with ``refiner.with_discriminator``. Raises InputError on bad arguments.
    """
    checks.count("iterations", iterations, 0)
    if not isinstance(refiner, Refiner):
        raise InputError(f"refiner is a {type(refiner).__name__}; wanted a fastrefine.Refiner")
    with quiet_torch(refiner.device):
        student = _trainable(refiner.discriminator, refiner.device)
        rule = stopping.UniformStep() if stop is None else stopping.as_rule(stop)
        twin = refiner.with_discriminator(student).replaced(
            stop=rule, num_slots=min(refiner.num_slots, checks.count("batch_size", batch_size, 1)),
            progress=False, callback=None, output_device=refiner.device,
        )  # fmt: skip
        if twin.prior is None and latents is None:
            raise InputError("the refiner has no prior: pass latents=(N, ...) to draw proposals from")
        trainer = _Trainer(student, refiner, optimizer, learning_rate, betas, gradient_penalty, batch_norm, seed)
        batches = RealBatches(real, batch_size, seed, real_labels, trainer.labelled)
        proposals = None if latents is None else RealBatches(checks.tensor("latents", latents), batch_size, seed + 1)
        first_id = 0
        for iteration in _bar(iterations, "shaping", progress):
            x, labels = trainer.checked(batches.batch(iteration))
            if proposals is None:
                refined = twin.sample(len(x), first_id=first_id, seed=seed, labels=labels)
            else:
                z = proposals.batch(iteration)[0][: len(x)]
                x, labels = x[: len(z)], None if labels is None else labels[: len(z)]
                refined = twin.refine(z, labels=labels, first_id=first_id, seed=seed)
            if iteration == 0:
                _check_range(twin, x)
            first_id += len(refined)
            facts = trainer.update(x, refined.images, labels)
            twin._networks.refresh(student)
            if callback is not None:
                callback({"iteration": iteration, **facts})
        return student.eval()


def tune_discriminator(
    refiner: Refiner, real: Any, iterations: int, batch_size: int, learning_rate: float, **options: Any
) -> nn.Module:
    """Train D further on real images against raw samples of G; arguments as for ``shape_discriminator``."""
    if not isinstance(refiner, Refiner):
        raise InputError(f"refiner is a {type(refiner).__name__}; wanted a fastrefine.Refiner")
    raw = refiner.replaced(max_steps=0, sampler=_RAW)
    options = {"stop": stopping.FixedSteps(), **options}
    return shape_discriminator(raw, real, iterations, batch_size, learning_rate, **options)


def fit_discriminator(
    generator: nn.Module,
    real: Any,
    iterations: int,
    *,
    prior: Prior,
    discriminator: nn.Module | None = None,
    discriminator_output: str = "logit",
    real_labels: Any = None,
    batch_size: int = 64,
    learning_rate: float = 2e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    check_every: int = 100,
    patience: int = 10,
    seed: int = 0,
    progress: bool | None = False,
) -> nn.Module:
    """Train a discriminator for a generator that comes without one, on real images against samples of G.

    real, real_labels: as for ``shape_discriminator``, labels where generator or discriminator take them. Held out are a
    tenth of the images, at least 16 and at most 1,000 but never more than half; of a loader its first batches, up to
    1,000 images of one pass, which come again when it is cycled. Every ``check_every`` iterations the Brier score on the
    held-out images and as many fresh samples is taken; the weights with the lowest are returned, and training ends after
    ``patience`` checks without a better one.
    discriminator: the backbone to train (a copy is), default models.default_discriminator of the image shape.
    discriminator_output: "logit" | "probability", of a discriminator that ends in a sigmoid (it keeps it).
    progress: a tqdm bar on stderr; None shows it on a terminal only.

    Returns a module in eval mode, D(x) -> logit (N,) unless another was given. Raises InputError on bad arguments.
    """
    checks.count("iterations", iterations, 1)
    checks.count("check_every", check_every, 1)
    checks.count("patience", patience, 1)
    checks.choice("discriminator_output", discriminator_output, ("logit", "probability"))
    if not isinstance(generator, nn.Module):
        raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module")
    device = next((p.device for p in unwrap(generator).parameters()), torch.device("cpu"))
    with quiet_torch(device):
        g = copies.private_copy(unwrap(generator)).float()
        wanted = _reads_labels(g, {})[0] or _reads_labels(discriminator, {})[0]
        batches = RealBatches(real, batch_size, seed, real_labels, wanted)
        count = HELD_OUT if batches.size is None else min(HELD_OUT, max(MIN_HELD_OUT, batches.size // 10))
        held, held_labels = batches.hold_out(count)
        held = held.float()
        if discriminator is None:
            seed_noise(torch.device("cpu"), seed)
            discriminator = default_discriminator(tuple(held.shape[1:]))
        student = _trainable(discriminator, device)
        still = _trainable(discriminator, device)  # were it the student, its updates would make every batch be traced anew
        source = Refiner(
            g, still, _RAW, max_steps=0, prior=prior, num_slots=batch_size, device=device, output_device=device,
            discriminator_output=discriminator_output,
        )  # fmt: skip
        trainer = _Trainer(student, source, "adam", learning_rate, betas, None, "train", seed)
        held, held_labels = trainer.checked((held, held_labels))
        read = held_labels if trainer.reads_labels else None
        examination = source.sample(len(held), first_id=2**31, seed=seed, labels=held_labels).images
        checks.real_images(held, tuple(examination.shape[1:]), examination)
        best, best_weights, since, first_id = float("inf"), copy.deepcopy(student.state_dict()), 0, 0
        for iteration in _bar(iterations, "fitting", progress):
            x, labels = trainer.checked(batches.batch(iteration))
            fakes = source.sample(len(x), first_id=first_id, seed=seed, labels=labels).images
            first_id += len(x)
            trainer.update(x, fakes, labels)
            if (iteration + 1) % check_every == 0 or iteration + 1 == iterations:
                judge = source.with_discriminator(student)
                brier = diagnose(judge.score(held, read), judge.score(examination, read)).brier
                if brier < best:
                    best, best_weights, since = brier, copy.deepcopy(student.state_dict()), 0
                elif (since := since + 1) >= patience:
                    break
        student.load_state_dict(best_weights)
        return student.eval()


def _bar(iterations: int, name: str, progress: bool | None) -> Iterable[int]:
    return tqdm(range(iterations), desc=name, disable=None if progress is None else not progress)


def _check_range(refiner: Refiner, real: Tensor) -> None:
    """InputError where real images are of another size or visibly in another range than G's, as it makes them."""
    generated = refiner._networks.probe_images()
    checks.real_images(real, tuple(generated.shape[1:]), generated)


def _reads_labels(network: nn.Module | None, known: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a network of the caller's takes labels, and whether it needs them."""
    if network is None:
        return False, False
    return takes_labels(network.prefix, {}) if isinstance(network, Split) else takes_labels(unwrap(network), known)


def _trainable(discriminator: nn.Module, device: torch.device) -> nn.Module:
    """A copy with its parametrizations in place and every parameter trainable; the original keeps its graph and grads."""
    with torch.inference_mode(False):
        twin = copy.deepcopy(unwrap(discriminator), copies.non_leaf_tensors(discriminator)).to(device)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin.requires_grad_(True)


def _has_spectral_norm(module: nn.Module) -> bool:
    return isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in module._forward_pre_hooks.values())


class _Trainer:
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
        self.read, self.updates = Readout(refiner.output_key), 0
        self.seed, g = seed, refiner.generator
        self.reads_labels, required = _reads_labels(student, refiner.discriminator_kwargs)
        by_generator, needed = _reads_labels(g, refiner.generator_kwargs)
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
        """The batch with labels if a network takes them; InputError if one needs them and there are none."""
        x, labels = batch
        if labels is None and self.required:
            raise InputError(
                "the generator or the discriminator needs labels: give `real` as (image, label), or pass real_labels=(N,)"
            )
        return x, labels if self.labelled else None

    def update(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        """One step of the optimizer; returns loss and mean logits. What D draws is a function of (seed, update)."""
        device = self.refiner.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            seed_noise(device, (self.seed * 1_000_003 + self.updates) % 2**63)
            self.student.train(self.training)
            for module in self.student.modules():
                if _has_spectral_norm(module):  # which follows its weights in training mode only
                    module.training = True
            real = real.detach().to(device, self.dtype).requires_grad_(self.penalty > 0)
            fake = fake.detach().to(device, self.dtype)
            if labels is not None:
                labels = labels.to(device, self.dtype if labels.is_floating_point() else None)
            d_real, d_fake = self._logits(real, labels), self._logits(fake, labels)
            if self.scale == "critic":
                loss = d_fake.mean() - d_real.mean()
            else:
                loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
            if self.penalty:
                loss = loss + self.penalty * self._gradient_penalty(real, fake, d_real, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.student.eval()
        self.updates += 1
        return {"loss": loss.item(), "real_logit": d_real.mean().item(), "fake_logit": d_fake.mean().item()}

    def _logits(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(n, P); a probability is turned back into its logit, for the module must keep its final sigmoid."""
        given = (x, labels) if labels is not None and self.reads_labels else (x,)
        raw = self.student(*given, **self.refiner.discriminator_kwargs)
        out = self.read(raw, len(x), torch.promote_types(x.dtype, torch.float32))
        return torch.logit(out, eps=1e-6) if self.scale == "probability" else out

    def _gradient_penalty(self, real: Tensor, fake: Tensor, d_real: Tensor, labels: Tensor | None) -> Tensor:
        if self.scale != "critic":
            (grad,) = torch.autograd.grad(d_real.mean(1).sum(), real, create_graph=True)
            return grad.flatten(1).square().sum(1).mean()
        n = min(len(real), len(fake))
        ids = torch.arange(n)
        u = uniform(0, ids, torch.full_like(ids, self.updates), 1, Stream.BATCH).to(real).view(n, *[1] * (real.dim() - 1))
        middle = (u * real[:n] + (1 - u) * fake[:n]).detach().requires_grad_()
        d = self._logits(middle, None if labels is None else labels[:n])
        (grad,) = torch.autograd.grad(d.mean(1).sum(), middle, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()
