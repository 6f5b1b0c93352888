"""A GAN's discriminator, corrected, refines a VAE and a normalizing flow, both small and trained here.

[DGflow]: D_phi tells data from samples of the GAN g_phi, the corrector D_lambda samples of g_phi from samples of the base
generator; their logits add up to the log ratio of data and base generator, along whose gradient DGflow (KL) moves.
scikit-learn's 8x8 digits; Frechet distance and classifier score on a classifier trained here, against held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers import plots
from benchmarks.papers.cells import trained_judge
from benchmarks.papers.likelihood import VAE, Flow
from benchmarks.papers.result_file import Row, against, claim, pick
from benchmarks.papers.run import Made, Recipe, Run, Table
from fastrefine.demo.gan import build, train_gan
from fastrefine.demo.recipes import DIGITS
from fastrefine.models.default import default_discriminator


def train_base(
    model: VAE | Flow, images: Tensor, *, steps: int, batch_size: int = 64, learning_rate: float = 1e-3,
    weight_decay: float = 0.0, seed: int = 0,
) -> None:  # fmt: skip
    """Trains `model` in place on its own loss with AdamW, the rate falling to 0 along a cosine; leaves it in eval mode.

    images: (N, *shape). All randomness comes from a torch.Generator of the call's own.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for _ in range(steps):
        loss = model.loss(images[torch.randint(len(images), (batch_size,), generator=random)], random)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()
        schedule.step()
    model.eval()


# Chosen on seed 0, the same for all. fit_*: fit_discriminator of D_phi (for g_phi, on the training images) and fit_corrector,
# both with the default D. step_size, max_steps: DGflow (KL, gamma .01) at ``at``, "input" (the latent) or "output" (the image).
FULL = Recipe(
    at="input", step_size=0.03, max_steps=25, samples=4000, classifier_steps=DIGITS.classifier_steps,
    own=dict(
        vae_latent=16, vae_steps=3000, flow_layers=8, flow_width=64, flow_steps=1000, flow_weight_decay=0.1, gan_steps=5000,
        fit_iterations=2000, fit_batch=64, fit_rate=1e-3, fit_patience=5, reference_samples=10_000,
    ),
)  # fmt: skip
QUICK = FULL.but(
    vae_steps=80, flow_layers=2, flow_steps=20, gan_steps=50, fit_iterations=30, fit_batch=32, reference_samples=200,
    step_size=0.5, max_steps=4, samples=200, classifier_steps=60,
)  # fmt: skip
REDUCTIONS = ("digits in place of [DGflow]'s CIFAR-10 and STL-10",)
STAGES = ("raw", "uncorrected", "refined")


@dataclass(frozen=True)
class Base:
    """A trained generator, with its prior."""

    name: str
    generator: nn.Module
    prior: fr.Normal


class Corrected(Table):
    """The trainings and rows of one seed."""

    def __init__(self, run: Run, seed: int):
        super().__init__(run.cells(), run.recipe, seed)
        self.data = DIGITS.load(None)
        steps = self.recipe.classifier_steps
        self.judge = trained_judge(self.cells, DIGITS.classifier, self.data, seed=seed, steps=steps)
        self.gan = Base("gan", self._trained_gan(), fr.Normal(DIGITS.latent))
        # fitted for the generator afterwards, for a GAN's own D is no calibrated ratio
        self.d_phi = self._fitted("d-phi", lambda n, **o: fr.fit_discriminator(
            self.gan.generator, self.data.train, n, prior=self.gan.prior, **o
        ))  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """The data's and the GAN's, then each base generator's."""
        judge, seed, train = self.judge, self.seed, self.data.train
        yield {"seed": seed, "model": "data", "stage": "training images", **judge(train), "logit": None}
        samples = self.refiner(self.gan, self.d_phi, max_steps=0).sample(self.recipe.samples, seed=seed)
        logit = float(samples.logits.mean())
        yield {"seed": seed, "model": "gan", "stage": "raw", **judge(samples.images), "logit": logit}
        for base in self.bases():
            yield from self._of(base)

    def bases(self) -> list[Base]:
        """The VAE and the flow."""
        recipe, train = self.recipe, self.data.train

        def trained(name: str, factory: Callable[[], VAE | Flow], steps: int, weight_decay: float = 0.0) -> nn.Module:
            def make() -> nn.Module:
                model = build(factory, self.seed)
                train_base(model, train, steps=steps, weight_decay=weight_decay, seed=self.seed)
                return model

            return self.cells.network(f"{name}-{self.seed}", build(factory, self.seed), make)

        vae = trained("vae", lambda: VAE(tuple(train.shape[1:]), recipe.vae_latent), recipe.vae_steps)
        flow = trained(
            "flow", lambda: Flow(train, recipe.flow_layers, recipe.flow_width), recipe.flow_steps, recipe.flow_weight_decay
        )
        return [Base("vae", vae, fr.Normal(recipe.vae_latent)), Base("flow", flow, fr.Normal(train[0].numel()))]

    def refiner(self, base: Base, discriminator: nn.Module, max_steps: int | None = None) -> fr.Refiner:
        """DGflow along the gradient of a discriminator; max_steps: the recipe's unless given."""
        recipe = self.recipe
        return fr.Refiner(
            base.generator, discriminator, fr.DGflow(recipe.step_size), at=recipe.at, prior=base.prior,
            max_steps=recipe.max_steps if max_steps is None else max_steps,
        )  # fmt: skip

    def _of(self, base: Base) -> Iterator[Row]:
        """Raw, refined with D_phi alone, refined with D_phi + D_lambda, whose mean is ``logit`` in every row."""
        corrector = self._fitted(f"d-lambda-{base.name}", lambda n, **o: fr.fit_corrector(
            base.generator, self.gan.generator, n, prior=base.prior, reference_prior=self.gan.prior,
            reference_samples=self.recipe.reference_samples, **o,
        ))  # fmt: skip
        total = fr.SumDiscriminator(self.d_phi, corrector)
        by = {"raw": (total, 0), "uncorrected": (self.d_phi, None), "refined": (total, None)}
        scoring = self.refiner(base, total)

        def row(stage: str) -> Made:
            out = self.refiner(base, *by[stage]).sample(self.recipe.samples, seed=self.seed)
            figures = {**self.judge(out.images), "logit": float(scoring.score(out.images).mean())}
            return {"images": out.images, "logits": out.logits}, figures

        for stage in STAGES:
            yield self.kept({"model": base.name, "stage": stage}, lambda stage=stage: row(stage))  # type: ignore[misc]

    def _trained_gan(self) -> nn.Module:
        def train() -> nn.Module:
            g, d = build(DIGITS.generator, self.seed), build(DIGITS.discriminator, self.seed + 100)
            train_gan(
                g, d, self.data.train, latent_dim=DIGITS.latent, steps=self.recipe.gan_steps, seed=self.seed,
                learning_rate=DIGITS.learning_rate, r1=DIGITS.r1,
            )  # fmt: skip
            return g

        return self.cells.network(f"gan-{self.seed}", build(DIGITS.generator, self.seed), train)

    def _fitted(self, name: str, fit: Callable[..., nn.Module]) -> nn.Module:
        recipe = self.recipe
        options: dict[str, Any] = dict(
            batch_size=recipe.fit_batch, learning_rate=recipe.fit_rate, check_every=100, patience=recipe.fit_patience,
            seed=self.seed,
        )  # fmt: skip
        empty = build(lambda: default_discriminator(tuple(self.data.train.shape[1:])), 0)
        return self.cells.network(f"{name}-{self.seed}", empty, lambda: fit(recipe.fit_iterations, **options))


def rows(run: Run, seed: int) -> Iterator[Row]:
    """On the digits."""
    corrected = Corrected(run, seed)
    run.judged(str(seed), corrected.judge.accuracy)
    run.extra["recipe"] = run.recipe.facts() | {"chosen_on_seed": 0}
    return corrected.rows()


def claims(rows: Sequence[Row]) -> list[Row]:
    """For each base generator: after refinement by the sum, distance and score are both better, in every seed."""
    found = []
    for model in ("vae", "flow"):
        by = {(r["seed"], r["stage"]): r for r in rows if r["model"] == model}
        seeds = sorted({seed for seed, _ in by})
        holds = [
            by[s, "refined"]["frechet_distance"] < by[s, "raw"]["frechet_distance"]
            and by[s, "refined"]["classifier_score"] > by[s, "raw"]["classifier_score"]
            for s in seeds
        ]
        text = f"{model}: refined by D_phi + D_lambda, Frechet distance and classifier score are better than raw, every seed"
        found.append(claim(text, all(holds), seeds=seeds, holds_by_seed=holds))
    return found


def comparison(rows: Sequence[Row]) -> list[Row]:
    """[DGflow] has other data: its figures are no measure of ours."""
    return [
        against(f"{model}, {stage}", key, None, pick(rows, key, model=model, stage=stage), better,
                headline=key == "frechet_distance" and stage != "uncorrected")
        for model in ("vae", "flow")
        for stage in STAGES
        for key, better in (("frechet_distance", "lower"), ("classifier_score", "higher"))
    ]  # fmt: skip


def draw(run: Run, rows: Sequence[Row]) -> None:
    """The first samples of the first seed, raw and refined."""
    table = Table(run.cells(), run.recipe, run.seeds[0])
    shown = {f"{name}, {stage}": table.shown(name, stage) for name in ("vae", "flow") for stage in ("raw", "refined")}
    title = f"digits, seed {run.seeds[0]}: the first samples of a VAE and of a flow, raw and refined; logits of the last row"
    images: dict[str, Tensor] = {label: found["images"] for label, found in shown.items()}
    plots.tiles(run.outdir / "picture.png", images, shown["flow, refined"]["logits"], title)
