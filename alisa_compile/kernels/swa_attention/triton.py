"""CUDA kernels of `alisa::swa_attention`; `reference.py` says what they must compute.

Each program of the first kernel takes a share of one KV head's rows for all query heads of that head (split-K), and
leaves its part of the output, its log-sum-exp, and the logits. The second merges the parts and turns the logits into
attention mass. Shares are cut by the order of positions and of equal size, so that sums never depend on slots. Every
count is read on the device: one captured launch serves every length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..capped_attention.triton import soft_capped
from ..inlining import traceable
from ..triton_launch import multiprocessors, require, tuned

_LOG2_E = 1.4426950408889634
_MOST_SPLITS = 64
_MOST_ELEMENTS = 8192  # of the sum that a program keeps in registers
_LEAST_HEADS = 16  # rows of the smallest tile that tensor cores take
_MASS_BLOCK = 128


@triton.jit
def attended_entries(length, counts, index):
    """How many entries a (sequence, group) attends to, and whether they are those of its list: else all positions."""
    tokens = tl.load(length).to(tl.int32)
    if counts is None:
        entries, is_listed = tokens, tokens < 0
    else:
        count = tl.load(counts + index)
        is_listed = count >= 0
        entries = tl.where(is_listed, count, tokens)
    return entries, is_listed


def _fits(*, config: triton.Config, capability: int, query: torch.Tensor, HEADS: int, DIM: int, **_: Any) -> bool:
    """No register is spilled, and there is room in shared memory (`tests/kernels/triton/test_compiled.py`)."""
    block: int = config.kwargs["BLOCK"]
    warps: int = config.num_warps
    elements = HEADS * DIM
    is_wide = elements > (4096 if block > 16 else 2048)
    if capability < 80 or query.dtype == torch.float32:  # no tensor cores for these dtypes
        return block == 16 and warps == (8 if is_wide else 4)
    return block > 16 and (warps == 8 or not is_wide)


# With four stages or more Triton fetches the list, the slots and the rows of a block one iteration after the other;
# with seven the rows of two blocks are on their way.
@tuned(
    ("HEADS", "DIM"),
    _fits,
    {"BLOCK": 16, "num_warps": 4, "num_stages": 4},
    {"BLOCK": 16, "num_warps": 8, "num_stages": 1},
    {"BLOCK": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK": 32, "num_warps": 4, "num_stages": 7},
    {"BLOCK": 32, "num_warps": 8, "num_stages": 4},
    {"BLOCK": 64, "num_warps": 8, "num_stages": 7},
)
@triton.jit(do_not_specialize=["capacity", "width"])
def attend_share(
    query, pool, scales, table, length, valid, rows, counts, logits, partial, partial_lse,
    capacity, width,
    SCALE_LOG2: tl.constexpr, CAP_LOG2: tl.constexpr, GROUPS: tl.constexpr, SLOT_HEADS: tl.constexpr,
    RATIO: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One share of the rows of one KV head: grid (B * Hkv, SPLITS). table, length, rows and counts: the layer's part.

    logits: `[B, Hq, C]` float32 in units of log 2, or None; partial: `[B, Hq, SPLITS, D]`, partial_lse: `[B, Hq,
    SPLITS]`, both float32. CAP_LOG2: soft-cap of logits in that unit; 0 = none. HEADS, DIM: RATIO and HEAD_DIM as
    powers of two that `tl.dot` takes.
    """
    KV_HEADS: tl.constexpr = GROUPS * SLOT_HEADS
    sequence = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    group = kv_head // SLOT_HEADS
    index = (sequence * GROUPS + group).to(tl.int64)
    entries, is_listed = attended_entries(length, counts, index)
    share = tl.cdiv(tl.cdiv(entries, SPLITS), 16) * 16
    start = split * share
    end = tl.minimum(start + share, entries)

    head = tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    is_head = head < RATIO
    is_dim = dim < HEAD_DIM
    first_head = kv_head * RATIO
    output_row = sequence.to(tl.int64) * (KV_HEADS * RATIO) + first_head + head
    query_row = query + output_row[:, None] * HEAD_DIM
    q = tl.load(query_row + dim[None, :], mask=is_head[:, None] & is_dim[None, :], other=0.0)
    key_offset = (kv_head % SLOT_HEADS) * HEAD_DIM

    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    for first in range(start, end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        attends = entry < end
        position = entry
        if counts is not None:
            listed = tl.load(rows + index * width + entry, mask=attends & is_listed, other=0)
            position = tl.where(is_listed, listed, entry)
        if valid is not None:
            bits = valid + sequence.to(tl.int64) * capacity + position
            attends &= tl.load(bits, mask=attends & (is_listed == 0), other=1) != 0
        # Rows that are not attended are not read: a weight of 0 does not hide a NaN.
        slot = tl.load(table + index * capacity + position, mask=attends, other=0).to(tl.int64)
        row = pool + slot[:, None] * (2 * SLOT_HEADS * HEAD_DIM) + key_offset + dim[None, :]
        is_read = attends[:, None] & is_dim[None, :]
        k = tl.load(row, mask=is_read, other=0)
        v = tl.load(row + SLOT_HEADS * HEAD_DIM, mask=is_read, other=0)
        logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * SCALE_LOG2
        if scales is not None:
            row_scale = scales + slot * (2 * SLOT_HEADS) + kv_head % SLOT_HEADS
            logit *= tl.load(row_scale, mask=attends, other=0.0)[None, :]
            v = v.to(tl.float32) * tl.load(row_scale + SLOT_HEADS, mask=attends, other=0.0)[:, None]
        if CAP_LOG2 > 0.0:
            logit = soft_capped(logit, CAP_LOG2)
        logit = tl.where(attends[None, :], logit, float("-inf"))
        if logits is not None:
            kept = is_head[:, None] & (entry < end)[None, :]
            tl.store(logits + output_row[:, None] * capacity + entry[None, :], logit, mask=kept)
        new_top = tl.maximum(top, tl.max(logit, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing attended so far
        weight = tl.exp2(logit - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        top = new_top

    total = tl.where(total == 0.0, 1.0, total)  # nothing attended: a sum of 0 with log-sum-exp -inf
    acc /= total[:, None]
    lse = top + tl.log2(total)
    part = output_row * SPLITS + split
    tl.store(partial_lse + part, lse, mask=is_head)
    tl.store(partial + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_head[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["capacity"])
def merge_shares(
    logits, partial, partial_lse, out, mass, length, counts, capacity,
    GROUPS: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and mass from the shares: grid (B * GROUPS, any number), whose second axis shares out heads and entries.

    out: `[B, Hq, D]`; mass: `[B, GROUPS, C]` float32, or None. GROUP_HEADS: query heads of a group;
    CHUNK divides SPLITS.
    """
    group_row = tl.program_id(0).to(tl.int64)
    program, programs = tl.program_id(1), tl.num_programs(1)
    dim = tl.arange(0, DIM)
    split = tl.arange(0, SPLITS)
    for head in range(program, GROUP_HEADS, programs):
        row = group_row * GROUP_HEADS + head
        lse = tl.load(partial_lse + row * SPLITS + split)
        top = tl.max(lse, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(lse - top), 0)
        acc = tl.zeros([DIM], tl.float32)
        for first in range(0, SPLITS, CHUNK):
            part = row * SPLITS + first + tl.arange(0, CHUNK)
            weight = tl.exp2(tl.load(partial_lse + part) - top)
            tile = tl.load(partial + part[:, None] * HEAD_DIM + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
            acc += tl.sum(tile * weight[:, None], 0)
        acc /= tl.where(total == 0.0, 1.0, total)
        tl.store(out + row * HEAD_DIM + dim, acc.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    if mass is not None:
        entries, _ = attended_entries(length, counts, group_row)
        for first in range(program * BLOCK, entries, programs * BLOCK):
            entry = first + tl.arange(0, BLOCK)
            received = tl.zeros([BLOCK], tl.float32)
            for first_head in range(0, GROUP_HEADS, BLOCK_HEADS):
                heads = first_head + tl.arange(0, BLOCK_HEADS)
                is_head = heads < GROUP_HEADS
                head_rows = group_row * GROUP_HEADS + heads
                share = head_rows[:, None] * SPLITS + split[None, :]
                shares = tl.load(partial_lse + share, mask=is_head[:, None], other=float("-inf"))
                tops = tl.max(shares, 1)
                tops = tl.where(tops == float("-inf"), 0.0, tops)
                totals = tl.sum(tl.exp2(shares - tops[:, None]), 1)
                kept = is_head[:, None] & (entry < entries)[None, :]
                logit = tl.load(logits + head_rows[:, None] * capacity + entry[None, :], mask=kept, other=float("-inf"))
                weight = tl.exp2(logit - tops[:, None]) / tl.where(totals == 0.0, 1.0, totals)[:, None]
                received += tl.sum(weight, 0)
            tl.store(mass + group_row * capacity + entry, received, mask=entry < entries)


def swa_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    layer: int,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.swa_attention`. A sequence that attends to nothing has output 0 here, not NaN."""
    batch_size, query_heads, _, head_dim = query.shape
    _, _, groups, capacity = table.shape
    slot_heads = pool.shape[2]
    kv_heads = groups * slot_heads
    require(query.dtype in (torch.float32, torch.float16, torch.bfloat16), f"queries are {query.dtype}")
    require(head_dim <= 256, f"head_dim is {head_dim}, and the kernel holds at most 256")
    ratio = query_heads // kv_heads
    heads, dim = max(_LEAST_HEADS, triton.next_power_of_2(ratio)), max(16, triton.next_power_of_2(head_dim))
    require(heads * dim <= _MOST_ELEMENTS, f"{ratio} query heads of {head_dim} share a KV head")
    query = query.contiguous()
    out = torch.empty((batch_size, query_heads, 1, head_dim), dtype=query.dtype, device=query.device)
    is_sparse = rows is not None and counts is not None
    mass = torch.empty((batch_size, groups, capacity if is_sparse else 0), dtype=torch.float32, device=query.device)
    splits = _splits(batch_size * kv_heads, multiprocessors(query.device))
    shares = (batch_size, query_heads, splits)
    partial = torch.empty((*shares, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(shares, dtype=torch.float32, device=query.device)
    logits = None
    if is_sparse:
        logits = torch.empty((batch_size, query_heads, capacity), dtype=torch.float32, device=query.device)
    of_layer = (table[layer], length[layer])
    lists = (rows[layer], counts[layer]) if rows is not None and counts is not None else (None, None)
    traceable(attend_share)[batch_size * kv_heads, splits](
        query, pool, scales, *of_layer, valid, *lists, logits, partial, partial_lse,
        capacity, 0 if rows is None else rows.shape[-1],
        SCALE_LOG2=scale * _LOG2_E, CAP_LOG2=soft_cap * _LOG2_E,  # constants: Inductor would pass numbers in float64
        GROUPS=groups, SLOT_HEADS=slot_heads, RATIO=ratio, HEADS=heads, HEAD_DIM=head_dim, DIM=dim,
        SPLITS=splits,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    group_heads = query_heads // groups
    # As many for every capacity: a grid that depends on it would be one more number of the graph.
    programs = max(group_heads, 4 * multiprocessors(query.device) // (batch_size * groups))
    traceable(merge_shares)[batch_size * groups, int(programs) if is_sparse else group_heads](
        logits, partial, partial_lse, out, mass if is_sparse else None, length[layer], lists[1], capacity,
        GROUPS=groups, GROUP_HEADS=group_heads, HEAD_DIM=head_dim, DIM=dim, SPLITS=splits, CHUNK=min(16, splits),
        BLOCK_HEADS=min(32, triton.next_power_of_2(group_heads)), BLOCK=_MASS_BLOCK,
    )  # fmt: skip
    return out, mass


def _splits(kv_heads: int, processors: int) -> int:
    """Shares of each KV head's rows: about four programs a multiprocessor, a power of two.

    kv_heads: of all sequences. It depends on neither length nor capacity, so neither do the sums.
    """
    wanted = int(max(1, min(_MOST_SPLITS, 4 * processors // kv_heads)))
    return 1 << (wanted.bit_length() - 1)
