"""Samplers by their names, as the command line, configurations and saved pairs have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastrefine import checks
from fastrefine.errors import InputError
from fastrefine.samplers.base import Sampler
from fastrefine.samplers.collaborative import Collaborative
from fastrefine.samplers.ddls import DDLS
from fastrefine.samplers.dgflow import DGflow
from fastrefine.samplers.dot import DOT
from fastrefine.samplers.hmc import HMC
from fastrefine.samplers.mala import MALA
from fastrefine.samplers.pcn import PCN

_CLASSES: dict[str, type[Sampler]] = {kind.__name__: kind for kind in (Collaborative, DDLS, DGflow, DOT, HMC, MALA, PCN)}


def as_sampler(given: Sampler | str | Mapping[str, Any]) -> Sampler:
    """A sampler as it is, or by its name: "ddls" (step_size 0.1, as ``--sampler ddls``), {"name": "ddls", "step_size": 0.05}.

    Raises InputError on a name that no sampler has, and on arguments that it does not take.
    """
    if isinstance(given, Sampler):
        return given
    if isinstance(given, str):
        given = {"name": given, "step_size": checks.STEP_SIZE}
    if not isinstance(given, Mapping):
        raise InputError(
            f"sampler is {checks.shown(given)}; wanted a sampler such as fastrefine.Collaborative(step_size=0.1), or its name: "
            'sampler="ddls", sampler={"name": "ddls", "step_size": 0.05}'
        )
    arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    name = arguments.pop("name", "")
    checks.choice("sampler", name, tuple(checks.SAMPLERS))
    if name != "collaborative" and "step_size" in arguments and arguments["step_size"] is None:
        raise InputError(
            f"sampler {name} has no step size, and only collaborative finds one by itself (step_size=None, `--step-size "
            "auto`); wanted a number, e.g. 0.1"
        )
    try:
        return _CLASSES[checks.SAMPLERS[name]](**arguments)
    except TypeError as error:
        raise InputError(f"sampler {name}: {error}") from error


def described(sampler: Sampler) -> dict[str, Any]:
    """The JSON values from which ``as_sampler`` makes this sampler; InputError for a class that has no name there."""
    for name, kind in checks.SAMPLERS.items():
        if type(sampler) is _CLASSES[kind]:
            own = {f.name: getattr(sampler, f.name) for f in fields(sampler) if f.repr}  # type: ignore[arg-type]
            defaults = {f.name: f.default for f in fields(sampler)}  # type: ignore[arg-type]
            return {"name": name, **{key: value for key, value in own.items() if value != defaults[key]}}
    raise InputError(f"{sampler!r} cannot be written down; wanted one of {', '.join(checks.SAMPLERS.values())}")
