"""Discriminators that suit refinement: shaped on refined samples, or tuned on raw ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks, stopping
from fastrefine.diagnosis.findings import SHAPE_FIRST
from fastrefine.errors import FastrefineWarning, InputError
from fastrefine.networks.copies import mark_shaped
from fastrefine.networks.torch_state import quiet_torch
from fastrefine.options import MOST_SLOTS
from fastrefine.progress import counted
from fastrefine.refiner import Refiner
from fastrefine.stopping import StopRule
from fastrefine.training.batches import RealBatches, as_given
from fastrefine.training.trainer import RAW, Trainer, trainable

Callback = Callable[[dict[str, float]], None]
_JUDGED = 4096  # real images at most whose logits give the stop rule: they are computed anew after every update


def shape_discriminator(
    refiner: Refiner,
    real: Any,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    *,
    real_labels: Any = None,
    real_conditions: Any = None,
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
    real: images (N, ...) as a tensor or array, a Dataset or a loader, of images, (image, label), or (image, {name: input}),
        labels and conditions by name. real_labels, real_conditions: those of a tensor, array or Dataset, in place of its own.
        The proposals get the labels and conditions of the real batch.
    stop: when refined samples leave; None is [CS]'s "probabilistic" refinement, a step drawn uniformly from
        0 ... max_steps (stopping.UniformStep), so that D sees every stage. Pass ``refiner.stop`` to use its own rule. A
        rule or sampler that reads the refiner's ``real`` scores it anew in every iteration, 4,096 spread over it at most.
    optimizer: "adam" (with betas) | "sgd". gradient_penalty: on a logit the weight of |grad D|^2 at real images (R1 of
        Mescheder et al. 2018 without its factor 1/2), default 0; on a critic of WGAN-GP's two-sided penalty, default 10.
    batch_norm: "eval" keeps D's BatchNorm and dropout in eval mode while it is updated; "train" updates its statistics
        and draws dropout by (seed, iteration). Spectral norms of torch follow their weights in both.
    Proposals have consecutive ids under ``seed``, from 0, as many in each iteration as there are real images.
    progress: a tqdm bar on stderr; None: on a terminal a bar, elsewhere a line every ten seconds.
    callback: called each iteration with {"iteration", "loss", "real_logit", "fake_logit"}.

    Returns a new module in eval mode; use it with ``refiner.with_discriminator``. Raises InputError on bad arguments.

    Example: ``better = refiner.with_discriminator(fr.shape_discriminator(refiner, real, 2, 16, 2e-4))``
    """
    checks.count("iterations", iterations, 0)
    if not isinstance(refiner, Refiner):
        raise InputError(f"refiner is a {type(refiner).__name__}; wanted a fastrefine.Refiner")
    with quiet_torch(refiner.device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{SHAPE_FIRST}", FastrefineWarning)  # that is what is being done
        student = trainable(refiner.discriminator, refiner.device)
        rule = stopping.UniformStep() if stop is None else stopping.as_rule(stop)
        twin = refiner.with_discriminator(student).replaced(
            stop=rule, num_slots=_slots(refiner, checks.count("batch_size", batch_size, 1)),
            progress=False, callback=None, output_device=refiner.device, **_fewer_real(refiner),
        )  # fmt: skip
        if twin.prior is None and latents is None:
            raise InputError("the refiner has no prior: pass latents=(N, ...) to draw proposals from")
        trainer = Trainer(student, refiner, optimizer, learning_rate, betas, gradient_penalty, batch_norm, seed)
        conditions = None
        if real_conditions is not None:
            conditions = refiner.options.own_conditions(real_conditions, len(real), "real_conditions")
        batches = RealBatches(real, batch_size, seed, real_labels, trainer.labelled, conditions)
        proposals = None if latents is None else RealBatches(checks.tensor("latents", latents), batch_size, seed + 1)
        first_id = 0
        for iteration in counted(iterations, "shaping", progress):
            x, inputs = trainer.checked(batches.batch(iteration))
            z = None if proposals is None else proposals.batch(iteration)[0][: len(x)]
            if z is not None:
                x, inputs = x[: len(z)], {name: value[: len(z)] for name, value in inputs.items()}
            if z is None:
                refined = twin.sample(len(x), first_id=first_id, seed=seed, **as_given(inputs))
            else:
                refined = twin.refine(z, first_id=first_id, seed=seed, **as_given(inputs))
            if iteration == 0:
                _check_range(twin, x)
            first_id += len(refined)
            facts = trainer.update(x, refined.images, inputs)
            twin._networks.refresh(student)
            if callback is not None:
                callback({"iteration": iteration, **facts})
        return mark_shaped(student.eval()) if iterations and twin.max_steps else student.eval()


def tune_discriminator(
    refiner: Refiner, real: Any, iterations: int, batch_size: int, learning_rate: float, **options: Any
) -> nn.Module:
    """Train D further on real images against raw samples of G; arguments as for ``shape_discriminator``.

    Example: ``better = refiner.with_discriminator(fr.tune_discriminator(refiner, real, 2, 16, 2e-4))``
    """
    if not isinstance(refiner, Refiner):
        raise InputError(f"refiner is a {type(refiner).__name__}; wanted a fastrefine.Refiner")
    raw = refiner.replaced(max_steps=0, sampler=RAW)
    options = {"stop": stopping.FixedSteps(), **options}
    return shape_discriminator(raw, real, iterations, batch_size, learning_rate, **options)


def _fewer_real(refiner: Refiner) -> dict[str, Any]:
    """Options by which at most ``_JUDGED`` real images, spread over all, give the stop rule."""
    options = refiner.options
    if options.real is None or len(options.real) <= _JUDGED:
        return {}
    at = torch.linspace(0, len(options.real) - 1, _JUDGED).long()
    conditions = {name: value[at] for name, value in (options.real_conditions or {}).items()}
    labels = None if options.real_labels is None else options.real_labels[at]
    return {"real": options.real[at], "real_labels": labels, "real_conditions": conditions or None}


def _slots(refiner: Refiner, batch_size: int) -> int:
    """As many slots as a batch has samples, in whole groups."""
    group = refiner.group_size or 1
    return max(min(refiner.num_slots or MOST_SLOTS, batch_size) // group, 1) * group


def _check_range(refiner: Refiner, real: Tensor) -> None:
    """InputError where real images are of another size or visibly in another range than G's, as it makes them."""
    generated = refiner._networks.probe_images()
    checks.real_images(real, tuple(generated.shape[1:]), generated)
