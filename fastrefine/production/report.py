"""The report of a run: one HTML page that needs nothing else, and the figures on it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrefine import pictures
from fastrefine.datasets import from_pixels
from fastrefine.diagnosis.calibration import Diagnosis, diagnose
from fastrefine.errors import InputError
from fastrefine.production import evaluation
from fastrefine.production.before_after import BeforeAfter
from fastrefine.production.images import load_labelled, scaled
from fastrefine.result import Status

NEAREST, NEIGHBOURS = 8, 3  # images with neighbours; neighbours of each
Figures = dict[str, tuple[float, float | None, float | None]]  # name -> value, and its interval where one is known


class Metrics(NamedTuple):
    """Figures of images before and after, and of training images. change: of the Frechet distance, over the same samples."""

    before: Figures | None
    after: Figures
    training: Figures | None
    change: evaluation.Figure | None


class Report:
    """What the page shows of a run; each part is computed when it is asked for, and raises InputError where it cannot be.

    real: real images, as ``load_labelled`` reads them, or None. features, train: as for ``fastrefine evaluate``. Raises
    InputError where there are no such real images.
    """

    def __init__(self, pairs: BeforeAfter, real: str | None = None, *, features: str | None = None, train: str | None = None):
        self.pairs, self.real, self.code, self.train = pairs, real, features, train or real
        self.num_training: int | None = None  # training images among the figures
        if real is not None:
            _ = self.truth
        self.summary: dict[str, Any] = pairs.manifest.get("summary") or {}  # what the run told of itself at its end
        self.findings: list[Any] = self.summary.get("findings") or pairs.manifest.get("findings") or []

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor | None]:
        """Real images (M, C, H, W) in [-1, 1], and their labels."""
        if self.real is None:
            raise InputError("no real images were given; pass --real")
        return load_labelled(self.real, signed=True)

    @cached_property
    def features(self) -> evaluation.Features:
        assert self.train is not None
        images = from_pixels(self.pairs.after.pixels)
        return evaluation.features_for(images, self.code, evaluation.training_part(self.train), None)

    @property
    def held_out(self) -> bool:
        """Whether the real images are the held-out part of images that have a training part."""
        return self.real is not None and evaluation.training_part(self.real) != self.real

    @cached_property
    def real_features(self) -> Tensor:
        """(M, F) features of the real images."""
        return self.features(self.truth[0], None)[0]

    @cached_property
    def metrics(self) -> Metrics:
        """Figures of merit before and after, and of training images; None where there are no such images."""
        real, _ = self.truth
        first = None
        with contextlib.suppress(InputError):
            first = self.pairs.before
        sides = [None if side is None else from_pixels(side.pixels) for side in (first, self.pairs.after)]
        for side in sides:
            if side is not None:
                evaluation.check(side, real)
        compared = partial(
            evaluation.measure, real=real, features=self.features, progress=None, real_features=self.real_features
        )
        draws: list[np.ndarray] = []
        before, after = (
            None if side is None else compared(side, what=what, draws=draws)
            for side, what in zip(sides, ("images before", "images after"), strict=True)
        )
        assert after is not None and self.real is not None
        change = None
        if before is not None and not self.pairs.unpaired:
            was, now = (next(f for name, f in side.items() if name.startswith("frechet")) for side in (before, after))
            change = evaluation.change_of(was, now, draws)
        training, self.num_training = evaluation.yardstick(self.real, len(self.pairs.ids), compared)
        raw, best = (None if side is None else _figures(side) for side in (before, training))
        return Metrics(raw, _figures(after), best, change)

    @cached_property
    def real_logits(self) -> Tensor:
        """(M,) logits of the real images under the run's discriminator."""
        (images, labels), worker = self.truth, self.pairs.worker
        if worker.conditions:
            raise InputError("the discriminator reads conditions, and the real images come without")
        takes = worker.pair.takes_labels("discriminate")[0]
        return worker.refiner.score(scaled(images, worker.configuration.value_range), labels if takes else None)

    @cached_property
    def reliability(self) -> tuple[Diagnosis, bool]:
        """Whether the discriminator's logits may be read as probabilities, on real images and those before refinement.

        And whether it is these: where none are to be had it is those after it.
        """
        if self.pairs.folder.configuration.discriminator_output == "critic":
            raise InputError("the discriminator is a critic, whose scores are no probabilities")
        logits, before = self.pairs.after.columns["logits"], False
        with contextlib.suppress(InputError):
            logits, before = self.pairs.logits_before, True
        return diagnose(_finite(self.real_logits), _finite(torch.from_numpy(logits))), before

    @cached_property
    def change(self) -> np.ndarray:
        """(n,) mean absolute change of the pixels of each image, as a share of the range."""
        if self.pairs.unpaired:
            raise InputError(self.pairs.unpaired)
        before, after = (side.pixels.astype(np.float32) for side in (self.pairs.before, self.pairs.after))
        return np.abs(after - before).mean((1, 2, 3)) / 255

    @cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows (n, k) of the nearest real images, distances (n, k)) of the first images, in the space of the features."""
        real, _ = self.truth
        few = from_pixels(self.pairs.after.pixels[:NEAREST])
        evaluation.check(few, real) if len(few) > 1 else None
        distances = torch.cdist(self.features(few)[0].double(), self.real_features.double())
        found = distances.topk(min(NEIGHBOURS, len(real)), largest=False)
        return found.indices.numpy(), found.values.numpy()

    def numbers(self) -> dict[str, Any]:
        """What the run did, from its files: images, mean steps, statuses; mean logits of those compared and of real images."""
        columns = self.pairs.every
        status = {s.name: int((columns["status"] == s).sum()) for s in Status}
        found: dict[str, Any] = {
            "images": len(columns["ids"]), "compared": len(self.pairs.ids), "mean_steps": float(columns["steps"].mean()),
            "logit_after": _mean(self.pairs.after.columns["logits"]), "status": status,
        }  # fmt: skip
        others = {"logit_before": lambda: self.pairs.logits_before, "logit_real": lambda: self.real_logits.numpy()}
        for name, logits in others.items():
            found[name] = None  # where they cannot be had
            with contextlib.suppress(InputError):
                found[name] = _mean(logits())
        return found


def draw(pairs: BeforeAfter, output: Path, rows: Sequence[str]) -> None:
    """Write a picture of the images before and after, see ``pictures.grid``.

    Raises InputError where images before and after are not of the same samples.
    """
    after = pairs.after
    if pairs.unpaired and set(rows) != {"refined"}:
        raise InputError(f"{pairs.unpaired}; --rows refined draws the images after alone")
    logits: list[tuple[float, float]] = []
    before = after
    if set(rows) != {"refined"}:
        before = pairs.before
        with contextlib.suppress(InputError):  # a baseline is enough for the pictures
            logits = list(zip(pairs.logits_before.tolist(), after.columns["logits"].tolist(), strict=True))
    title = f"Run {pairs.folder.path.name}: its first {len(pairs.ids)} samples"
    pictures.grid(output, before.pixels, after.pixels, logits, title, rows)


def _figures(measured: Mapping[str, Any]) -> Figures:
    """Of what ``evaluation.measure`` returns: numbers, or (value, low, high)."""
    known = {name: found if isinstance(found, tuple) else (found, None, None) for name, found in measured.items()}
    return {name: (found[0], found[1], found[2]) for name, found in known.items() if isinstance(found[0], float)}


def _mean(logits: np.ndarray) -> float:
    return float(_finite(torch.from_numpy(logits)).double().mean())


def _finite(logits: Tensor) -> Tensor:
    return logits[torch.isfinite(logits)]
