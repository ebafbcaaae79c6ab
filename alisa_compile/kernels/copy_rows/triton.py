"""CUDA kernel of `alisa::copy_rows`, `gather_rows` and `scatter_rows`: any rows, one launch.

Either pool may be pinned host memory by its device alias: the kernel reads and writes it in place, over the link. A
program's rows are copied in one go, so that many requests are on their way at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_launch import require

_TILE = 1024  # words that a program copies at a time
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit(do_not_specialize=["count"])
def copy_each_row(
    source, source_slots, target, target_slots, count, SIZE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Rows of SIZE words: grid (blocks of ROWS rows, blocks of WORDS words). Without slots row i is row i of its pool;
    a negative slot leaves the row out."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    is_row = row < count
    here = row
    there = row
    if source_slots is not None:
        here = tl.load(source_slots + row, mask=is_row, other=-1).to(tl.int64)
    if target_slots is not None:
        there = tl.load(target_slots + row, mask=is_row, other=-1).to(tl.int64)
    copied = is_row & (here >= 0) & (there >= 0)
    mask = copied[:, None] & (word < SIZE)[None, :]
    value = tl.load(source + here[:, None] * SIZE + word[None, :], mask=mask)
    tl.store(target + there[:, None] * SIZE + word[None, :], value, mask=mask)


def copy(
    source: torch.Tensor, source_slots: torch.Tensor | None, target: torch.Tensor, target_slots: torch.Tensor | None
) -> None:
    """Launch the kernel; None for slots 0, 1, 2 and so on."""
    slots = source_slots if source_slots is not None else target_slots
    assert slots is not None
    require(source.is_contiguous() and target.is_contiguous(), "a pool is not contiguous")
    count = slots.shape[0]
    nbytes = source[0].nbytes if source.shape[0] else 0
    if count == 0 or nbytes == 0:
        return
    size = next(
        size for size in _WORDS if nbytes % size == 0 and source.data_ptr() % size == target.data_ptr() % size == 0
    )
    words = nbytes // size
    block = min(_TILE, triton.next_power_of_2(words))
    rows = _TILE // block
    copy_each_row[triton.cdiv(count, rows), triton.cdiv(words, block)](
        _as_words(source, size), None if source_slots is None else source_slots.contiguous(),
        _as_words(target, size), None if target_slots is None else target_slots.contiguous(),
        count, SIZE=words, ROWS=rows, WORDS=block, num_warps=4,
    )  # fmt: skip


def _as_words(pool: torch.Tensor, size: int) -> torch.Tensor:
    return pool.view(pool.shape[0], -1).view(torch.int8).view(_WORDS[size])


def copy_rows(
    source: torch.Tensor, source_slots: torch.Tensor, target: torch.Tensor, target_slots: torch.Tensor
) -> None:
    """See `reference.copy_rows`."""
    copy(source, source_slots, target, target_slots)
