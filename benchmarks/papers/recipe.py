"""What an experiment is made of: one frozen recipe for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from benchmarks.papers.plane import Plane
from fastrefine.demo.gan import Training

UNUSED: Any = None  # of a field that an experiment does not use: it is left out of its record


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of but the seed. ``own`` fields, of one experiment alone, are read like the others.

    plane: networks on two-dimensional data, and their training. network: "dcgan" | "sngan" | "sagan", of images of ``size``,
    with widths ``features`` of G and D. training: of networks that are no plane. checkpoints: updates after which the GAN is
    sampled. at, step_size, max_steps: of refinement. reference: real samples whose logits stop samples, start chains and
    calibrate. shaping_*: [CS] Alg. 2; shaping_steps: the most that a batch is refined by for D. samples: of a row.
    chain_length: proposals of a chain of Metropolis-Hastings. classifier_*: of the classifier that judges images.
    """

    name: str = ""
    plane: Plane = UNUSED
    network: str = UNUSED
    size: int = UNUSED
    latent: int = UNUSED
    features: tuple[int, int] = UNUSED
    training: Training = UNUSED
    checkpoints: tuple[int, ...] = UNUSED
    at: str = UNUSED
    step_size: float = UNUSED
    max_steps: int = UNUSED
    num_slots: int = UNUSED
    precision: str = UNUSED
    reference: int = UNUSED
    shaping_iterations: int = UNUSED
    shaping_batch: int = UNUSED
    shaping_rate: float = UNUSED
    shaping_steps: int = UNUSED
    samples: int = UNUSED
    chain_length: int = UNUSED
    classifier_width: int = UNUSED
    classifier_steps: int = UNUSED
    own: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        own = {} if name.startswith("__") else self.own
        if name not in own:
            raise AttributeError(f"the recipe has no {name!r}")
        return own[name]

    def but(self, **changes: Any) -> Recipe:
        """The same with other values of some fields."""
        mine = {f.name for f in fields(self)}
        own = {name: value for name, value in changes.items() if name not in mine}
        if unknown := own.keys() - self.own.keys():
            raise TypeError(f"the recipe has no {', '.join(sorted(unknown))}")
        common = {name: value for name, value in changes.items() if name in mine}
        return replace(self, **common, own={**self.own, **own})

    def facts(self) -> dict[str, Any]:
        """The fields that are used, for the record."""
        found = asdict(self)
        return {name: value for name, value in (found | found.pop("own")).items() if value is not None and value != ""}
