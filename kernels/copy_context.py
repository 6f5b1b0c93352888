"""Copies of context rows from the pool into the slots, in Triton; specification: ``fastrefine.ops.copy_context``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrefine.ops.slots import Slots

TURN = 2048  # words
WORDS = {4: tl.int32, 1: tl.uint8}  # by bytes


@triton.jit
def copy_rows(table_ptr, source_ptr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """A program per slot and tensor. table (n, 3) int64: address of the slots' rows, of the pool's, words of a row."""
    slot = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.program_id(1) * 3
    row = tl.load(source_ptr + slot)
    if row >= 0:
        own = tl.load(entry).to(tl.pointer_type(WORD))
        pool = tl.load(entry + 1).to(tl.pointer_type(WORD))
        words = tl.load(entry + 2)
        block = 0
        while block * BLOCK < words:  # as in refine_reduce
            word = block * BLOCK + tl.arange(0, BLOCK)
            found = tl.load(pool + row * words + word, mask=word < words)
            tl.store(own + slot * words + word, found, mask=word < words)
            block += 1


@dataclass(eq=False)
class _Table:
    """Where the rows lie, in device memory; a captured graph goes on reading it."""

    key: tuple[tuple[int, int, int], ...]  # addresses and bytes of a row
    kept: tuple[Tensor, ...]  # what lies there
    word: tl.dtype
    rows: Tensor  # (n, 3) int64

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Addresses do not survive a copy of the tensors: a copy makes its own table."""


def _table(slots: Slots, context: tuple[Tensor, ...], pool_context: tuple[Tensor, ...]) -> _Table:
    key = tuple((c.data_ptr(), p.data_ptr(), c[0].numel() * c.itemsize) for c, p in zip(context, pool_context, strict=True))
    known = slots.cache.get("triton.copy_context")
    if isinstance(known, _Table) and known.key == key:
        return known
    device = slots.source.device
    for own, pool in zip(context, pool_context, strict=True):
        assert own.is_contiguous() and pool.is_contiguous() and own.device == pool.device == device
        assert own.dtype == pool.dtype and own.shape[1:] == pool.shape[1:] and len(own) == len(slots.source)
    size = 4 if all(number % 4 == 0 for entry in key for number in entry) else 1
    rows = torch.tensor([[own, pool, count // size] for own, pool, count in key], dtype=torch.int64, device=device)
    table = _Table(key, (*context, *pool_context), WORDS[size], rows)
    slots.cache["triton.copy_context"] = table
    return table


def copy_context(slots: Slots, context: tuple[Tensor, ...], pool_context: tuple[Tensor, ...]) -> None:
    """As ``ops.copy_context``, on GPU tensors (CPU tensors under TRITON_INTERPRET=1)."""
    if not context:
        return
    table = _table(slots, context, pool_context)
    with torch.cuda.device_of(slots.source):
        copy_rows[(len(slots.source), len(context))](table.rows, slots.source, WORD=table.word, BLOCK=TURN)
