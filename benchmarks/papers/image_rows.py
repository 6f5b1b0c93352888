"""The image protocol of the papers: one pair of networks, every way to sample from it, Frechet distance and classifier score.

Both figures are on the features and classes of a classifier trained here; they compare only with figures of the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastrefine as fr
from benchmarks.papers.cells import Cells
from benchmarks.papers.result_file import Row
from benchmarks.papers.run import Made, Recipe, Table
from fastrefine.demo.judge import Judge
from fastrefine.priors import Prior
from fastrefine.samplers.base import Sampler

PART = 5000  # refined proposals in memory at once
_STOPS: dict[str, Callable[[], Any]] = {
    "none": lambda: None, "median": fr.stopping.MedianOfReal, "uniform": fr.stopping.UniformStep,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to sample: refine (sampler, or None for the generator as it is), then select.

    stop: "none" | "median" (of real logits) | "uniform". shaped: by the shaped D in place of its own. select: "" | "drs" |
    "mh", of raw samples ``chain_length`` for each output; of refined ones chains over the same proposals as the row of
    that sampler without selection, so that there are samples // chain_length outputs. samples: None for the recipe's.
    """

    name: str
    sampler: Sampler | None = None
    at: str = "input"
    max_steps: int = 0
    stop: str = "none"
    keep: str = "last"
    shaped: bool = False
    select: str = ""
    samples: int | None = None


@dataclass(frozen=True)
class _Drawn:
    """Images (N, C, H, W), their logits (N,) after and before refinement, and what else a row tells of them."""

    images: Tensor
    logits: Tensor
    before: Tensor
    figures: Row


class ImageTable(Table):
    """Rows of one seed. labels (samples,): of the samples, where the networks take labels; real_labels: of ``real``."""

    def __init__(
        self, cells: Cells, recipe: Recipe, seed: int, judge: Judge, prior: Prior, real: Tensor, *,
        real_labels: Tensor | None = None, labels: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(cells, recipe, seed)
        self.judge, self.prior, self.labels = judge, prior, labels
        self.real, self.real_labels = real[: recipe.reference], real_labels
        self.chains = recipe.samples // recipe.chain_length  # outputs of a row that selects among refined samples
        self._latest: Any = None  # what tells its rows, and what they share: a refiner, and samples when first asked for
        self._shared: dict[str, Any] = {}

    def rows(
        self, facts: Mapping[str, Any], generator: nn.Module, discriminator: nn.Module, shaped: Callable[[], nn.Module],
        ways: Sequence[Way],
    ) -> Iterator[Row]:  # fmt: skip
        """A row for each way; facts: what tells these networks from others of the table, e.g. {"checkpoint": 200}.

        shaped: gives the shaped discriminator; called where a row is to be made that wants it. A way that selects is
        cheapest right after the way whose samples it selects from.
        """
        for way in ways:

            def make(way: Way = way) -> Made:
                key = (tuple(facts.items()), replace(way, name="", select=""))
                if self._latest != key:
                    self._shared.clear()  # free the other ones first
                    d = shaped() if way.shaped else discriminator
                    self._latest, self._shared["refiner"] = key, self.refiner(way, generator, d)
                images, figures = self._drawn(way, self._shared)
                return {"images": images}, {"samples": len(images), **self.judge(images, self.chains), **figures}

            yield self.kept({**facts, "name": way.name}, make)

    def images(self, facts: Mapping[str, Any], name: str) -> Tensor:
        """The first images of a row that was made."""
        return self.shown(*facts.values(), name)["images"]

    def refiner(self, way: Way, generator: nn.Module | None, discriminator: nn.Module) -> fr.Refiner:
        """The refiner of a way; without a generator it refines given images."""
        recipe = self.recipe
        return fr.Refiner(
            generator, discriminator, way.sampler or fr.Collaborative(1.0), at=way.at, prior=self.prior, real=self.real,
            real_labels=self.real_labels, max_steps=way.max_steps, stop=_STOPS[way.stop](), keep=way.keep,
            num_slots=recipe.num_slots, precision=recipe.precision or "float32",
        )  # fmt: skip

    def _drawn(self, way: Way, shared: dict[str, Any]) -> tuple[Tensor, Row]:
        if way.select and way.sampler is None:
            assert self.labels is None, "raw samples are selected without labels only"
            return self._selected(way, shared)
        if "drawn" not in shared:
            shared["drawn"] = self._refined(way, shared["refiner"])
        drawn: _Drawn = shared["drawn"]
        chosen, figures = torch.arange(len(drawn.logits)), dict(drawn.figures)
        if way.select:
            chosen, figures["acceptance"] = self._choose(way, drawn.logits, shared["refiner"])
        figures |= {"logit_before": float(drawn.before[chosen].mean()), "logit_after": float(drawn.logits[chosen].mean())}
        return drawn.images[chosen], figures

    def _refined(self, way: Way, refiner: fr.Refiner) -> _Drawn:
        images, logits, before, steps, acceptance = [], [], [], [], []
        n = way.samples or self.recipe.samples
        labels = None if self.labels is None else self.labels[:n]
        for part in refiner.stream(n, seed=self.seed, chunk=PART, labels=labels):
            images.append(part.images)
            logits.append(part.logits)
            before.append(part.initial_logits)
            steps.append(part.steps)
            if part.acceptance is not None:
                acceptance.append(part.acceptance)
        figures: Row = {"sampler_acceptance": float(torch.cat(acceptance).mean())} if acceptance else {}
        figures |= {
            "mean_steps": float(torch.cat(steps).double().mean()), "backend": part.report["backend"],
            "images_per_second": part.report["images_per_second"],
        }  # fmt: skip
        return _Drawn(torch.cat(images), torch.cat(logits), torch.cat(before), figures)

    def _selected(self, way: Way, shared: dict[str, Any]) -> tuple[Tensor, Row]:
        """Raw proposals are scored first; only those that were chosen are made again, from their latents."""
        refiner: fr.Refiner = shared["refiner"]
        if "proposals" not in shared:
            count = (way.samples or self.recipe.samples) * self.recipe.chain_length
            stream = refiner.stream(count, seed=self.seed, chunk=PART)
            shared["proposals"] = torch.cat([part.logits for part in stream])
        logits: Tensor = shared["proposals"]
        chosen, acceptance = self._choose(way, logits, refiner)
        images = refiner.refine(self.prior.sample(chosen, self.seed), seed=self.seed).images
        return images, {"acceptance": acceptance, "mean_steps": 0.0, "logit_after": float(logits[chosen].mean())}

    def _choose(self, way: Way, logits: Tensor, refiner: fr.Refiner) -> tuple[Tensor, float]:
        """(positions of the chosen, acceptance rate); one chain for each output, from a real image's logit."""
        if way.select == "drs":
            kept = fr.rejection_sample(logits, seed=self.seed, untrusted="allow")
            return kept[: way.samples or self.recipe.samples], len(kept) / len(logits)
        chain = fr.metropolis_hastings(
            logits, self.recipe.chain_length, refiner.score(self.real, self.real_labels), self.seed, labels=self.labels,
            initial_labels=self.real_labels, untrusted="allow",
        )  # fmt: skip
        return chain.indices, chain.acceptance_rate
