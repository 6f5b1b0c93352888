"""What a run of ``fastrefine refine`` is made of: the flags, --config's file and the manifest are this one dataclass.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastrefine.errors import InputError

FORMATS = ("npz", "png", "wds", "safetensors")
SELECTIONS = ("none", "mh", "drs", "obrs")
STOPS = ("none", "median", "reference", "uniform")


@dataclass(frozen=True)
class Network:
    """Where a network comes from.

    code: "package.module:callable", called with ``arguments``, or the path of a torch.export archive (.pt2), which brings
    its weights. weights: a .safetensors or torch.save file; key: of the state dict in it, where there are several.
    """

    code: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    key: str = ""


@dataclass(frozen=True)
class Configuration:
    """Everything that the bytes of a run's files depend on, but for machine and versions.

    pair: "digits" | "mnist" (embedded), or a folder of ``fastrefine.save_pair``; or generator and discriminator. prior,
    sampler: {"name": ..., and its arguments}. stop: one of STOPS, or a logit. real: images that stop, step or select by.
    seeds: "0-49999", "3,7,10-12": one image each. classes: None, a class for all, or "random" (drawn by seed).
    select: with chain_length proposals for each image; budget: of obrs. image_range: of what G makes.
    """

    pair: str = ""
    generator: Network | None = None
    discriminator: Network | None = None
    prior: dict[str, Any] = field(default_factory=dict)
    at: str = ""
    sampler: dict[str, Any] = field(default_factory=lambda: {"name": "collaborative", "step_size": 0.1})
    max_steps: int = 50
    stop: str | float = "none"
    keep: str = "last"
    real: str = ""
    discriminator_output: str = ""
    num_slots: int = 256
    precision: str = "float32"
    seed: int = 0
    seeds: str = "0-999"
    classes: int | str | None = None
    num_classes: int = 0
    select: str = "none"
    chain_length: int = 10
    budget: float = 0.25
    percentile: float = 95.0
    format: str = "npz"
    shard_size: int = 1000
    image_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if bool(self.pair) == bool(self.generator or self.discriminator):
            raise InputError("wanted either a pair, or a generator and a discriminator")
        if not self.pair and not (self.generator and self.discriminator):
            raise InputError("wanted both a generator and a discriminator")
        for name, value, choices in (("format", self.format, FORMATS), ("select", self.select, SELECTIONS)):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")
        if isinstance(self.stop, str) and self.stop not in STOPS:
            raise InputError(f"stop is {self.stop!r}; wanted a logit or one of {', '.join(STOPS)}")
        for name in ("shard_size", "num_slots", "chain_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; wanted at least 1")
        ranges(self.seeds)

    @property
    def proposals(self) -> int:
        """Proposals for each image."""
        return 1 if self.select == "none" else self.chain_length

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Configuration:
        """The configuration of a JSON object; InputError names what it does not know."""
        known = {f.name for f in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InputError(f"unknown in a configuration: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        found = dict(values)
        try:
            for name in ("generator", "discriminator"):
                if isinstance(found.get(name), Mapping):
                    found[name] = Network(**found[name])
            if "image_range" in found:
                low, high = found["image_range"]
                found["image_range"] = (float(low), float(high))
            return cls(**found)
        except TypeError as error:
            raise InputError(f"the configuration does not fit: {error}") from error

    def identity(self, facts: Mapping[str, Any]) -> str:
        """sha256 of the configuration and of what it names outside itself (digests of networks and images)."""
        text = json.dumps({"configuration": self.to_json(), **facts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def ranges(text: str) -> list[range]:
    """ "0-49999" or "3,7,10-12" as ascending ranges; InputError unless they ascend without overlap."""
    found = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise InputError(f"seeds are {text!r}; wanted e.g. 0-49999 or 3,7,10-12")
        found.append(range(int(low), int(high if dash else low) + 1))
    if any(not len(r) for r in found) or any(a.stop > b.start for a, b in zip(found, found[1:], strict=False)):
        raise InputError(f"seeds are {text!r}; wanted them ascending, each once")
    return found


@dataclass(frozen=True)
class Shard:
    """The seeds of one shard: those of the run within [index * size, (index + 1) * size), in runs of consecutive ones."""

    index: int
    runs: tuple[range, ...]

    @property
    def count(self) -> int:
        """Images in it."""
        return sum(len(run) for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        """One after the other."""
        return [seed for run in self.runs for seed in run]


def shards(configuration: Configuration) -> Iterator[Shard]:
    """All shards in ascending order; which seeds lie in one does not depend on where the run begins or ends."""
    size = configuration.shard_size
    pending: dict[int, list[range]] = {}
    for run in ranges(configuration.seeds):
        for index in range(run.start // size, -(-run.stop // size)):
            for done in [i for i in pending if i < index]:
                yield Shard(done, tuple(pending.pop(done)))
            part = range(max(run.start, index * size), min(run.stop, (index + 1) * size))
            pending.setdefault(index, []).append(part)
    for index, runs in pending.items():
        yield Shard(index, tuple(runs))
