"""A discriminator for a generator that comes without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.diagnosis.calibration import calibrate, diagnose
from fastrefine.errors import InputError
from fastrefine.models.default import default_discriminator
from fastrefine.models.projected import ProjectedDiscriminator
from fastrefine.networks import copies
from fastrefine.networks.calls import takes_labels
from fastrefine.networks.copies import unwrap
from fastrefine.networks.torch_state import quiet_torch, seed_torch
from fastrefine.priors import Prior
from fastrefine.progress import counted
from fastrefine.refiner import Refiner
from fastrefine.training.batches import RealBatches, as_given
from fastrefine.training.trainer import RAW, Kept, Trainer, trainable


def fit_discriminator(
    generator: nn.Module,
    real: Any,
    iterations: int,
    *,
    prior: Prior,
    discriminator: nn.Module | None = None,
    backbone: str | nn.Module | None = None,
    discriminator_output: str = "logit",
    real_labels: Any = None,
    real_conditions: Mapping[str, Tensor] | None = None,
    generate: Callable[..., Any] | None = None,
    discriminate: Callable[..., Any] | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    check_every: int = 100,
    patience: int = 10,
    seed: int = 0,
    progress: bool | None = False,
) -> nn.Module:
    """Train a discriminator for a generator that comes without one, on real images against samples of G.

    real, real_labels, real_conditions: as for ``shape_discriminator``, labels where generator or discriminator take them.
    generate, discriminate: how the networks are called, as for ``Refiner``. Held out are a
    tenth of the images, at least 16 and at most 1,000 but never more than half; of a loader its first batches, up to
    1,000 images of one pass, which come again when it is cycled. Every ``check_every`` iterations the Brier score on the
    held-out images and as many fresh samples is taken; the weights with the lowest are returned, and training ends after
    ``patience`` checks without a better one.
    discriminator: the network to train (a copy is), default models.default_discriminator of the image shape.
    backbone: "efficientnet-lite0", or a pretrained module of your own: train heads on its frozen features instead, see
    ``models.ProjectedDiscriminator``. For images of 1 or 3 channels in [-1, 1]; for another range, scale or size pass
    ``discriminator=fr.models.ProjectedDiscriminator(...)``. Such a D is calibrated at the end: its logit d becomes w d + b by
    Platt's method on the held-out images and as many samples, unless a threshold tells them apart without a mistake.
    discriminator_output: "logit" | "probability", of a discriminator that ends in a sigmoid (it keeps it).
    progress: a tqdm bar on stderr; None: on a terminal a bar, elsewhere a line every ten seconds.

    Returns a module in eval mode, D(x) -> logit (N,) unless another was given. Raises InputError on bad arguments.

    Example: ``fr.fit_discriminator(g, real, 2, prior=fr.Normal(32), batch_size=16)(out.images).shape  # (64,)``
    """
    checks.count("iterations", iterations, 1)
    checks.count("check_every", check_every, 1)
    checks.count("patience", patience, 1)
    checks.choice("discriminator_output", discriminator_output, ("logit", "probability"))
    if discriminator is not None and backbone is not None:
        raise InputError("discriminator and backbone were both given; wanted one: the backbone makes a discriminator")
    if not isinstance(generator, nn.Module):
        raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module")
    device = next((p.device for p in unwrap(generator).parameters()), torch.device("cpu"))
    with quiet_torch(device):
        g = copies.private_copy(unwrap(generator)).float()
        called = generate is not None or discriminate is not None
        wanted = called or takes_labels(g, {})[0] or takes_labels(discriminator, {})[0]
        batches = RealBatches(real, batch_size, seed, real_labels, wanted, real_conditions)
        held, held_inputs = batches.hold_out()
        held = held.float()
        if discriminator is None:
            shape = tuple(held.shape[1:])
            seed_torch(torch.device("cpu"), seed)
            discriminator = default_discriminator(shape) if backbone is None else ProjectedDiscriminator(shape, backbone)
        student = trainable(discriminator, device)
        still = trainable(discriminator, device)  # not the student, whose updates would have every batch recorded anew
        source = Refiner(
            g, still, RAW, max_steps=0, prior=prior, num_slots=batch_size, device=device, output_device=device,
            discriminator_output=discriminator_output, generate=generate, discriminate=discriminate,
        )  # fmt: skip
        trainer = Trainer(student, source, "adam", learning_rate, betas, None, "train", seed)
        held, held_inputs = trainer.checked((held, held_inputs))
        read = as_given(held_inputs if discriminate is not None or trainer.reads_labels else {})
        examination = source.sample(len(held), first_id=2**31, seed=seed, **as_given(held_inputs)).images
        checks.real_images(held, tuple(examination.shape[1:]), examination)
        best, first_id = Kept(student), 0
        for iteration in counted(iterations, "fitting", progress):
            x, inputs = trainer.checked(batches.batch(iteration))
            fakes = source.sample(len(x), first_id=first_id, seed=seed, **as_given(inputs)).images
            first_id += len(x)
            trainer.update(x, fakes, inputs)
            if (iteration + 1) % check_every == 0 or iteration + 1 == iterations:
                judge = source.with_discriminator(student)
                best.see(student, diagnose(judge.score(held, **read), judge.score(examination, **read)).brier)
                if best.since >= patience:
                    break
        best.restore(student)
        if isinstance(student, ProjectedDiscriminator):
            judge = source.with_discriminator(student)
            known, made = judge.score(held, **read), judge.score(examination, **read)
            if known.min() <= made.max():  # else the best slope is infinite
                shift, high = calibrate(known, made, "platt")(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
                student.calibrate(high - shift, shift)
        return student.eval()
