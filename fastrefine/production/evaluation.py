"""Quality of images against real ones: Frechet distance, score, KID, precision and recall, on the features of any network.

Compare only figures of one network and one number of images: every name carries both. See docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastrefine import metrics
from fastrefine.datasets import from_pixels
from fastrefine.errors import InputError
from fastrefine.models.digits import Classifier
from fastrefine.models.pretrained import EFFICIENTNET
from fastrefine.networks.calls import attempt
from fastrefine.production import cache, image_features
from fastrefine.production.configuration import Network
from fastrefine.production.images import FILES, digests, held_out_part, load_labelled, shaped_on, some, training_part
from fastrefine.production.named_code import Trust
from fastrefine.production.run_folder import MANIFEST, Folder
from fastrefine.production.saved_pair import build
from fastrefine.progress import ProgressBar, counted, over

RECIPE = 1  # of the small classifier: another number with every change of how it is made, so that none of before is read
FEW = 10_000  # images: of fewer, the Frechet distance is biased
SCORED_IN = 10  # parts, for torch-fidelity's Inception score
COVERED = 10_000  # images at most, for precision and recall
BLOCK = 500  # images at once
SUBSETS = 100  # of kernel_distance
SURE = 1.96  # standard errors to each side hold 95 %
# Our names of figures, and torch-fidelity's, which are used where the features are those of its Inception.
PUBLISHED = {
    "frechet_distance": "frechet_inception_distance", "kernel_distance": "kernel_inception_distance_mean",
    "classifier_score": "inception_score_mean", "precision": "precision", "recall": "recall", "f_score": "f_score",
}  # fmt: skip


@dataclass(frozen=True)
class Features:
    """The network on whose features images are compared. name: is reported with every figure.

    network: images (N, C, H, W) in [-1, 1] -> features (N, F), or (features, logits (N, classes)), which the score needs.
    published: whether these are the features of FID, IS and KID. learned_on: the images that the network was trained on here,
    as ``load_labelled`` reads them; "" for others.
    """

    network: Callable[[Tensor], Any]
    name: str
    published: bool = False
    learned_on: str = ""

    @torch.no_grad()
    def __call__(self, images: Tensor, progress: bool | None = False) -> tuple[Tensor, Tensor | None]:
        """(features (N, F), class probabilities (N, classes) or None), float32; progress: as for ``ProgressBar``."""
        blocks = over(images.split(BLOCK), len(images), "features", "images", progress, len)
        parts = [attempt("network of the features", partial(self.network, part), part) for part in blocks]
        if isinstance(parts[0], tuple):
            return torch.cat([f.flatten(1) for f, _ in parts]), torch.cat([logits for _, logits in parts]).softmax(1)
        return torch.cat([f.flatten(1) for f in parts]), None


def given_features(given: str) -> Features:
    """Features by name: "efficientnet-lite0", "inception=FILE" (see ``image_features``), or "package.module:callable".

    The callable is called without arguments, and returns a module with its trained weights. Raises InputError where it does
    not, also where two calls give different weights: then they are random ones.

    Example: ``given_features("efficientnet-lite0")(images)[0].shape  # (N, 1280)``
    """
    if given == EFFICIENTNET:
        return Features(image_features.EfficientNetLite0(), given)
    if given.startswith(f"{image_features.INCEPTION}="):
        network = image_features.Inception(Path(given.partition("=")[2]))
        name = image_features.INCEPTION + ("" if network.is_original else f"-{network.sha256[:8]}")
        return Features(network, name, published=network.is_original)
    code = given
    wanted = "wanted package.module:callable that, called without arguments, returns a torch.nn.Module with its weights loaded"
    made = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(2):
            torch.manual_seed(seed)
            try:
                made.append(build(Network(code), "network of the features", Trust(everything=True)))
            except ValueError as error:  # InputError is one
                raise InputError(f"--features {code!r} cannot be used: {error}; {wanted}") from error
    one, other = (module.state_dict() for module in made)
    if not all(torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor)):
        raise InputError(f"--features {code!r} makes other weights at each call: wanted it to load trained weights")
    return Features(made[0], code)


def trained_features(
    images: Tensor, labels: Tensor, steps: int = 600, seed: int = 0, *, progress: bool | None = False
) -> Features:
    """A small convolutional classifier, trained here on labelled real images (N, C, H, W); bitwise the same for one seed.

    What was trained is kept (``cache``), and read where the same images and settings come again.
    """
    layers: list[nn.Module] = []
    channels = images.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU()]
            channels = width
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 64), nn.ReLU()]
        network = Classifier(nn.Sequential(*layers), 64, int(labels.max()) + 1)
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        settings = f"{RECIPE} {torch.__version__} {tuple(images.shape)} {steps} {seed}"
        name = f"classifier-{hashlib.sha256(settings.encode() + content).hexdigest()}"
        if not cache.load(network, name):
            train_classifier(network, images, labels, steps=steps, noise=0.1, progress=progress)
            cache.save(network, name)

    def features_and_logits(x: Tensor) -> tuple[Tensor, Tensor]:
        features = network.features(x)
        return features, network.head(features)

    total = hashlib.sha256(content).hexdigest()[:8]
    return Features(features_and_logits, f"classifier-{total}-{steps}-{seed}")


def train_classifier(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, steps: int, batch_size: int = 128, learning_rate: float = 2e-3,
    noise: float = 0.15, random: torch.Generator | None = None, progress: bool | None = False,
) -> None:  # fmt: skip
    """Train ``classifier`` (images -> logits of classes) in place with cross entropy and leave it in eval mode.

    images: (N, C, H, W), labels: (N,) int64. Adam, the rate falling to 0 along a cosine. Gaussian noise of standard
    deviation ``noise`` is added to the images, so that features do not depend on single pixels. random: None: torch's own.
    """
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    classifier.train()
    for _ in counted(steps, "training the classifier", progress):
        rows = torch.randint(len(images), (batch_size,), generator=random)
        batch = images[rows]
        batch = batch + noise * torch.randn(batch.shape, generator=random)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(classifier(batch), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


def check(images: Tensor, real: Tensor) -> None:
    """Raise InputError unless the two sets can be compared."""
    if images.shape[1:] != real.shape[1:]:
        shapes = f"images are {tuple(images.shape[1:])}, real ones {tuple(real.shape[1:])}"
        text = f"{shapes} (channels, height, width); wanted both alike"
        grey = images.shape[1] == 1 and real.shape[1] == 3 and bool((real == real[:, :1]).all())
        raise InputError(text + ": the real ones are grey pictures saved in colour, save them with one channel" * grey)
    if min(len(images), len(real)) < 4:
        raise InputError(f"got {len(images)} images and {len(real)} real ones; wanted at least 4 of each")


class Figure(NamedTuple):
    """A figure of merit with its 95 % interval: where it would lie for other images of the same generator."""

    value: float
    low: float
    high: float


def measure(
    images: Tensor, real: Tensor, features: Features, *, kid_subset: int = 1000, resamples: int = 50,
    progress: bool | None = False, what: str = "the images", real_features: Tensor | None = None,
    draws: list[np.ndarray] | None = None,
) -> dict[str, Figure]:  # fmt: skip
    """All figures of images (N, C, H, W) against real ones (M, C, H, W), both in [-1, 1]: name -> (value, low, high).

    Names are "frechet_distance[FEATURES, n=N]", likewise kernel_distance (KID's formula), classifier_score (that of the
    Inception score, over all images), precision, recall and f_score. With the original Inception they are torch-fidelity's
    instead: frechet_inception_distance, kernel_inception_distance_mean, inception_score_mean (over 10 parts), precision, ...
    Precision and recall are of at most 10,000 images drawn from each set. The score is left out where the network gives no
    logits.

    The intervals hold about 95 %: 1.96 standard errors of ``resamples`` bootstrap samples of the images (the real ones stay).
    Precision, recall: of the share in the images whose share it is. They do not tell of the bias of the Frechet distance,
    which depends on N. what: whose figures they are, for the bar. real_features: of the real images (M, F), where they are
    known. draws: gets the Frechet distances (resamples,) of the bootstrap samples, which hold the same rows of every set of N
    images.

    Raises InputError on sets of different shape, or of fewer than four images.

    Example: ``measure(images, real, features)["frechet_distance[efficientnet-lite0, n=5000]"].value``
    """
    check(images, real)
    ours, probabilities = features(images, progress)
    theirs = features(real, progress)[0] if real_features is None else real_features
    # images are often sorted by class, and some estimators read parts of a set: mixed by torch-fidelity's permutation
    ours, theirs = _mixed(ours), _mixed(theirs)
    blocks = sum(-(-min(len(x), COVERED) // metrics.BLOCK) for x in (ours, theirs))
    with ProgressBar(resamples + SUBSETS + 2 * blocks, f"figures of {what}", "parts", progress) as bar:

        def tick() -> None:
            bar.to(bar.done + 1)

        distance = metrics.frechet_distance(ours, theirs)
        kernel = metrics.kernel_distance(ours, theirs, kid_subset, SUBSETS, resamples, tick=tick)
        drawn = metrics.frechet_draws(ours, theirs, resamples, tick=tick)
        if draws is not None:
            draws.append(drawn)
        found = {
            "frechet_distance": _around(distance, float(np.std(drawn, ddof=1)), least=0.0),
            "kernel_distance": _around(*kernel),
        }
        if probabilities is not None:
            found["classifier_score"] = _score(_mixed(probabilities), SCORED_IN if features.published else 1, resamples)
        found |= _precision_recall(ours, theirs, resamples, tick)
    return {_named(metric, features, len(images)): figure for metric, figure in found.items()}


def change_of(before: Figure, after: Figure, draws: Sequence[np.ndarray]) -> Figure:
    """How far the Frechet distance changed over the same samples, with its 95 % interval.

    draws: of ``measure``, before and after. The distance is too large by O(1/N), by another amount before than after, which the
    bootstrap shows: it is taken off. That is an estimate too, so the interval is wider by as much, to either side.
    """
    change, drawn = after.value - before.value, draws[1] - draws[0]
    bias = float(drawn.mean()) - change
    half = SURE * float(np.std(drawn, ddof=1)) + abs(bias)
    return Figure(change - bias, change - bias - half, change - bias + half)


def real_compared(name: str, num_real: int) -> int:
    """With how many of ``num_real`` real images a figure of ``measure`` was compared; 0: with none, as a score is."""
    metric = _metric(name)
    if metric == "classifier_score":
        return 0
    return min(num_real, COVERED) if metric in ("precision", "recall", "f_score") else num_real


def _named(metric: str, features: Features, n: int) -> str:
    return PUBLISHED[metric] if features.published else f"{metric}[{features.name}, n={n}]"


def _around(value: float, error: float, least: float = -np.inf) -> Figure:
    return Figure(value, max(value - SURE * error, least), value + SURE * error)


def _score(probabilities: Tensor, parts: int, resamples: int) -> Figure:
    """The mean score of the parts."""

    def score(p: Tensor) -> float:
        return float(np.mean([metrics.classifier_score(part) for part in p.tensor_split(min(parts, len(p)))]))

    random, n = np.random.RandomState(0), len(probabilities)
    draws = [score(probabilities[random.randint(n, size=n)]) for _ in range(resamples)]
    return _around(score(probabilities), float(np.std(draws, ddof=1)), least=1.0)


def _precision_recall(ours: Tensor, theirs: Tensor, resamples: int, tick: Callable[[], None]) -> dict[str, Figure]:
    """Shares of each set that the other set covers, and their harmonic mean [Kynkaanniemi et al. 2019]."""
    ours, theirs = ours[:COVERED], theirs[:COVERED]
    inside = [metrics.covered(ours, theirs, tick=tick), metrics.covered(theirs, ours, tick=tick)]
    random = np.random.RandomState(0)
    draws = [[x[random.randint(len(x), size=len(x))].mean() for x in inside] for _ in range(resamples)]
    shares = np.array([[x.mean() for x in inside], *draws])  # (1 + resamples, 2)
    total = shares.sum(1)
    f_score = np.divide(2 * shares.prod(1), total, out=np.zeros_like(total), where=total > 0)
    columns = {"precision": shares[:, 0], "recall": shares[:, 1], "f_score": f_score}
    return {name: _share(float(x[0]), float(x[1:].std(ddof=1))) for name, x in columns.items()}


def _share(value: float, error: float) -> Figure:
    found = _around(value, error, least=0.0)
    return found._replace(high=min(found.high, 1.0))


def _mixed(x: Tensor) -> Tensor:
    """The rows of ``x`` in a fixed random order."""
    return x[torch.from_numpy(np.random.RandomState(2020).permutation(len(x)))]


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found. figures, baseline, training: as ``measure`` gives them; warnings: sentences for the reader.

    training: of as many training images, as ``yardstick`` gives them.
    """

    features: str
    num_samples: int
    num_real: int
    figures: dict[str, Figure]
    warnings: list[str]
    num_baseline: int | None = None
    baseline: dict[str, Figure] | None = None
    num_training: int | None = None
    training: dict[str, Figure] | None = None

    def columns(self) -> dict[str, list[Figure]]:
        """The figures of each set of images that was measured, all in the order of ``figures``."""
        sets = {"images": self.figures, f"baseline, n={self.num_baseline}": self.baseline}
        sets[f"training images, n={self.num_training}"] = self.training
        return {name: list(found.values()) for name, found in sets.items() if found is not None}

    def to_json(self) -> dict[str, Any]:
        """JSON values: every figure is {"value", "low", "high", "num_real"}, the last as ``real_compared`` gives it."""
        found = {**self.__dict__}
        for name in ("figures", "baseline", "training"):
            if found[name] is not None:
                found[name] = {
                    key: {**figure._asdict(), "num_real": real_compared(key, self.num_real)}
                    for key, figure in found[name].items()
                }
        return found


def evaluate(
    images: Path, real: str, *, baseline: Path | None = None, features: str | None = None, train: str | None = None,
    limit: int | None = None, progress: bool | None = False,
) -> Evaluation:  # fmt: skip
    """The figures of the images in a run's folder, a folder of pictures or a file, against the real images of ``real``.

    baseline: unrefined images, which are measured too. features: see ``given_features``; None: EfficientNet-Lite0 for images
    in colour where it is installed, else "classifier", a small classifier that is trained here on the labelled images of
    ``train`` (None: the training part of ``real``, or ``real`` itself). limit: at most so many images and unrefined ones.

    Raises InputError where sets do not fit, or where there are no features for them.

    Example: ``evaluate(Path("run"), "digits:test").figures``
    """
    ours = images_of(images, limit)
    raw = None if baseline is None else images_of(baseline, limit)
    truth, _ = load_labelled(real, signed=True)
    for given in (ours, raw):
        if given is not None:
            check(given, truth)
    network = features_for(ours, features, train or training_part(real), progress)
    compared = partial(measure, real=truth, features=network, progress=progress, real_features=network(truth, progress)[0])
    found = compared(ours)
    unrefined = None if raw is None else compared(raw, what="the baseline")
    training, num_training = yardstick(real, len(ours), compared)
    told = [
        *learned_on_them(network, real),
        *_seen_in_shaping(images, real, truth),
        *warnings_of(found, len(ours), unrefined, None if raw is None else len(raw)),
    ]
    return Evaluation(
        network.name, len(ours), len(truth), found, told, None if raw is None else len(raw), unrefined, num_training, training
    )


def yardstick(real: str, n: int, compared: Callable[..., dict[str, Figure]]) -> tuple[dict[str, Figure] | None, int | None]:
    """The figures of n training images, which no generator is expected to surpass, and how many there were.

    compared: ``measure`` with the images of ``real``. (None, None) unless ``real`` names the held-out part of images that have
    a training part.
    """
    part = training_part(real)
    if part == real:
        return None, None
    try:
        images, _ = load_labelled(part, n, signed=True)
        return compared(images, what="training images"), len(images)
    except InputError:  # no such part, or one of other images
        return None, None


def features_for(images: Tensor, features: str | None, train: str, progress: bool | None = False) -> Features:
    """The features of ``evaluate`` for images (N, C, H, W); train: labelled images for a classifier of them."""
    if features is None and images.shape[1] == 3:
        try:
            return given_features(EFFICIENTNET)
        except InputError as error:
            missing = str(error)
    else:
        missing = ""
    if features not in (None, "classifier"):
        return given_features(features)
    examples, labels = load_labelled(train, signed=True)
    if labels is None:
        raise InputError(
            f"{train} has no labels (class folders, arr_1), which the default features are learned from: pass --features or a "
            f"labelled --train{missing and f'. {missing}'}"
        )
    check(images, examples)
    return replace(trained_features(examples, labels, progress=progress), learned_on=train)


def learned_on_them(network: Features, real: str) -> list[str]:
    """A warning where the features were learned here from the very images that the figures compare with."""
    if not network.learned_on or network.learned_on != real:
        return []
    held_out = held_out_part(real)
    return [
        f"the features were learned from the images of --real itself, {real}, as no --train was given: they know these images "
        "by heart, so the figures only compare with others that were made in this way; wanted "
        + (f"held-out images as --real, {held_out}" if held_out else "other labelled images as --train")
    ]


def _seen_in_shaping(images: Path, real: str, truth: Tensor) -> list[str]:
    """A warning where the pair of a run was shaped on some of the images that it is judged by."""
    try:
        pair = json.loads((images / MANIFEST).read_text())["configuration"]["pair"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nothing is known of it
    n = shaped_on_some(pair, truth)
    return [shaped_on_them(f"the discriminator of {pair}", n, truth, real, "the figures")] if n else []


def shaped_on_some(pair: str, truth: Tensor) -> int:
    """On how many of the real images (N, C, H, W) in [-1, 1] the discriminator of a pair's folder was shaped."""
    seen = shaped_on(pair)
    return 0 if seen is None else int(np.isin(digests(truth), seen).sum())


def shaped_on_them(who: str, n: int, truth: Tensor, real: str, what: str) -> str:
    """The warning that n of the real images were used in shaping; what: is flattered by it."""
    instead = held_out_part(real)
    return (
        f"{who} was shaped on {n} of these {len(truth)} real images, which flatters {what}; wanted held-out ones as --real"
        f"{instead and f', {instead}'}"
    )


def warnings_of(found: dict[str, Figure], n: int, raw: dict[str, Figure] | None = None, raw_n: int | None = None) -> list[str]:
    """Warnings for a reader: few images, and no unrefined ones beside them; another number of these; score and distance both
    higher than theirs.

    found, raw: of ``measure``, of n images and of raw_n unrefined ones.
    """
    if raw is None:
        few = f"{n} images are few, and the Frechet distance falls with their number: compare sets of {n} only"
        return [few] if n < FEW else []
    warnings = []
    if raw_n != n:
        warnings.append(
            f"{n} images, and the baseline has {raw_n}: the Frechet distance falls with their number, so the two do not "
            f"compare; wanted as many of each (--limit {min(n, raw_n or n)})"
        )
    ours, theirs = (_by_metric(figures) for figures in (found, raw))
    intervals = [{_metric(name): figure for name, figure in figures.items()} for figures in (found, raw)]
    score, distance = "classifier_score", "frechet_distance"
    rose = intervals[0][distance].low > intervals[1][distance].high
    if score in ours and ours[score] > theirs[score] and rose:
        warnings.append(
            f"the score rose from {theirs[score]:.3f} to {ours[score]:.3f}, which is better, but the distance rose too, from "
            f"{theirs[distance]:.3f} to {ours[distance]:.3f}, which is worse: the images may be refined too far. Take fewer or "
            "smaller steps, or shape the discriminator"
        )
    for name, share in (("precision", "images look like a real one"), ("recall", "real images have one like them")):
        if name in intervals[0] and intervals[0][name].high < intervals[1][name].low:
            warnings.append(f"{name} fell from {theirs[name]:.3f} to {ours[name]:.3f}: fewer {share} than without refinement")
    return warnings


def _by_metric(figures: dict[str, Figure]) -> dict[str, float]:
    return {_metric(name): figure.value for name, figure in figures.items()}


def _metric(name: str) -> str:
    """Our name of the metric of a figure."""
    ours = {published: metric for metric, published in PUBLISHED.items()}
    return ours.get(name, name.partition("[")[0])


def images_of(path: Path, limit: int | None = None) -> Tensor:
    """Images float32 (N, C, H, W) in [-1, 1] of a run's folder, a folder of pictures or a file; limit: see ``images.some``."""
    if (path / MANIFEST).is_file():
        pixels = np.concatenate([pixels for pixels, _ in Folder.open(path).parts(images=True)])
        return from_pixels(pixels[some(len(pixels), limit)])
    if path.is_file() and path.suffix not in FILES:
        raise InputError(
            f"{path} holds no images; wanted a run's folder, a folder of pictures, {', '.join(FILES[:-1])} or {FILES[-1]}"
        )
    return load_labelled(str(path), limit, signed=True)[0]
