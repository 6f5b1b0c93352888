"""What selects the code of the step kernels. All else is read from device memory, so that no number ever recompiles."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from .rules import RULES

BLOCK = 1024  # features per program
# The dtypes that a view of the activation may have, by the state's
VIEWS = {torch.float32: (torch.float32, torch.bfloat16, torch.float16), torch.float64: (torch.float64,)}


@dataclass(frozen=True)
class Variant:
    """One step's kind: its rule, what the run asks for, and what this step was given."""

    rule: str
    noise: bool = False
    clamp: bool = False
    clip: bool = False
    keep_best: bool = False
    lockstep: bool = False
    evaluated: bool = True  # False: refill only
    grad: bool = True
    view: bool = False
    channel_tile: int = 0  # 0: the view has the order of the activation
    latent: bool = False

    # Options that do not matter are off: kinds with the same code then share it.

    @property
    def reduces(self) -> bool:
        """Whether refine_reduce is launched."""
        return self.evaluated and (self.grad or RULES[self.rule].terms > 0)

    @property
    def reduce(self) -> dict[str, Any]:
        """The constants of refine_reduce."""
        fused = RULES[self.rule]
        sums = fused.terms > 0
        state = {"SCALARS": fused.scalars if sums else 0, "VECTORS": fused.vectors if sums else 0}
        order = {"LATENT": self.latent and fused.tests, "REORDERED": self.channel_tile > 0 and sums and self.grad}
        options = {"GRAD": self.grad, "CLIP": self.clip and self.grad, "BLOCK": BLOCK}
        return {"SUMS": fused.sums, "TERMS": fused.terms, **state, **order, **options}

    @property
    def moves(self) -> bool:
        """Whether a sample moves without a gradient of D: by noise or by the prior."""
        return self.noise or RULES[self.rule].schedule or RULES[self.rule].moves

    @property
    def decide(self) -> dict[str, Any]:
        """The constants of refine_decide."""
        fused, evaluated, grad = RULES[self.rule], self.evaluated, self.evaluated and self.grad
        rule = fused if evaluated else RULES["sgd"]
        observe = {"OBSERVE": rule.observe, "REJECTS": rule.rejects, "TERMS": rule.terms, "TESTS": rule.tests}
        observe |= {"LATE": rule.late, "STALLS": evaluated and not self.moves, "START": fused.start, "SCALARS": fused.scalars}
        options = {"CLIP": self.clip and grad, "KEEP_BEST": self.keep_best and evaluated, "LOCKSTEP": self.lockstep}
        return {"EVALUATED": evaluated, "GRAD": grad, **observe, **options}

    @property
    def apply(self) -> dict[str, Any]:
        """The constants of refine_apply; without a gradient nothing is proposed."""
        fused, grad = RULES[self.rule], self.evaluated and self.grad
        rule = fused if grad else RULES["sgd"]
        propose = {"PROPOSE": rule.propose, "SCALARS": rule.scalars, "TESTS": rule.tests, "SCHEDULE": rule.schedule}
        propose |= {"PACE": rule.pace}
        propose |= {"VECTORS": fused.vectors, "LATENT": self.latent and grad}
        options: dict[str, Any] = {"NOISE": self.noise and grad, "CLAMP": self.clamp and grad, "CLIP": self.clip and grad}
        options |= {"KEEP_BEST": self.keep_best and self.evaluated, "VIEW": self.view, "CHANNEL_TILE": self.channel_tile}
        return {"GRAD": grad, "BLOCK": BLOCK, **propose, **options}


def channel_tile(channels: int, pixels: int) -> int:
    """Channels of a program's tile (a power of two); 0 where the two orders are one.

    32 pixels of float32 are 128 bytes, and a tile of 32 x 32 leaves 64 bytes of bfloat16 in the other direction.
    """
    if channels <= 1 or pixels <= 1:
        return 0
    return min(triton.next_power_of_2(channels), BLOCK // min(triton.next_power_of_2(pixels), 32))


def lanes(num_slots: int) -> int:
    """Lanes of the one program of refine_decide."""
    return max(32, triton.next_power_of_2(num_slots))


def warps(lanes: int) -> int:
    """Warps that share these lanes."""
    return max(1, min(lanes // 64, 16))
