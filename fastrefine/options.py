"""What a Refiner is told besides its two networks: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrefine import checks, stopping
from fastrefine.errors import InputError
from fastrefine.priors import Prior
from fastrefine.samplers.base import Sampler
from fastrefine.stopping import StopRule

Callback = Callable[[dict[str, int]], None]
OutputKey = str | int | Callable[[Any], Tensor] | None

SCALES = ("logit", "probability", "critic")
DRIVERS = ("auto", "host", "graph", "loop")
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "tf32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of ``Refiner``, where each is described. Raises InputError for a value that is out of range.

    ``stop`` becomes a rule, ``real`` a tensor, ``real_labels`` labels on the CPU, devices torch.device objects.
    """

    sampler: Sampler
    at: str = "input"
    max_steps: int = 50
    stop: StopRule = field(default_factory=stopping.FixedSteps)
    prior: Prior | None = None
    real: Tensor | None = None
    real_labels: Tensor | None = None
    discriminator_output: str = "logit"
    num_slots: int = 256
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"
    keep: str = "last"
    generator_kwargs: dict[str, Any] | None = None
    discriminator_kwargs: dict[str, Any] | None = None
    output_key: OutputKey = None
    driver: str = "auto"
    compile: bool = False
    coupling: str = "refuse"
    on_nonfinite: str = "contain"
    max_grad_norm: float | None = None
    output_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    deterministic: bool = False
    progress: bool = False
    callback: Callback | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise InputError(f"sampler is {self.sampler!r}; wanted a sampler such as fastrefine.Collaborative(step_size=0.1)")
        if not isinstance(self.at, str):
            raise InputError(f"at is {self.at!r}; wanted 'input', 'output' or the name of a module")
        if self.prior is not None and not isinstance(self.prior, Prior):
            raise InputError(f"prior is {self.prior!r}; wanted a prior such as fastrefine.Normal(64)")
        for name, choices in (
            ("discriminator_output", SCALES), ("precision", tuple(DTYPES)), ("keep", ("last", "best")),
            ("coupling", ("refuse", "lockstep")), ("on_nonfinite", ("contain", "error")), ("driver", DRIVERS),
        ):  # fmt: skip
            checks.choice(name, getattr(self, name), choices)
        if self.max_grad_norm is not None:
            checks.number("max_grad_norm", self.max_grad_norm, 0.0, open_low=True)
        for name in ("generator_kwargs", "discriminator_kwargs"):
            kwargs = getattr(self, name)
            if kwargs is not None and not isinstance(kwargs, dict):
                raise InputError(f"{name} is {kwargs!r}; wanted a dict of arguments or None")
        if self.output_key is not None and not isinstance(self.output_key, str | int) and not callable(self.output_key):
            raise InputError(f"output_key is {self.output_key!r}; wanted a key, an index, a callable or None")
        if self.callback is not None and not callable(self.callback):
            raise InputError(f"callback is {self.callback!r}; wanted a callable or None")
        self._become(
            stop=stopping.as_rule(self.stop),
            max_steps=checks.count("max_steps", self.max_steps, 0, 2**31 - 1),
            num_slots=checks.count("num_slots", self.num_slots, 1, 2**31 - 1),
            device=checks.device("device", self.device),
            output_device=checks.device("output_device", self.output_device),
            generator_kwargs=self.generator_kwargs or {},
            discriminator_kwargs=self.discriminator_kwargs or {},
            compile=bool(self.compile),
        )
        self._check_real()

    def _check_real(self) -> None:
        if self.real is None:
            if self.real_labels is not None:
                raise InputError("real_labels were given without `real` images")
            if self.needs_real:
                raise InputError(
                    f"{type(self.sampler).__name__} with stop={self.stop!r} reads real logits: pass real=images to the "
                    "Refiner, or --real FOLDER or FILE.npz to a command"
                )
            return
        real = checks.tensor("real", self.real, self.dtype)
        if len(real) == 0:
            raise InputError("`real` is empty; wanted real images (N, ...)")
        self._become(real=real, real_labels=self.own_labels(self.real_labels, len(real)))

    def _become(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

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

    def own_labels(self, labels: Any, n: int) -> Tensor | None:
        """Labels of n samples on the CPU, vectors in the dtype of the state."""
        y = checks.labels(labels, n)
        return y if y is None else y.to("cpu", self.dtype) if y.is_floating_point() else y.cpu()
