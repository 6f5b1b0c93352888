"""Philox4x32-10 noise (Salmon et al., SC 2011): a draw is a pure function of (seed, sample id, step, stream, element).

Counter = (element // 4, step, sample id, stream), key = seed. Neither slot, batch, device nor order enters.
"""

import enum
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """The last counter word: draws of different purpose never share a counter."""

    PROPOSAL = 0
    ACCEPT = 1
    LATENT = 2
    JITTER = 3
    LAST_STEP = 4
    REFERENCE = 5
    SELECTION = 6
    BATCH = 7
    PROBE = 8
    REJECTION = 9
    NETWORK = 10


KEY = "noise_key"  # the name of the input by which a sample carries its key for draws inside of the networks


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit word of the product of a constant and int64 words; the sign that 64 bits leave it is cut off."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) for int64 counter words that broadcast; ``seed``: the 64-bit key."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _mulhilo(0xD2511F53, c0)
        high1, low1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, sample_id: Tensor, step: Tensor, blocks: int, stream: int) -> tuple[Tensor, ...]:
    block = torch.arange(blocks, device=sample_id.device).expand(len(sample_id), -1)
    zero = torch.zeros_like(block)
    return philox(seed, block, zero + step.long()[:, None], zero + (sample_id.long() & _MASK)[:, None], zero + stream)


def _unit(word: Tensor) -> Tensor:
    """23 bits to the middle of their interval: exact in float32, so every backend starts from the same uniforms."""
    return ((word >> 9).double() + 0.5) * 2.0**-23


def normal(seed: int, sample_id: Tensor, step: Tensor, numel: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Standard normals (S, numel) of ``dtype`` by Box-Muller, four per Philox block; |x| <= 5.77.

    sample_id: (S,) int64 in [0, 2**32); step: (S,) integer. Reference arithmetic is float64, rounded once.
    """
    r0, r1, r2, r3 = _words(seed, sample_id, step, -(-numel // 4), stream)
    first, second = torch.sqrt(-2 * torch.log(_unit(r0))), torch.sqrt(-2 * torch.log(_unit(r2)))
    angle, other = 2 * math.pi * _unit(r1), 2 * math.pi * _unit(r3)
    lanes = (first * torch.cos(angle), first * torch.sin(angle), second * torch.cos(other), second * torch.sin(other))
    return torch.stack(lanes, -1).flatten(1)[:, :numel].to(dtype).contiguous()


def keys(seed: int, sample_id: Tensor) -> Tensor:
    """(S, 2) int64 words of 32 bits: what draws inside of the networks depend on, see ``networks.draws``."""
    first, second, *_ = _words(seed, sample_id, torch.zeros_like(sample_id), 1, Stream.NETWORK)
    return torch.cat([first, second], 1)


def uniform(seed: int, sample_id: Tensor, step: Tensor, numel: int, stream: int) -> Tensor:
    """Uniforms (S, numel) float64 in the open interval (0, 1), 32 bits each."""
    words = torch.stack(_words(seed, sample_id, step, -(-numel // 4), stream), -1).flatten(1)[:, :numel]
    return (words.double() + 0.5) * 2.0**-32


class Noise:
    """What a sampler sees of randomness: draws of the samples now in the slots, at their present steps."""

    def __init__(self, seed: int, sample_id: Tensor, step: Tensor, numel: int, dtype: torch.dtype):
        self._seed, self._id, self._step = seed, sample_id.clamp(min=0), step
        self._numel, self._dtype = numel, dtype

    def normal(self, stream: int = Stream.PROPOSAL, ago: int = 0) -> Tensor:
        """(S, F) standard normals; those that were drawn ``ago`` steps before, which is 0 or more."""
        return normal(self._seed, self._id, (self._step - ago).clamp(min=0), self._numel, stream, self._dtype)

    def uniform(self, stream: int = Stream.ACCEPT) -> Tensor:
        """(S,) uniforms in (0, 1)."""
        return uniform(self._seed, self._id, self._step, 1, stream)[:, 0].to(self._dtype)

    def jitter(self, ago: int | Tensor) -> Tensor:
        """(S,) uniforms in (-1, 1), float64: those that were drawn ``ago`` steps before, an int or (S,), 0 or more."""
        return 2 * uniform(self._seed, self._id, (self._step - ago).clamp(min=0), 1, Stream.JITTER)[:, 0] - 1
