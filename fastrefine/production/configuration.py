"""The configuration of a run of ``fastrefine refine``: flags, the file of --config and the manifest all become this dataclass.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastrefine import checks
from fastrefine.errors import InputError

FORMATS = ("npz", "png", "wds", "safetensors", "wav", "parquet")
SELECTIONS = ("none", "mh", "drs", "obrs")
CLASSES = ("random", "balanced")  # one of many classes for each image
CHOICES = {
    "format": FORMATS, "select": SELECTIONS, "keep": ("last", "best"),
    "precision": ("float64", "float32", "tf32", "bfloat16", "float16"),
    "discriminator_output": ("", "logit", "probability", "critic"),  # "": as the pair says
    "coupling": ("", *checks.COUPLINGS), "on_noise": ("", *checks.ON_NOISE),
    "calibrate": ("", "isotonic", "platt", "beta", "temperature"),
}  # fmt: skip
COUNTS = {  # minimum
    "best_of": 1, "num_slots": 1, "seed": 0, "num_classes": 0, "chain_length": 1, "shard_size": 1, "pack": 1, "sample_rate": 1,
}  # fmt: skip
USUAL_RANGE = (-1.0, 1.0)
# How the networks are called: arguments of Refiner, which a pair keeps.
CALLS = (
    "generate", "discriminate", "generator_kwargs", "discriminator_kwargs", "output_key", "coupling", "group_size", "pack",
    "on_noise",
)  # fmt: skip
# Of a run where neither the configuration nor the pair says.
RUN: dict[str, Any] = {
    "sampler": {"name": "collaborative", "step_size": checks.STEP_SIZE}, "max_steps": 50, "stop": "none",
}  # fmt: skip
PATHS = ("pair", "real", "held_out", "conditions")


@dataclass(frozen=True)
class Network:
    """Where a network comes from.

    code: "package.module:callable", called with ``arguments``, or the path of a torch.export archive (.pt2), which holds
    the weights too. weights: a .safetensors or torch.save file; key: which state dict of it, where it holds several.
    """

    code: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self, str, ("code", "weights", "key"))
        _check_kinds(self, dict, ("arguments",))


@dataclass(frozen=True)
class Configuration:
    """Everything that the bytes of a run's files depend on, except machine and versions.

    pair: "digits" | "mnist" (embedded), or a folder of ``fastrefine.save_pair``; else generator and discriminator. prior,
    sampler: {"name": ..., and its arguments}. stop: one of ``checks.STOPS``, or a logit. These and max_steps: where they
    are not given as the pair says, or as RUN; stop is then "median" with ``real``, without select, for samplers without a law.
    real: real images, for stop, steps and select.
    ids: the samples, "0-49999" or "3,7,10-12", one image each. classes: None, one class for all, "random" (drawn by seed), or
    "balanced" (image i is of class i modulo num_classes).
    best_of: the raw proposals of which each refined sample starts from the best (``proposals`` of Refiner).
    select: among chain_length proposals of each image; budget: of obrs. calibrate: a method of ``fastrefine.calibrate`` for the
    logits that select reads, fitted on real images, those of held_out if given, else of real. image_range: of the generator's
    images; None: the pair's, or -1 to 1 (``saved_pair.configured``). sample_rate: of wav files, in Hz. conditions: a file with
    further inputs of the networks, of which image i has row i. generate, discriminate: "package.module:function"; these and the
    rest of CALLS as for Refiner, or as the pair says where they are empty. Raises InputError on values of the wrong kind or out
    of range.
    """

    pair: str = ""
    generator: Network | None = None
    discriminator: Network | None = None
    prior: dict[str, Any] = field(default_factory=dict)
    at: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    stop: str | float = ""
    keep: str = "last"
    best_of: int = 1
    real: str = ""
    discriminator_output: str = ""
    num_slots: int = 256
    precision: str = "float32"
    seed: int = 0
    ids: str = "0-999"
    classes: int | str | None = None
    num_classes: int = 0
    select: str = "none"
    chain_length: int = 10
    budget: float = 0.25
    percentile: float = 95.0
    calibrate: str = ""
    held_out: str = ""
    format: str = "npz"
    shard_size: int = 1000
    sample_rate: int = 16000
    image_range: tuple[float, float] | None = None
    conditions: str = ""
    generate: str = ""
    discriminate: str = ""
    generator_kwargs: dict[str, Any] = field(default_factory=dict)
    discriminator_kwargs: dict[str, Any] = field(default_factory=dict)
    output_key: str | int | None = None
    coupling: str = ""
    group_size: int | None = None
    pack: int = 1
    on_noise: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self, str, (*PATHS, "at", "ids", "generate", "discriminate", *CHOICES))
        _check_kinds(self, dict, ("prior", "sampler", "generator_kwargs", "discriminator_kwargs"))
        if bool(self.pair) == bool(self.generator or self.discriminator):
            raise InputError("wanted either a pair, or a generator and a discriminator")
        if not self.pair and not (self.generator and self.discriminator):
            raise InputError("wanted both a generator and a discriminator")
        _check_kinds(self, Network | None, ("generator", "discriminator"))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; wanted one of {', '.join(filter(None, choices))}")
        if self.stop not in ("", *checks.STOPS) and not checks.is_number(self.stop):
            close = checks.closest(self.stop, checks.STOPS)
            raise InputError(f"stop is {self.stop!r}; wanted a logit or one of {', '.join(checks.STOPS)}{close}")
        if self.max_steps is not None:
            object.__setattr__(self, "max_steps", checks.count("max_steps", self.max_steps, 0))
        for name, least in COUNTS.items():
            object.__setattr__(self, name, checks.count(name, getattr(self, name), least))
        if self.classes not in (None, *CLASSES) and (type(self.classes) is not int or self.classes < 0):
            wanted = "a class for all, a whole number of at least 0, or random, or balanced"
            raise InputError(f"classes is {self.classes!r}; wanted {wanted}")
        if self.group_size is not None:
            checks.count("group_size", self.group_size, 1)
        if not isinstance(self.output_key, str | int | None) or isinstance(self.output_key, bool):
            raise InputError(f"output_key is {self.output_key!r}; wanted a key or an index; discriminate is for all else")
        checks.number("budget", self.budget, 0, 1, open_low=True)
        if not checks.is_number(self.percentile) or not 0 <= self.percentile <= 100:
            raise InputError(f"percentile is {self.percentile!r}; wanted 0 to 100")
        if self.calibrate and self.select == "none":
            raise InputError(f"calibrate={self.calibrate} is for the logits of a selection, and select is none")
        if self.calibrate and not (self.real or self.held_out):
            raise InputError(f"calibrate={self.calibrate} compares with real images: pass --real, or --held-out")
        if self.held_out and not self.calibrate:
            raise InputError("held_out images are for calibrate, which is not given")
        ranges(self.ids)
        if self.image_range is not None:
            ends: Any = self.image_range if isinstance(self.image_range, tuple | list) else ()
            if len(ends) != 2 or not all(map(checks.is_number, ends)) or not ends[0] < ends[1]:
                raise InputError(f"image_range is {self.image_range!r}; wanted two finite numbers, low before high")
            object.__setattr__(self, "image_range", (float(ends[0]), float(ends[1])))

    @property
    def proposals(self) -> int:
        """How many proposals each image has."""
        return 1 if self.select == "none" else self.chain_length

    @property
    def value_range(self) -> tuple[float, float]:
        """``image_range``, or the usual one where none is given."""
        return self.image_range or USUAL_RANGE

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Configuration:
        """The configuration of a JSON object; InputError names unknown entries."""
        if not isinstance(values, Mapping):
            raise InputError(f'a configuration is {values!r}; wanted a JSON object, as a manifest\'s "configuration"')
        known = {f.name for f in fields(cls)}
        values = renamed(values)
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InputError(f"unknown in a configuration: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        found = dict(values)
        try:
            for name in ("generator", "discriminator"):
                if isinstance(found.get(name), Mapping):
                    found[name] = Network(**found[name])
            return cls(**found)
        except TypeError as error:
            raise InputError(f"the configuration does not fit: {error}") from error

    def identity(self, facts: Mapping[str, Any]) -> str:
        """sha256 of the configuration without paths and ids, and of ``facts``: code and digests of networks and images there.

        What it stands for decides what image i is, whichever images there are: a run may grow.
        """
        settings = {name: value for name, value in without_paths(self.to_json()).items() if name != "ids"}
        text = json.dumps({"configuration": settings, **facts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's JSON by today's names: in older ones the sample ids are called seeds."""
    return {"ids" if name == "seeds" else name: value for name, value in values.items()}


def changed_sampler(sampler: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's JSON with other arguments. A control that adapts is not kept where a step size of None takes the place of a
    number, or the other way round: it belongs to the step size that it came with."""
    kept = dict(sampler)
    found_then, found_now = (one.get("step_size") is None for one in (sampler, changes))
    adapts = kept.get("control") in ("backtracking", "barzilai_borwein")
    if "name" in kept and "step_size" in changes and adapts and found_then != found_now:
        del kept["control"]
    return {**kept, **changes}


def without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's JSON without the paths of pair, weights and data: a run depends on their content only."""
    kept = {name: value for name, value in values.items() if name not in PATHS}
    for role in ("generator", "discriminator"):
        if isinstance(kept.get(role), Mapping):
            paths = {"weights", "code"} if str(kept[role].get("code")).endswith(".pt2") else {"weights"}
            kept[role] = {name: value for name, value in kept[role].items() if name not in paths}
    return kept


def _check_kinds(given: Any, kind: Any, names: Iterable[str]) -> None:
    wanted = {str: "text", dict: "an object of names and values"}.get(kind, 'e.g. {"code": "package.module:callable"}')
    for name in names:
        if not isinstance(getattr(given, name), kind):
            raise InputError(f"{name} is {getattr(given, name)!r}; wanted {wanted}")


def ranges(text: str) -> list[range]:
    """Sample ids such as "0-49999" or "3,7,10-12" as ranges; InputError unless they ascend without overlap."""
    found = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not all(end.isdecimal() and len(end) < 19 for end in (low, high if dash else low)):  # ids are of 64 bits
            raise InputError(f"ids are {checks.shown(text)}; wanted e.g. 0-49999 or 3,7,10-12, each of at most 18 digits")
        found.append(range(int(low), int(high if dash else low) + 1))
    if any(not len(r) for r in found) or any(a.stop > b.start for a, b in zip(found, found[1:], strict=False)):
        raise InputError(f"ids are {text!r}; wanted them ascending, each once")
    return found


def contains(text: str, other: str) -> bool:
    """Whether the sample ids of one text hold all those of another."""
    joined: list[range] = []
    for run in ranges(text):
        if joined and joined[-1].stop == run.start:
            run = range(joined.pop().start, run.stop)
        joined.append(run)
    return all(any(own.start <= run.start and run.stop <= own.stop for own in joined) for run in ranges(other))


def in_ranges(ids: Iterable[int]) -> tuple[range, ...]:
    """Ascending ids as ranges without gaps."""
    found: list[range] = []
    for one in ids:
        found.append(range(found.pop().start if found and found[-1].stop == one else one, one + 1))
    return tuple(found)


@dataclass(frozen=True)
class Shard:
    """The sample ids of one shard: those of the run from index * size up to (index + 1) * size, in ranges without gaps."""

    index: int
    runs: tuple[range, ...]

    @property
    def count(self) -> int:
        """Images in it."""
        return len(self.ids)

    @property
    def ids(self) -> list[int]:
        """All ids in ascending order."""
        return [one for run in self.runs for one in run]


def shards(configuration: Configuration) -> Iterator[Shard]:
    """All shards in ascending order; which ids a shard holds does not depend on where the run begins or ends."""
    size = configuration.shard_size
    parts = (
        range(max(run.start, index * size), min(run.stop, (index + 1) * size))
        for run in ranges(configuration.ids)
        for index in range(run.start // size, -(-run.stop // size))
    )
    for index, runs in itertools.groupby(parts, lambda part: part.start // size):
        yield Shard(index, tuple(runs))
