"""[CS] 4.4: unpaired translation by a CycleGAN, refined with the target domain's PatchGAN.

Grey digits become glowing ones: black, red, orange, yellow by the ink of each pixel. Training sees no pairs; because the
map is known, every translated pixel has a true colour, and the domain a palette: figures that no discriminator saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastrefine as fr
from benchmarks.papers import plots, result_file
from benchmarks.papers.cells import checkpoints, trained_judge
from benchmarks.papers.image_networks import PictureClassifier
from benchmarks.papers.result_file import Row, against, claim
from benchmarks.papers.run import Made, Recipe, Run, Table, moved
from fastrefine.datasets import Images, load_digits, load_mnist
from fastrefine.demo.gan import Pair, Trainer, Training, build, descend, images_of
from fastrefine.demo.judge import accuracy
from fastrefine.models import CycleGANGenerator, patchgan_discriminator

INK = 0.1  # pixels with more of it are the object
# The first checkpoint is far from done. training.rates: of the generators and the discriminators. generator: features, blocks.
# discriminator: features, layers. cycle: weight of the L1 cycle loss; identity: of the other. Collaborative refinement is by
# sgd with backtracking, stopped at the median logit of the target domain. D as it is was trained on the least-squares loss and
# is followed on it; shaped, it is a logit.
FULL = Recipe(
    size=28, training=Training(16, "adam", (2e-4, 2e-4), (0.5, 0.999)), checkpoints=(300, 1500), at="decoder.2", step_size=1.0,
    max_steps=50, shaping_iterations=150, shaping_batch=50, shaping_rate=2e-4, samples=2000, classifier_width=12,
    classifier_steps=600, reference=1000, num_slots=100,
    own=dict(generator=(16, 2), discriminator=(32, 2), cycle=10.0, identity=5.0),
)  # fmt: skip
QUICK = FULL.but(
    size=16, training=replace(FULL.training, batch_size=12, rates=(2e-3, 1e-3)), checkpoints=(40,), generator=(4, 1),
    discriminator=(8, 1), max_steps=6, shaping_iterations=12, shaping_batch=16, shaping_rate=2e-3, samples=100,
    classifier_width=4, classifier_steps=40, reference=100,
)  # fmt: skip
REDUCTIONS = ("two digit domains of 28x28 in place of photographs of 256x256; networks to that measure",)


def networks_of(recipe: Recipe, seed: int) -> Pair:
    """([to the target, back], [of the source domain, of the target domain]), untrained."""
    g, d = recipe.generator, recipe.discriminator
    return (
        build(lambda: nn.ModuleList(CycleGANGenerator(g[0], g[1], downsamplings=1) for _ in range(2)), seed),
        build(lambda: nn.ModuleList(patchgan_discriminator(*d) for _ in range(2)), seed + 100),
    )


class CycleTrainer(Trainer):
    """Both generators, then both discriminators, on least squares; ``real`` draws target images, ``latents`` source images."""

    def __init__(self, pair: Pair, source: Tensor, target: Tensor, recipe: Recipe, seed: int):
        super().__init__(*pair, images_of(target), images_of(source), recipe.training, seed)
        self.cycle, self.identity = recipe.cycle, recipe.identity

    def _update(self) -> None:
        n = self.training.batch_size
        target, source = self.real(n, self.random), self.latents(n, self.random)
        (to, back), (d_source, d_target) = cast(Any, self.generator), cast(Any, self.discriminator)
        self.discriminator.requires_grad_(False)
        forth, there = to(source), back(target)
        loss = (d_target(forth) - 1).square().mean() + (d_source(there) - 1).square().mean()
        loss = loss + self.cycle * (F.l1_loss(back(forth), source) + F.l1_loss(to(there), target))
        loss = loss + self.identity * (F.l1_loss(to(target), target) + F.l1_loss(back(source), source))
        descend(self.optimizers[0], loss)
        self.discriminator.requires_grad_(True)
        real = (d_target(target) - 1).square().mean() + (d_source(source) - 1).square().mean()
        fake = d_target(forth.detach()).square().mean() + d_source(there.detach()).square().mean()
        descend(self.optimizers[1], 0.5 * (real + fake))


def glowing(source: Tensor) -> Tensor:
    """The true translation of grey images (N, 3, H, W) in [-1, 1]: red comes with the first ink, green later, blue last."""
    ink = (source[:, :1] + 1) / 2
    return 2 * torch.cat([2.5 * ink, 1.6 * ink - 0.5, 2 * ink - 1.7], 1).clamp(0, 1) - 1


def domains(data: Images, size: int) -> tuple[Images, Images]:
    """(grey, glowing): the first half of the training images is the source domain's, the other the target's; both test."""

    def grey(x: Tensor) -> Tensor:
        scaled = x if x.shape[-1] == size else F.interpolate(x, size, mode="bilinear")
        return scaled.expand(-1, 3, -1, -1).contiguous()

    half, test = len(data.train) // 2, grey(data.test)
    source = Images(grey(data.train[:half]), test, data.train_labels[:half], data.test_labels)
    target = Images(glowing(grey(data.train[half:])), glowing(test), data.train_labels[half:], data.test_labels)
    return source, target


class Translation(Table):
    """The trained networks of one seed and the figures of what they translate; ``source`` holds n held-out images."""

    def __init__(self, run: Run, seed: int):
        cells, recipe = run.cells(), run.recipe
        super().__init__(cells, recipe, seed)
        data = load_digits() if run.quick or run.data is None else load_mnist(run.data)
        self.domain, self.target = domains(data, recipe.size)
        self.source, self.labels = self.domain.test[: recipe.samples], self.domain.test_labels[: recipe.samples]
        self.judge = trained_judge(
            cells, lambda: PictureClassifier(recipe.size, recipe.classifier_width), self.target, seed=seed,
            steps=recipe.classifier_steps, batch_size=100,
        )  # fmt: skip
        found = checkpoints(cells, f"cyclegan-{seed}", self._trainer, recipe.checkpoints)
        # of each checkpoint: to the target domain, and the D of that domain
        self.pairs: dict[int, Pair] = {k: (g[0], d[1]) for k, (g, d) in found.items()}  # type: ignore[index]

    def _trainer(self) -> Trainer:
        networks = networks_of(self.recipe, self.seed)
        return CycleTrainer(networks, self.domain.train, self.target.train, self.recipe, self.seed)

    def refiner(
        self, generator: nn.Module, discriminator: nn.Module, *, at: str, loss: str = "nonsaturating",
        max_steps: int | None = None,
    ) -> fr.Refiner:  # fmt: skip
        """Refines at ``at``; loss: "least_squares" for the D that was trained on it."""
        r = self.recipe
        return fr.Refiner(
            generator, discriminator, fr.Collaborative(r.step_size, loss=loss), at=at, num_slots=r.num_slots,
            real=self.target.train[: r.reference], stop=fr.stopping.MedianOfReal(),
            max_steps=r.max_steps if max_steps is None else max_steps,
        )  # fmt: skip

    def shaped(self, checkpoint: int, at: str) -> nn.Module:
        """The target domain's D, shaped on source images of the training half."""
        (_, empty), refiner = networks_of(self.recipe, 0), self.refiner(*self.pairs[checkpoint], at=at)
        return self.trained(f"{checkpoint}-D-{at}", empty[1], refiner, self.target.train, latents=self.domain.train)  # type: ignore[index]

    def rows(self) -> Iterator[Row]:
        """At each checkpoint: translated, refined with D as it is, with the shaped one at a feature map and on the image."""
        for k in self.pairs:
            for name in ("translated", "refine, D as it is", "refine, shaped", "refine, shaped, on the image"):
                yield self.kept({"checkpoint": k, "name": name}, lambda k=k, name=name: self._figures(k, name))  # type: ignore[misc]

    def _refiner(self, checkpoint: int, name: str) -> fr.Refiner:
        (g, d), at = self.pairs[checkpoint], "output" if name.endswith("image") else self.recipe.at
        if name == "translated":
            return self.refiner(g, d, at=at, max_steps=0)
        if name == "refine, D as it is":
            return self.refiner(g, d, at=at, loss="least_squares")
        return self.refiner(g, self.shaped(checkpoint, at), at=at)

    def _figures(self, checkpoint: int, name: str) -> Made:
        out, (g, d) = self._refiner(checkpoint, name).refine(self.source, seed=self.seed), self.pairs[checkpoint]
        with torch.no_grad():
            translated = torch.cat([g(part) for part in self.source.split(100)])
            score = torch.cat([d(part).flatten(1).mean(1) for part in out.images.split(100)])
        return {"images": out.images}, {
            "samples": len(out), **figures(self.source, translated, out.images), "score": float(score.mean()),
            "identity": accuracy(self.judge.classifier, out.images, self.labels), **self.judge(out.images), **moved(out),
        }  # fmt: skip


def figures(source: Tensor, translated: Tensor, images: Tensor) -> Row:
    """Mean absolute differences, as shares of the range, of images (N, 3, H, W) made from ``source``.

    palette_error: where there is ink, from the nearest colour that the target domain has. colour_error, background_error:
    from the true translation, where there is ink and where there is none. object_change, background_change: from the image
    that was refined.
    """
    ink = ((source[:, :1] + 1) / 2 > INK).expand_as(images)
    error, change = ((images - x).abs() / 2 for x in (glowing(source), translated))
    palette = glowing(torch.linspace(-1, 1, 64).view(1, 1, 1, 64))[0, :, 0].T  # (64, 3)
    colours = images.permute(0, 2, 3, 1)[ink[:, 0]]
    off = [torch.cdist(part, palette, p=1).min(1).values / 6 for part in colours.split(100_000)]
    return {
        "palette_error": float(torch.cat(off).mean()),
        "colour_error": float(error[ink].mean()), "background_error": float(error[~ink].mean()),
        "object_change": float(change[ink].mean()), "background_change": float(change[~ink].mean()),
    }  # fmt: skip


def rows(run: Run, seed: int) -> Iterator[Row]:
    """On MNIST; quick: on scikit-learn's digits."""
    translation = Translation(run, seed)
    run.judged(str(seed), translation.judge.accuracy)
    return translation.rows()


def claims(rows: Sequence[Row]) -> list[Row]:
    """[CS] shows pictures and no figures; what they should mean, on means over seeds."""
    return [each for checkpoint in _checkpoints(rows) for each in _claims(rows, checkpoint)]


def _claims(rows: Sequence[Row], checkpoint: int) -> list[Row]:
    def of(key: str, name: str) -> float:
        return result_file.mean(rows, key, name=name, checkpoint=checkpoint)

    found = []
    for name in ("refine, shaped", "refine, shaped, on the image"):
        title = f"{checkpoint} iterations, {name}"
        for key, what in (("frechet_distance", "a lower Frechet distance"), ("colour_error", "colours nearer the true ones")):
            before, after = of(key, "translated"), of(key, name)
            text = f"{title}: {what} than the translated image's"
            found.append(claim(text, after < before, before=before, after=after))
        background, inside = of("background_change", name), of("object_change", name)
        text = f"{title}: a background pixel changes less than half as much as one of the object"
        found.append(claim(text, background < 0.5 * inside, background=background, object=inside))
        before, after = of("identity", "translated"), of("identity", name)
        text = f"{title}: the digit stays the one it was (classifier's accuracy within .01, or better)"
        found.append(claim(text, after >= before - 0.01, before=before, after=after))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """Our figures; no paper has them."""
    found, lower = [], ("palette_error", "colour_error", "frechet_distance", "background_change")
    for checkpoint in _checkpoints(rows):
        for name in dict.fromkeys(row["name"] for row in rows):
            for key, better in (*((key, "lower") for key in lower), ("identity", "higher")):
                headline = key == "frechet_distance" and name in ("translated", "refine, shaped")
                ours = result_file.pick(rows, key, name=name, checkpoint=checkpoint)
                case = f"{name}, {checkpoint} iterations"
                found.append(against(case, key, None, ours, better, headline=headline))
    return found


def _checkpoints(rows: Sequence[Row]) -> list[int]:
    return sorted({row["checkpoint"] for row in rows})


def draw(run: Run, rows: Sequence[Row]) -> None:
    """Source, translated, refined (shaped D, at the feature map), thrice the difference; below, the refined one's score."""
    translation = Translation(run, run.seeds[0])
    for checkpoint, (_, d) in translation.pairs.items():
        before, after = (translation.shown(checkpoint, name)["images"] for name in ("translated", "refine, shaped"))
        shown = {"source": translation.source[: len(after)], "translated": before, "refined": after}
        shown["3x difference"] = (3 * (after - before)).clamp(-1, 1)
        with torch.no_grad():
            notes = [f"{float(v):.2f}" for v in d(after).flatten(1).mean(1)]
        title = f"CycleGAN, {checkpoint} iterations, refined with the shaped PatchGAN; grey: no difference"
        plots.tiles(run.outdir / f"translation-{checkpoint}.png", shown, notes, f"grey to glowing digits: {title}")
