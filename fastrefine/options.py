"""The options of a Refiner: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks, noise, stopping
from fastrefine.errors import InputError
from fastrefine.priors import Prior
from fastrefine.samplers import Sampler, as_sampler
from fastrefine.stopping import StopRule

Callback = Callable[[dict[str, int]], None]
OutputKey = str | int | Callable[[Any], Tensor] | None

MOST_SLOTS = 256  # where the caller names no number
SCALES = ("logit", "probability", "critic")
DRIVERS = ("auto", "host", "graph", "loop")
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "tf32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


# Options that the preparation of the networks does not read.
OF_THE_RUN = {
    "max_steps", "keep", "proposals", "driver", "on_nonfinite", "max_grad_norm", "output_device", "progress", "callback",
    "highest_real_logit",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of ``Refiner``, where each is described. Raises InputError for a value that is out of range.

    Names become a sampler and a stop rule, ``real`` a tensor, ``real_labels`` labels on the CPU, devices torch.device objects.
    """

    sampler: Sampler
    at: str = "input"
    max_steps: int = 50
    stop: StopRule = field(default_factory=stopping.FixedSteps)
    prior: Prior | None = None
    real: Tensor | None = field(default=None, repr=False)
    real_labels: Tensor | None = field(default=None, repr=False)
    real_conditions: dict[str, Tensor] | None = field(default=None, repr=False)
    discriminator_output: str = "logit"
    num_slots: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"
    keep: str = "last"
    proposals: int = 1
    generate: Callable[..., Any] | None = None
    discriminate: Callable[..., Any] | None = None
    generator_kwargs: dict[str, Any] | None = None
    discriminator_kwargs: dict[str, Any] | None = None
    output_key: OutputKey = None
    driver: str = "auto"
    compile: bool = False
    coupling: str = "refuse"
    group_size: int | None = None
    pack: int = 1
    on_noise: str = "refuse"
    on_nonfinite: str = "contain"
    max_grad_norm: float | None = None
    output_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    deterministic: bool = False
    progress: bool | None = False
    callback: Callback | None = None
    highest_real_logit: float | None = None

    def __post_init__(self) -> None:
        self._become(sampler=as_sampler(self.sampler))
        if not isinstance(self.at, str):
            raise InputError(f"at is {self.at!r}; wanted 'input', 'output' or the name of a module")
        if self.prior is not None and not isinstance(self.prior, Prior):
            raise InputError(f"prior is {self.prior!r}; wanted a prior such as fastrefine.Normal(64)")
        for name, choices in (
            ("discriminator_output", SCALES), ("precision", tuple(DTYPES)), ("keep", ("last", "best")),
            ("coupling", checks.COUPLINGS), ("on_noise", checks.ON_NOISE), ("on_nonfinite", ("contain", "error")),
            ("driver", DRIVERS),
        ):  # fmt: skip
            checks.choice(name, getattr(self, name), choices)
        if self.highest_real_logit is not None:
            checks.number("highest_real_logit", self.highest_real_logit)
        if self.max_grad_norm is not None:
            checks.number("max_grad_norm", self.max_grad_norm, 0.0, open_low=True)
        for name in ("generator_kwargs", "discriminator_kwargs"):
            kwargs = getattr(self, name)
            if kwargs is not None and not isinstance(kwargs, dict):
                raise InputError(f"{name} is {kwargs!r}; wanted a dict of arguments or None")
        if self.output_key is not None and not isinstance(self.output_key, str | int) and not callable(self.output_key):
            raise InputError(f"output_key is {self.output_key!r}; wanted a key, an index, a callable or None")
        if checks.count("proposals", self.proposals, 1, 255) > 1 and self.coupling == "lockstep":
            raise InputError(
                f"proposals={self.proposals} scores each proposal on its own, and coupling='lockstep' keeps groups together; "
                "leave proposals out, or give coupling='freeze'"
            )
        checks.count("pack", self.pack, 1)
        if self.pack > 1 and (self.coupling != "lockstep" or (self.group_size or 0) % self.pack or not self.group_size):
            raise InputError(
                f"pack={self.pack} needs coupling='lockstep' and a group_size that is a multiple of it, e.g. "
                f"group_size={self.pack}; got coupling={self.coupling!r}, group_size={self.group_size}"
            )
        if self.group_size is not None:
            checks.count("group_size", self.group_size, 1)
            if self.coupling == "refuse":
                raise InputError(f"group_size={self.group_size} is for coupling='lockstep' or 'freeze', got coupling='refuse'")
            if self.coupling == "lockstep" and self.num_slots is not None and self.num_slots % self.group_size:
                raise InputError(f"num_slots is {self.num_slots}; wanted a multiple of group_size={self.group_size}")
        for name in ("callback", "generate", "discriminate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)!r}; wanted a callable or None")
        self._become(
            stop=stopping.as_rule(self.stop),
            max_steps=checks.count("max_steps", self.max_steps, 0, 2**31 - 1),
            num_slots=None if self.num_slots is None else checks.count("num_slots", self.num_slots, 1, 2**31 - 1),
            device=checks.device("device", self.device),
            output_device=checks.device("output_device", self.output_device),
            generator_kwargs={} if self.generator_kwargs is None else self.generator_kwargs,
            discriminator_kwargs={} if self.discriminator_kwargs is None else self.discriminator_kwargs,
            compile=bool(self.compile),
        )
        self._check_real()

    def _check_real(self) -> None:
        if self.real is None:
            for name in ("real_labels", "real_conditions"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} were given without `real` images")
            if self.needs_real:
                by_stop = not self.sampler.traits.needs_real
                text = f"{type(self.sampler).__name__} with stop={self.stop!r} reads real logits: "
                raise InputError(
                    f"{text}pass real=images to the Refiner{'; stop=None needs none' if by_stop else ''}",
                    f"{text}give --real FOLDER or FILE.npz{'; --stop none needs none' if by_stop else ''}",
                )
            return
        real = checks.tensor("real", self.real, self.dtype)
        if len(real) == 0:
            raise InputError("`real` is empty; wanted real images (N, ...)")
        conditions = self.own_conditions(self.real_conditions, len(real), "real_conditions")
        self._become(real=real, real_labels=self.own_labels(self.real_labels, len(real)), real_conditions=conditions)

    def _become(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def slots_for(self, n: int) -> int:
        """The number of slots for n samples: as given, or the power of two that holds them, at most 256."""
        slots, group = self.num_slots or min(MOST_SLOTS, 1 << max(n - 1, 0).bit_length()), self.lockstep_group or 1
        return -(-slots // group) * group

    def highest(self, real_logits: Tensor | None) -> float:
        """The highest of the logits (N,) of real images; without any the one that was given, or infinity."""
        if real_logits is not None:
            return float(real_logits.max())
        return math.inf if self.highest_real_logit is None else self.highest_real_logit

    @property
    def lockstep_group(self) -> int | None:
        """The group_size of lock step."""
        return self.group_size if self.coupling == "lockstep" else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the refined state."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def scale(self) -> str:
        """ "critic", or "logit" (which covers "probability")."""
        return "critic" if self.discriminator_output == "critic" else "logit"

    @property
    def needs_real(self) -> bool:
        """Whether the stop rule or the sampler reads logits of real images."""
        return self.stop.needs_real or self.sampler.traits.needs_real

    def own_inputs(self, labels: Any, conditions: Any, n: int, seed: int = 0, first_id: int = 0) -> dict[str, Tensor]:
        """Labels and conditions of n samples by name, on the CPU; InputError where they do not fit.

        Under on_noise="freeze" also the samples' keys for draws inside of the networks.
        """
        y = self.own_labels(labels, n)
        found = {} if y is None else {"labels": y}
        found |= self.own_conditions(conditions, n)
        if self.on_noise == "freeze":
            found[noise.KEY] = noise.keys(seed, torch.arange(first_id, first_id + n))
        return found

    def own_conditions(self, conditions: Any, n: int, what: str = "conditions") -> dict[str, Tensor]:
        """Conditions of n samples by name, on the CPU, floats in the dtype of the state; {} for None."""
        found: dict[str, Tensor] = {}
        if conditions is not None and not isinstance(conditions, Mapping):
            raise InputError(f"{what} is a {type(conditions).__name__}; wanted a dict of tensors (N, ...) by name")
        for name, value in (conditions or {}).items():
            if not isinstance(name, str) or not name.isidentifier() or name in ("labels", noise.KEY):
                raise InputError(f"{what}: {name!r} is no name of an argument of generate or discriminate")
            if self.generate is None and self.discriminate is None:
                raise InputError(f"{what} were given, but neither generate= nor discriminate= says which network reads them")
            x = torch.as_tensor(value).detach().cpu()
            if x.dim() == 0 or len(x) != n:
                raise InputError(f"{what}[{name!r}] has shape {tuple(x.shape)}; wanted one row for each of {n} samples")
            found[name] = checks.tensor(f"{what}[{name!r}]", x, self.dtype).to(self.dtype) if x.is_floating_point() else x
        return found

    def own_labels(self, labels: Any, n: int) -> Tensor | None:
        """Labels of n samples on the CPU, vectors in the dtype of the state."""
        y = checks.labels(labels, n)
        return y if y is None else y.to("cpu", self.dtype) if y.is_floating_point() else y.cpu()
