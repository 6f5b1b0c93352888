"""Density ratios for generators that no discriminator was trained against: logits that add up ([DGflow])."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.networks.calls import Readout, takes_labels
from fastrefine.networks.copies import unwrap
from fastrefine.networks.split import Split
from fastrefine.priors import Prior
from fastrefine.refiner import Refiner
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.training.shape import fit_discriminator

_RAW = Collaborative(step_size=1.0)  # with max_steps=0 it never moves: the engine is then the generator, by sample id
_REFERENCE_IDS = 2**31 + 2**30  # ids of the reference's samples: fit_discriminator draws none there, so latents differ


class SumDiscriminator(nn.Module):
    """D(x[, labels]) = the sum of the members' logits: the telescope log p/q + log q/r = log p/r ([DGflow]).

    discriminators: modules D(x) or D(x, labels) that return logits, (N,), (N, 1) or a map (N, 1, h, w) whose mean counts;
    probabilities do not add. Labels go to the members that take them, and are required where one of them requires them.
    The members are held, not copied.

    Returns (N, 1), in float32 or the wider dtype of the images. Raises InputError without members, on a member that is no
    module or that ends in a sigmoid, and on outputs that are not one logit or one map per sample.
    """

    def __new__(cls, *discriminators: nn.Module) -> SumDiscriminator:
        """The class whose ``forward`` says what the members take: labels are offered only where they are wanted."""
        if cls is SumDiscriminator:
            asked = [takes_labels(unwrap(d), {}) for d in discriminators]
            if any(required for _, required in asked):
                cls = _Labelled
            elif any(taken for taken, _ in asked):
                cls = _MaybeLabelled
        return super().__new__(cls)

    def __init__(self, *discriminators: nn.Module):
        super().__init__()
        if not discriminators:
            raise InputError("SumDiscriminator got no discriminators; wanted one or more modules that return logits")
        for i, member in enumerate(discriminators):
            if not isinstance(member, nn.Module):
                raise InputError(f"SumDiscriminator: member {i} is a {type(member).__name__}; wanted a torch.nn.Module")
            if isinstance(_last(member), nn.Sigmoid):
                raise InputError(f"SumDiscriminator: member {i} ends in a sigmoid; wanted logits, so leave the sigmoid out")
        self.members = nn.ModuleList(unwrap(member) for member in discriminators)
        self._takes_labels = [takes_labels(member, {})[0] for member in self.members]

    def forward(self, images: Tensor) -> Tensor:  # (N, ...) -> (N, 1)
        return self._sum(images, None)

    def _get_name(self) -> str:
        return "SumDiscriminator"

    def _sum(self, images: Tensor, labels: Tensor | None) -> Tensor:
        dtype = torch.promote_types(images.dtype, torch.float32)
        logits = []
        for i, (member, takes) in enumerate(zip(self.members, self._takes_labels, strict=True)):
            own = images.clone()  # layers may work in place
            raw = member(own, labels) if takes and labels is not None else member(own)
            try:
                logits.append(Readout()(raw, len(images), dtype).mean(1, keepdim=True))
            except InputError as error:
                raise InputError(f"SumDiscriminator: member {i} must return its logit alone: {error}") from error
        return torch.stack(logits).sum(0)


class _Labelled(SumDiscriminator):
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self._sum(images, labels)


class _MaybeLabelled(SumDiscriminator):
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._sum(images, labels)


def _last(module: nn.Module) -> nn.Module:
    """What surely runs last: the end of nested Sequentials."""
    module = unwrap(module)
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module


def fit_corrector(
    generator: nn.Module,
    reference: Any,
    iterations: int,
    *,
    prior: Prior,
    reference_prior: Prior | None = None,
    reference_samples: int = 10_000,
    real_labels: Any = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Train D_lambda = log p_reference / p_generator, the corrector of another generator's discriminator ([DGflow]).

    With D the discriminator of ``reference``, ``SumDiscriminator(D, corrector)`` is then one for ``generator``.

    reference: the generator D belongs to, of which ``reference_samples`` are drawn by (seed, id) from ``reference_prior``
        (default: ``prior``); or a tensor (N, ...) of samples of it.
    real_labels: labels of the reference's samples, as many as there are, or one class for all.
    options: those of ``fit_discriminator``, which does the training: discriminator, batch_size, learning_rate, betas,
        check_every, patience, progress.

    Returns a module in eval mode, D_lambda(x) -> logit (N,) unless a backbone was given. Raises InputError on bad
    arguments, and where the two generators' images differ in shape.
    """
    if options.get("discriminator_output", "logit") != "logit":
        raise InputError(f"a corrector is a logit, for it is added to one; got {options['discriminator_output']!r}")
    checks.count("iterations", iterations, 1)
    checks.count("seed", seed, 0, 2**64 - 1)
    if not isinstance(generator, nn.Module):
        raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module")
    for name, value in (("prior", prior), ("reference_prior", reference_prior)):
        if not isinstance(value, Prior) and (name == "prior" or value is not None):
            raise InputError(f"{name} is {value!r}; wanted a prior such as fastrefine.Normal(64)")
    if isinstance(reference, nn.Module):
        count = checks.count("reference_samples", reference_samples, 2, 2**30)
        real_labels = checks.labels(real_labels, count)
        real = _samples(reference, reference_prior or prior, count, seed, real_labels, _REFERENCE_IDS)
    else:
        if reference_prior is not None:
            raise InputError("reference_prior was given with samples of the reference; wanted it with a generator only")
        real = checks.tensor("reference", reference)
        if len(real) < 2:
            raise InputError(f"reference holds {len(real)} samples; wanted two or more, for some are held out")
        real_labels = checks.labels(real_labels, len(real))
    own = _samples(generator, prior, 1, seed, None if real_labels is None else real_labels[:1], 0)
    if own.shape[1:] != real.shape[1:]:
        raise InputError(
            f"the generator makes images of shape {tuple(own.shape[1:])}, the reference {tuple(real.shape[1:])}; "
            "wanted equal shapes, for one discriminator reads both"
        )
    return fit_discriminator(generator, real, iterations, prior=prior, real_labels=real_labels, seed=seed, **options)


class _Blind(nn.Module):
    """Stands where the engine wants a discriminator and nothing reads its logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(1)


def _samples(generator: nn.Module, prior: Prior, n: int, seed: int, labels: Tensor | None, first_id: int) -> Tensor:
    """Images (n, ...) of a generator on the CPU, by (seed, id); labels only where it takes them."""
    takes, required = takes_labels(generator.prefix if isinstance(generator, Split) else unwrap(generator), {})
    if required and labels is None:
        raise InputError(f"{type(generator).__name__} needs labels: pass real_labels=(N,), those of the reference's samples")
    source = Refiner(generator, _Blind(), _RAW, max_steps=0, prior=prior)
    return source.sample(n, first_id=first_id, seed=seed, labels=labels if takes else None).images
