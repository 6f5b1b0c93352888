"""What a discriminator returns, brought to one meaning: logits (N, P), P = 1 or the patches of a map."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastrefine.errors import FastrefineWarning, InputError
from fastrefine.networks import probe

SCALES = ("logit", "probability", "critic")
OutputKey = str | int | Callable[[Any], Tensor] | None
Cut = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Readout:
    """How to read D's output: which entry of a tuple or dict, and whether it is a probability that was not cut."""

    key: OutputKey = None
    invert_sigmoid: bool = False

    def __call__(self, raw: Any, n: int, dtype: torch.dtype) -> Tensor:
        """(n, P) logits of ``dtype``; InputError when there is not one value, or one map, per sample."""
        out = self.pick(raw)
        if out.dim() == 0 and n == 1:  # squeeze() of a batch of one; what is a batch mean was found on the probe batch
            out = out.reshape(1)
        if out.dim() == 0 or out.shape[0] != n:
            raise InputError(
                f"the discriminator must return one value per sample, got shape {_shape(out)} for {n} samples"
                + (" (a batch mean?)" if out.dim() == 0 else "")
            )
        if out.dim() > 1 and out.shape[1] != 1:
            raise InputError(
                f"the discriminator returned shape {_shape(out)}; wanted (N,), (N, 1) or a map (N, 1, h, w). Pass "
                "output_key=callable to reduce it to one value per sample"
            )
        logits = out.to(dtype).flatten(1) if out.dim() > 1 else out.to(dtype)[:, None]
        return torch.logit(logits, eps=1e-7) if self.invert_sigmoid else logits

    def pick(self, raw: Any) -> Tensor:
        """The one tensor among what D returned; InputError lists the keys when that is not clear."""
        if callable(self.key):
            raw = self.key(raw)
        elif self.key is not None:
            is_object = isinstance(self.key, str) and not isinstance(raw, dict | Tensor)
            try:
                raw = getattr(raw, self.key) if is_object else raw[self.key]  # type: ignore[arg-type]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(f"output_key={self.key!r} is not in the discriminator's output: {_keys(raw)}") from error
        if not isinstance(raw, Tensor):
            raise InputError(f"the discriminator returned {_keys(raw)}; choose one with output_key=key, index or callable")
        return raw


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _keys(raw: Any) -> str:
    if isinstance(raw, dict):
        return f"a dict with keys {list(raw)}"
    if isinstance(raw, tuple | list):
        fields = f", names {list(raw._fields)}" if hasattr(raw, "_fields") else ""
        return f"a {type(raw).__name__} of {len(raw)} (indices 0 to {len(raw) - 1}{fields})"
    names = list(vars(raw)) if hasattr(raw, "__dict__") else []
    return f"an object of type {type(raw).__name__}" + (f" with attributes {names}" if names else "")


def prepare(
    discriminator: nn.Module, scale: str, key: OutputKey, call: Callable[[nn.Module], Any], n: int
) -> tuple[Cut, Readout]:
    """How to cut a declared final sigmoid from our copy of D, and how to read it; checks ``scale`` on a probe batch.

    call: runs a module on the probe batch of ``n`` images. With "probability" the final Sigmoid is cut, so that a logit
    of 60 stays 60. InputError when declaration and network disagree.
    """
    readout = Readout(key)
    with torch.no_grad():
        values = readout(call(discriminator), n, torch.float64)
    if values.shape[1] > 1:
        warnings.warn(
            f"the discriminator returns a map of {values.shape[1]} patches; their mean is the sample's logit",
            FastrefineWarning,
            stacklevel=2,
        )
    name = probe.last_leaf(discriminator, lambda: call(discriminator))
    ends_in_sigmoid = name is not None and isinstance(discriminator.get_submodule(name), nn.Sigmoid)
    known = values[values.isfinite()]  # a sample that is not finite decides nothing
    inside = bool(((known >= 0) & (known <= 1)).all())
    cuts: list[Cut] = [functools.partial(_cut_module, name=name)] if ends_in_sigmoid and name else []
    found = None
    if inside:
        found = _working_cut([*cuts, _cut_traced], discriminator, lambda m: readout(call(m), n, torch.float64), values)
    if scale != "probability":
        if len(known) and inside and (ends_in_sigmoid or found is not None):
            where = f" (module {name!r})" if ends_in_sigmoid else ""
            raise InputError(
                f"the discriminator ends in a sigmoid{where} and returned values in [0, 1], but "
                f"discriminator_output={scale!r} was declared; pass discriminator_output='probability'"
            )
        return _uncut, readout
    if not inside:
        raise InputError(
            f"discriminator_output='probability' was declared, but the discriminator returned values from "
            f"{float(known.min()):.3g} to {float(known.max()):.3g}; pass 'logit' or 'critic'"
        )
    if found is not None:
        return found, readout
    warnings.warn(
        "the discriminator's sigmoid could not be found and cut: logits beyond +-16 are lost. Return logits instead",
        FastrefineWarning,
        stacklevel=2,
    )
    return _uncut, Readout(key, invert_sigmoid=True)


def _uncut(discriminator: nn.Module) -> nn.Module:
    return discriminator


def _cut_module(discriminator: nn.Module, name: str) -> nn.Module:
    twin = copy.deepcopy(discriminator)
    twin.set_submodule(name, nn.Identity())
    return twin


def _cut_traced(discriminator: nn.Module) -> nn.Module:
    """The discriminator without the sigmoids, functions or modules, just before it returns."""
    traced = fx.symbolic_trace(discriminator)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        while node.op == "call_method" and node.target in ("view", "reshape", "squeeze", "flatten"):
            node = node.all_input_nodes[0]
        is_module = node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Sigmoid)
        if is_module or node.target in (torch.sigmoid, torch.nn.functional.sigmoid, torch.special.expit, "sigmoid"):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
            traced.recompile()
    return traced


def _working_cut(
    cuts: list[Cut], discriminator: nn.Module, logits_of: Callable[[nn.Module], Tensor], values: Tensor
) -> Cut | None:
    """The first cut after which the sigmoid of the output gives the probabilities ``values`` again."""
    for cut in cuts:
        try:
            with torch.no_grad():
                logits = logits_of(cut(discriminator))
        except Exception:  # tracing runs the user's code on proxies: it may fail in any way
            continue
        if torch.allclose(torch.sigmoid(logits), values, atol=1e-5, equal_nan=True):
            return cut
    return None
