"""Faster forms of the step, one after the other: each must run and agree with the form before it, or it is dropped.

The plain form, private frozen copies and autograd, always stands below. What a rung raises is noted and never passed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from fastrefine.networks import copies
from fastrefine.networks.calls import is_out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")
Pairs = list[list[tuple[str, str]]]  # for tail and discriminator: names of a layer, and of the BatchNorm after it


@dataclass(frozen=True)
class Form:
    """The two networks as the step runs them. Their modules may be shared with other forms until they are converted."""

    tail: nn.Module
    d: nn.Module
    compute: torch.dtype
    channels_last: bool = False

    def folded(self, pairs: Pairs) -> Form:
        """Copies with their BatchNorms folded."""
        tail, d = (copies.fold_batch_norms(module, own) for module, own in zip((self.tail, self.d), pairs, strict=True))
        return Form(tail, d, self.compute)

    def copied(self) -> Form:
        """Copies, which may be converted."""
        return Form(copies.twin(self.tail), copies.twin(self.d), self.compute)

    def converted(self, dtype: torch.dtype) -> Form:
        """The same modules in another dtype."""
        for module in (self.tail, self.d):
            copies.converted(module, dtype)
        return Form(self.tail, self.d, dtype)

    def laid_out(self, channels_last: bool) -> Form:
        """The same modules with their weights in this memory format."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for module in (self.tail, self.d):
            module.to(memory_format=memory_format)  # type: ignore[call-overload]
        return Form(self.tail, self.d, self.compute, channels_last)

    @property
    def is_spatial(self) -> bool:
        """Whether channels_last can pay."""
        return copies.has_spatial_weights(self.tail) or copies.has_spatial_weights(self.d)


def too_far(size: float, tolerance: float) -> str:
    return f"differs by {size / tolerance:.3g} times what is tolerated ({tolerance:g} of the largest value)"


@dataclass
class Ladder:
    """What was tried and what came of it, for ``report["ladder"]``: {"rung", "kept", "why"} in the order of trial."""

    entries: list[dict[str, Any]] = field(default_factory=list)

    def climb(self, rung: str, change: Callable[[], T], error: Callable[[T], float], tolerance: float) -> T | None:
        """What ``change`` gives if its ``error`` is within the tolerance, else None."""
        try:
            found = change()
            size = error(found)
            why = "" if size <= tolerance else too_far(size, tolerance)
        except Exception as reason:  # a rung runs the caller's code in forms that it was not written for
            if is_out_of_memory(reason):
                raise
            self.refused(rung, reason)
            return None
        self.entries.append({"rung": rung, "kept": not why, "why": why})
        if why:
            log.debug("%s is not used: %s", rung, why)
        return None if why else found

    def refused(self, rung: str, reason: BaseException) -> None:
        """Note a rung that raised."""
        why = f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
        self.entries.append({"rung": rung, "kept": False, "why": why})
        log.debug("%s is not used: %s", rung, why)
