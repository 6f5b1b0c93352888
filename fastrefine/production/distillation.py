"""What a distilled generator is worth: quality with and without steps of refinement after it, beside the generator's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fastrefine.metrics import frechet_distance
from fastrefine.production import evaluation
from fastrefine.production.images import unscaled
from fastrefine.production.worker import Worker
from fastrefine.training.distil import refiner_of
from fastrefine.training.distilled import DistilledGenerator

STEPS = (0, 1, 2, 4)  # of refinement, at most


def quality(worker: Worker, g: DistilledGenerator, samples: int, features: str | None) -> Iterator[str]:
    """Lines of a table: Frechet distance to the real images, mean logit and mean steps, by the number of steps at most.

    The samples have ids from 0, and those that ``distil`` learned from have not. The distance needs ``features``, as for
    ``evaluation.given_features``, or labelled real images.
    """
    refiner, network = worker.refiner, None
    real, labels = unscaled(refiner.real, worker.configuration.value_range), refiner.real_labels
    if features:
        network = evaluation.given_features(features)
    elif worker.real_classes is not None:
        network = evaluation.trained_features(real, worker.real_classes, progress=None)
    truth = None if network is None else network(real)[0]
    rows, each = torch.arange(samples) % len(real), refiner.sampler.traits.transition_steps
    at_most = sorted({*(each * steps for steps in STEPS), refiner.max_steps})
    columns = []
    for own in (refiner, refiner_of(g, refiner)):
        out = own.replaced(max_steps=at_most[-1], progress=None).sample(
            samples,
            snapshots=at_most,
            labels=None if labels is None else labels[rows],
            conditions=worker.conditions_of(samples),
        )
        column = []
        for steps in at_most:
            then, distance = out.snapshots[steps], math.nan
            if network is not None:
                distance = frechet_distance(network(unscaled(then.images, worker.configuration.value_range))[0], truth)  # type: ignore[arg-type]
            taken = out.steps.clamp(max=steps).double().mean()
            column.append(f"{distance:>10.2f}{float(then.logits.mean()):>9.3f}{float(taken):>8.2f}")
        columns.append(column)
    name = network.name if network else "none, for the real images have no labels: see --features"
    yield f"{samples} samples that were not learned from; features {name}"
    yield f"{'steps':<8}{'generator':>27}{'distilled':>27}"
    yield f"{'at most':<8}" + 2 * f"{'FD':>10}{'logit':>9}{'steps':>8}"
    for steps, *cells in zip(at_most, *columns, strict=True):
        yield f"{steps:<8}" + "".join(cells)
