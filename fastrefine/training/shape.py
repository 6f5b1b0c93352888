"""Discriminators that suit refinement: shaped on refined samples, or tuned on raw ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine import checks, stopping
from fastrefine.diagnosis.findings import SHAPE_FIRST
from fastrefine.errors import FastrefineWarning, InputError, warn
from fastrefine.networks.copies import mark_shaped
from fastrefine.networks.torch_state import quiet_torch
from fastrefine.options import MOST_SLOTS
from fastrefine.progress import counted
from fastrefine.refiner import Refiner
from fastrefine.stopping import StopRule
from fastrefine.training.batches import Batch, RealBatches, as_given
from fastrefine.training.trainer import RAW, Kept, Trainer, trainable

Callback = Callable[[dict[str, float]], Any]
EXAMINED, SIDE = 500, 8  # refined samples of a check at least; pixels a side by which pictures are compared
_EXAMINED_IDS = 2**31  # from here on: no update sees them
NOT_BETTER = "shape_discriminator: no check was better than D as it was given, which is returned: try a lower learning rate"
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
    keep: str = "last",
    check_every: int = 50,
    patience: int | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
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
    keep: "last" returns D after the last iteration. "best" returns the D whose refined samples come nearest to held-out real
        images, for shaping that goes on for too long makes them worse. Held out are a tenth of the images, at least 16 and at
        most 1,000 but never more than half; of a loader its first batches. Before the first iteration, after every
        ``check_every`` and after the last one, samples that no update saw are refined under the refiner's own stop rule, the
        same ids each time, and compared with the images by the energy distance (Szekely & Rizzo 2013) of their features.
        Where D as it was given is best, a copy of it is returned, with a warning.
    patience: with keep="best", shaping ends after so many checks without a better one. None: it has all its iterations.
    features: images (N, ...) -> (N, F), by which they are compared. None: pixels, averaged to 8 x 8 where pictures are larger.
        Leave out those on which you report.
    progress: a tqdm bar on stderr; None: on a terminal a bar, elsewhere a line every ten seconds.
    callback: called each iteration with {"iteration", "loss", "real_logit", "fake_logit"}, after a check also with
        "held_out_distance". Where it returns True, shaping ends after that iteration.

    Returns a new module in eval mode; use it with ``refiner.with_discriminator``. Raises InputError on bad arguments.

    Example: ``better = refiner.with_discriminator(fr.shape_discriminator(refiner, real, 2, 16, 2e-4))``
    """
    checks.count("iterations", iterations, 0)
    checks.count("check_every", check_every, 1)
    checks.choice("keep", keep, ("last", "best"))
    if not isinstance(refiner, Refiner):
        raise InputError(f"refiner is a {type(refiner).__name__}; wanted a fastrefine.Refiner")
    if keep == "last" and (patience is not None or features is not None):
        raise InputError('patience and features are of keep="best", which compares refined samples with held-out images')
    if keep == "best" and refiner.max_steps == 0:
        raise InputError(
            'keep="best" compares refined samples, and with max_steps=0, as in tuning, they do not depend on D; wanted '
            'keep="last", or fit_discriminator(discriminator=D), which keeps the best D for raw samples'
        )
    if patience is not None:
        checks.count("patience", patience, 1)
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
        examination = None
        if keep == "best":
            examination = _Examination(refiner, student, trainer.checked(batches.hold_out()), proposals, features, seed)
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
            if examination is not None and ((iteration + 1) % check_every == 0 or iteration + 1 == iterations):
                facts["held_out_distance"] = examination.take(student)
            ends = callback is not None and callback({"iteration": iteration, **facts}) is True
            if ends or (examination is not None and patience is not None and examination.best.since >= patience):
                break
        if examination is not None:
            examination.best.restore(student)
            if not examination.best.improved and iterations:
                warn(NOT_BETTER)
        return mark_shaped(student.eval()) if iterations and twin.max_steps else student.eval()


class _Examination:
    """How near samples that are refined by a D come to held-out real images: the energy distance of their features."""

    held: Tensor | None  # features of the real images

    def __init__(
        self, refiner: Refiner, student: nn.Module, held: Batch, proposals: RealBatches | None,
        features: Callable[[Tensor], Tensor] | None, seed: int,
    ):  # fmt: skip
        x, inputs = held
        if len(x) < 2:
            raise InputError('keep="best" holds at most half of the real images out and wants two of them; wanted four or more')
        self.latents = None if proposals is None else proposals.hold_out()[0]
        self.count = max(len(x), EXAMINED) if self.latents is None else len(self.latents)
        rows = torch.arange(self.count) % len(x)
        self.inputs, self.seed, self.features = as_given({k: v[rows] for k, v in inputs.items()}), seed, features or _small
        self.judge = refiner.with_discriminator(student).replaced(
            progress=False, callback=None, output_device=refiner.device, **_fewer_real(refiner)
        )
        self.real, self.held = x.to(refiner.device), None
        self.best = Kept(student, self._distance(student))

    def take(self, student: nn.Module) -> float:
        """The distance of samples refined by this D, infinite where one is not finite; ``best`` has the D of the lowest."""
        return self.best.see(student, self._distance(student))

    def _distance(self, student: nn.Module) -> float:
        self.judge._networks.refresh(student)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastrefineWarning)  # of the run: it says nothing about the distance
            if self.latents is None:
                images = self.judge.sample(self.count, first_id=_EXAMINED_IDS, seed=self.seed, **self.inputs).images
            else:
                images = self.judge.refine(self.latents, first_id=_EXAMINED_IDS, seed=self.seed, **self.inputs).images
        if self.held is None:
            _check_range(self.judge, self.real)
            self.held = self._of(self.real)
        x = self._of(images)
        return energy_distance(x, self.held) if bool(torch.isfinite(x).all()) else math.inf

    def _of(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.features(images).detach().double().flatten(1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of rows (N, F) and (M, F), N and M 2 or more: 0 on average for one law, else more."""
    return float(2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean())


def _small(x: Tensor) -> Tensor:
    if x.dim() == 4 and max(x.shape[2:]) > SIDE:
        x = F.adaptive_avg_pool2d(x, SIDE)
    return x


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
