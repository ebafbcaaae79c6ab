"""CUDA kernels of `alisa::assign_slots`; `reference.py` says what they must decide.

One marks the positions that are wanted, one program a list then lines up entering rows and the slots that they may
take, and the last hands them out. Kernels are the only barrier between what programs write and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["layer", "width", "capacity", "tokens"])
def mark_wanted(rows, counts, wanted, layer, width, capacity, tokens, BLOCK: tl.constexpr):
    """wanted `[B * G, C]` int8, zero before: 1 for each position of the working set; grid (entry blocks, B * G)."""
    own = tl.program_id(1).to(tl.int64)
    index = layer.to(tl.int64) * tl.num_programs(1) + own
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = entry < tl.load(counts + index)
    position = tl.load(rows + index * width + entry, mask=chosen, other=0)
    tl.store(wanted + own * capacity + position, 1, mask=chosen & (position < tokens))


@triton.jit(do_not_specialize=["layer", "width", "capacity", "quota", "tokens", "below", "entries"])
def line_up(
    table, owner, tally, regions, rows, counts, wanted, slots, positions, given,
    layer, width, capacity, quota, tokens, below, entries, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entering positions and the slots to take, each in order, and how many of them are given: grid (B * G).

    slots, positions: `[B * G, E]`; given `[B * G, 2]`: rows that enter, and slots that are taken.
    """
    own = tl.program_id(0).to(tl.int64)
    index = layer.to(tl.int64) * tl.num_programs(0) + own
    table += index * capacity
    owner += tl.load(regions + index) * quota
    wanted += own * capacity
    slots += own * entries
    positions += own * entries
    reserve = tl.zeros([], tl.int32)
    if tokens < capacity:
        reserve = (tl.load(table + tokens) < 0).to(tl.int32)

    entering = tl.zeros([], tl.int32)
    if rows is not None:
        count = tl.load(counts + index)
        for first in range(0, count, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            position = tl.load(rows + index * width + entry, mask=entry < count, other=0)
            lacks = (entry < count) & (position < tokens)
            lacks &= tl.load(table + position, mask=lacks, other=0) < 0
            place = entering + tl.cumsum(lacks.to(tl.int32), 0) - 1
            tl.store(positions + place, position, mask=lacks & (place < entries))
            entering += tl.sum(lacks.to(tl.int32), 0)

    free = tl.zeros([], tl.int32)
    spare = tl.zeros([], tl.int32)
    last = tl.zeros([], tl.int32)
    for first in range(0, quota, BLOCK):
        is_free, is_spare, is_last = kinds(owner, wanted, first, quota, below, BLOCK)
        free += tl.sum(is_free.to(tl.int32), 0)
        spare += tl.sum(is_spare.to(tl.int32), 0)
        last += tl.sum(is_last.to(tl.int32), 0)
    fit = tl.maximum(tl.minimum(entering, free + spare - reserve), 0)
    taken = tl.minimum(fit + reserve, free + spare + last)
    tl.store(given + own * 2, fit)
    tl.store(given + own * 2 + 1, taken)
    tl.atomic_add(tally, fit.to(tl.int64))
    tl.atomic_add(tally + 1, (entering - fit + tl.maximum(taken - free - spare, 0)).to(tl.int64))

    next_free = tl.zeros([], tl.int32)
    next_spare = free
    next_last = free + spare
    for first in range(0, quota, BLOCK):
        is_free, is_spare, is_last = kinds(owner, wanted, first, quota, below, BLOCK)
        line = tl.where(is_free, next_free + tl.cumsum(is_free.to(tl.int32), 0) - 1, taken)
        line = tl.where(is_spare, next_spare + tl.cumsum(is_spare.to(tl.int32), 0) - 1, line)
        line = tl.where(is_last, next_last + tl.cumsum(is_last.to(tl.int32), 0) - 1, line)
        tl.store(slots + line, first + tl.arange(0, BLOCK), mask=line < taken)
        next_free += tl.sum(is_free.to(tl.int32), 0)
        next_spare += tl.sum(is_spare.to(tl.int32), 0)
        next_last += tl.sum(is_last.to(tl.int32), 0)


@triton.jit
def kinds(owner, wanted, first, quota, below, BLOCK: tl.constexpr):
    """Which slots from `first` on are free, which hold rows that are not wanted, and which hold wanted ones."""
    slot = first + tl.arange(0, BLOCK)
    position = tl.load(owner + slot, mask=slot < quota, other=below)
    cached = (position >= 0) & (position < below)
    held = tl.load(wanted + position, mask=cached, other=0) != 0
    return position < 0, cached & (held == 0), cached & held


@triton.jit(do_not_specialize=["layer", "capacity", "quota", "tokens", "entries"])
def hand_out(
    table, owner, regions, slots, positions, given, layer, capacity, quota, tokens, entries, BLOCK: tl.constexpr
):
    """Let the i-th position have the i-th slot, the coming token the last one: grid (blocks of entries, B * G).

    Leaves in slots and positions what is to be fetched, and -1 in the other entries.
    """
    own = tl.program_id(1).to(tl.int64)
    index = layer.to(tl.int64) * tl.num_programs(1) + own
    table += index * capacity
    base = tl.load(regions + index) * quota
    fit = tl.load(given + own * 2)
    taken = tl.load(given + own * 2 + 1)
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = own * entries + line
    slot = base + tl.load(slots + at, mask=line < taken, other=0)
    position = tl.load(positions + at, mask=line < fit, other=0)
    position = tl.where(line < fit, position, tokens)
    left = tl.load(owner + slot, mask=line < taken, other=-1)
    tl.store(table + left, -1, mask=(line < taken) & (left >= 0))
    tl.store(owner + slot, position, mask=line < taken)
    tl.store(table + position, slot.to(tl.int32), mask=line < taken)
    tl.store(slots + at, tl.where(line < fit, slot, -1).to(tl.int32), mask=line < entries)
    tl.store(positions + at, tl.where(line < fit, position, -1), mask=line < entries)


def assign_slots(
    table: torch.Tensor,
    owner: torch.Tensor,
    tally: torch.Tensor,
    regions: torch.Tensor,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    layer: int,
    tokens: int,
    below: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.assign_slots`; working sets are in ascending order."""
    _, batch_size, groups, capacity = table.shape
    lists, quota = batch_size * groups, owner.shape[0] // regions.numel()
    width = 0 if rows is None else rows.shape[-1]
    entries = min(quota, width + 1)
    wanted = torch.zeros((lists, capacity), dtype=torch.int8, device=table.device)
    slots, positions = torch.empty((2, batch_size, groups, entries), dtype=torch.int32, device=table.device)
    given = torch.empty((lists, 2), dtype=torch.int32, device=table.device)
    if rows is not None and counts is not None:
        mark_wanted[triton.cdiv(width, _BLOCK), lists](
            rows, counts, wanted, layer, width, capacity, tokens, BLOCK=_BLOCK
        )
    line_up[(lists,)](
        table, owner, tally, regions, rows, counts, wanted, slots, positions, given,
        layer, width, capacity, quota, tokens, below, entries, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    hand_out[triton.cdiv(entries, _BLOCK), lists](
        table, owner, regions, slots, positions, given, layer, capacity, quota, tokens, entries, BLOCK=_BLOCK
    )
    return slots, positions
