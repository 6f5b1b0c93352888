"""The density ratio between two generators, for one that no discriminator was trained against ([DGflow])."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.networks.calls import takes_labels
from fastrefine.priors import Prior
from fastrefine.refiner import Refiner
from fastrefine.training.fit import fit_discriminator
from fastrefine.training.trainer import RAW

_REFERENCE_IDS = 2**31 + 2**30  # ids of the reference's samples: fit_discriminator draws none there, so latents differ


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

    Example: ``fr.fit_corrector(g, g, 2, prior=fr.Normal(32), reference_samples=64, batch_size=16)(out.images)  # (64,)``
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
    takes, required = takes_labels(generator)
    if required and labels is None:
        raise InputError(f"{type(generator).__name__} needs labels: pass real_labels=(N,), those of the reference's samples")
    source = Refiner(generator, _Blind(), RAW, max_steps=0, prior=prior)
    return source.sample(n, first_id=first_id, seed=seed, labels=labels if takes else None).images
