"""CUDA kernels of `alisa::prefill_attention`; `reference.py` says what they must compute.

The first is causal attention in tiles with a running softmax (FlashAttention-2), which also leaves each row's
log-sum-exp. With it the others compute the attention weights that the caller asks for, and no others, in tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..capped_attention.triton import soft_capped
from ..selection import decode_spec, last_queries
from ..triton_launch import require, rows_with_unit_stride, tuned

_LOG2_E = 1.4426950408889634


def _fits(*, config: triton.Config, capability: int, query: torch.Tensor, DIM: int, **_: Any) -> bool:
    """No register is spilled, and there is room in shared memory (`tests/kernels/triton/test_compiled.py`)."""
    rows: int = config.kwargs["BLOCK_M"]
    logits = rows * config.kwargs["BLOCK_N"] // config.num_warps  # of a warp
    if capability < 80 or query.dtype == torch.float32:  # Triton has no tensor cores for these
        return rows == 16
    if DIM > 128:
        return bool(logits == 256)
    return bool(logits == 512 or (logits == 1024 and (DIM <= 64 or capability >= 90)))


def _mass_fits(
    *, config: triton.Config, capability: int, query: torch.Tensor, DIM: int, CAP_LOG2: float, **_: Any
) -> bool:
    tile = (config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"])
    needs_registers = capability >= 100 and DIM > 128 and CAP_LOG2 > 0
    if capability < 80 or query.dtype == torch.float32 or needs_registers:
        return tile == (32, 32)
    return tile == ((32, 64) if DIM > 128 else (64, 64))


_MASS_CONFIGS = (
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
)


@triton.jit
def rows_of_head(tensor, stride_b, stride_h, sequence, head):
    """Where the rows of one head of one sequence begin; both are int64."""
    return tensor + sequence * stride_b + head * stride_h


@triton.jit
def attend_block(
    q, acc, total, top, key_rows, value_rows, key_stride, value_stride, valid_row, position, first, tokens, scale_log2,
    CAP_LOG2: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, IS_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: the keys from `first` on. IS_DIAGONAL: some are in a query's future."""
    dim = tl.arange(0, DIM)
    column = first + tl.arange(0, BLOCK_N)
    attends = column < tokens
    if valid_row is not None:
        attends &= tl.load(valid_row + column, mask=attends, other=0) != 0
    # Padding is not read: a weight of 0 does not hide a NaN.
    is_read = attends[:, None] & (dim < HEAD_DIM)[None, :]
    offset = column.to(tl.int64)[:, None]
    k = tl.load(key_rows + offset * key_stride + dim[None, :], mask=is_read, other=0.0)
    v = tl.load(value_rows + offset * value_stride + dim[None, :], mask=is_read, other=0.0)
    seen = attends[None, :]
    if IS_DIAGONAL:
        seen = seen & (column[None, :] <= position[:, None])
    logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale_log2
    if CAP_LOG2 > 0.0:
        logit = soft_capped(logit, CAP_LOG2)
    logit = tl.where(seen, logit, float("-inf"))
    new_top = tl.maximum(top, tl.max(logit, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing attended so far
    weight = tl.exp2(logit - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None] + tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
    return acc, total, new_top


@tuned(
    ("DIM",),
    _fits,
    {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
)
@triton.jit(do_not_specialize=["tokens"])
def attend_causally(
    query, key, value, valid, out, lse, tokens, scale_log2,
    query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
    value_stride_b, value_stride_h, value_stride_s,
    CAP_LOG2: tl.constexpr, QUERY_HEADS: tl.constexpr, RATIO: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of query rows of one head: grid (blocks of rows, B * Hq).

    out: `[B, Hq, S, D]`; lse: `[B, Hq, S]` float32 in units of log 2, or None. CAP_LOG2: soft-cap of logits in
    that unit; 0 = none.
    """
    # Blocks further down have more keys: they start first, so that none of them runs alone at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    sequence, head = index // QUERY_HEADS, index % QUERY_HEADS
    query_rows = rows_of_head(query, query_stride_b, query_stride_h, sequence, head)
    key_rows = rows_of_head(key, key_stride_b, key_stride_h, sequence, head // RATIO)
    value_rows = rows_of_head(value, value_stride_b, value_stride_h, sequence, head // RATIO)
    valid_row = valid
    if valid is not None:
        valid_row = valid + sequence * tokens
    start = block * BLOCK_M
    position = start + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM)
    is_row = (position < tokens)[:, None] & (dim < HEAD_DIM)[None, :]
    rows = position.to(tl.int64)[:, None]
    q = tl.load(query_rows + rows * query_stride_s + dim[None, :], mask=is_row, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    diagonal = start // BLOCK_N * BLOCK_N
    for first in range(0, diagonal, BLOCK_N):
        acc, total, top = attend_block(
            q, acc, total, top, key_rows, value_rows, key_stride_s, value_stride_s, valid_row, position, first, tokens,
            scale_log2, CAP_LOG2, HEAD_DIM, DIM, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    for first in range(diagonal, tl.minimum(start + BLOCK_M, tokens), BLOCK_N):
        acc, total, top = attend_block(
            q, acc, total, top, key_rows, value_rows, key_stride_s, value_stride_s, valid_row, position, first, tokens,
            scale_log2, CAP_LOG2, HEAD_DIM, DIM, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if valid is not None:
        # A row before which there is no real token attends to itself alone.
        is_alone = (total == 0.0)[:, None]
        own = tl.load(value_rows + rows * value_stride_s + dim[None, :], mask=is_row & is_alone, other=0.0)
        result = tl.where(is_alone, own.to(tl.float32), result)
    row = index * tokens + position
    tl.store(out + row[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=is_row)
    if lse is not None:
        tl.store(lse + row, top + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=position < tokens)


@triton.jit
def received_by_keys(
    query, key, valid_row, lse, sequence, group, position, is_query, first_column, tokens, scale_log2,
    query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
    CAP_LOG2: tl.constexpr, QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention weights of the queries at `position [BLOCK_M]` on a block of keys, summed over a group's heads."""
    RATIO: tl.constexpr = QUERY_HEADS // KV_HEADS
    dim = tl.arange(0, DIM)
    column = first_column + tl.arange(0, BLOCK_N)
    is_key = column < tokens
    if valid_row is not None:
        is_key &= tl.load(valid_row + column, mask=is_key, other=0) != 0
    seen = is_query[:, None] & is_key[None, :] & (column[None, :] <= position[:, None])
    rows, columns = position.to(tl.int64), column.to(tl.int64)
    received = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(KV_HEADS // GROUPS):
        kv_head = group * (KV_HEADS // GROUPS) + index
        key_rows = rows_of_head(key, key_stride_b, key_stride_h, sequence, kv_head)
        k = tl.load(
            key_rows + columns[:, None] * key_stride_s + dim[None, :],
            mask=is_key[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        for head in range(kv_head * RATIO, (kv_head + 1) * RATIO):
            query_rows = rows_of_head(query, query_stride_b, query_stride_h, sequence, head)
            q = tl.load(
                query_rows + rows[:, None] * query_stride_s + dim[None, :],
                mask=is_query[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
            )  # fmt: skip
            norm = tl.load(lse + (sequence * QUERY_HEADS + head) * tokens + rows, mask=is_query, other=0.0)
            logit = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale_log2
            if CAP_LOG2 > 0.0:
                logit = soft_capped(logit, CAP_LOG2)
            received += tl.where(seen, tl.exp2(logit - norm[:, None]), 0.0)
    return received


@tuned(("DIM",), _mass_fits, *_MASS_CONFIGS)
@triton.jit(do_not_specialize=["tokens", "seed_rows"])
def mass_of_last_rows(
    query, key, valid, lse, chosen, real, mass, tokens, seed_rows, scale_log2,
    query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
    CAP_LOG2: tl.constexpr, QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the mass `[B, GROUPS, R, S]`: grid (blocks of keys, blocks of rows, B * GROUPS).

    chosen, real: `[B, R]` int64 and bool, or None where the rows are the last ones.
    """
    index = tl.program_id(2).to(tl.int64)
    sequence, group = index // GROUPS, index % GROUPS
    first_column = tl.program_id(0) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = row < seed_rows
    position = tokens - seed_rows + row
    valid_row = valid
    if valid is not None:
        valid_row = valid + sequence * tokens
        listed = sequence * seed_rows + row
        position = tl.load(chosen + listed, mask=is_query, other=0).to(tl.int32)
        is_query &= tl.load(real + listed, mask=is_query, other=0) != 0
    received = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if first_column <= tl.max(position, 0):
        received = received_by_keys(
            query, key, valid_row, lse, sequence, group, position, is_query, first_column, tokens, scale_log2,
            query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
            CAP_LOG2, QUERY_HEADS, KV_HEADS, GROUPS, HEAD_DIM, DIM, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    place = (index * seed_rows + row)[:, None] * tokens + column[None, :]
    tl.store(mass + place, received, mask=(row < seed_rows)[:, None] & (column < tokens)[None, :])


@tuned(("DIM",), _mass_fits, *_MASS_CONFIGS)
@triton.jit(do_not_specialize=["tokens"])
def mass_of_all_rows(
    query, key, valid, lse, mass, tokens, scale_log2,
    query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
    CAP_LOG2: tl.constexpr, QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The mass `[B, GROUPS, 1, S]` received from all real queries together: grid (blocks of keys, B * GROUPS)."""
    index = tl.program_id(1).to(tl.int64)
    sequence, group = index // GROUPS, index % GROUPS
    first_column = tl.program_id(0) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    valid_row = valid
    if valid is not None:
        valid_row = valid + sequence * tokens
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(first_column // BLOCK_M * BLOCK_M, tokens, BLOCK_M):
        position = first + tl.arange(0, BLOCK_M)
        is_query = position < tokens
        if valid is not None:
            is_query &= tl.load(valid_row + position, mask=is_query, other=0) != 0
        total += tl.sum(
            received_by_keys(
                query, key, valid_row, lse, sequence, group, position, is_query, first_column, tokens, scale_log2,
                query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
                CAP_LOG2, QUERY_HEADS, KV_HEADS, GROUPS, HEAD_DIM, DIM, PRECISION, BLOCK_M, BLOCK_N,
            ),
            0,
        )  # fmt: skip
    tl.store(mass + index * tokens + column, total, mask=column < tokens)


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding_mask: torch.Tensor | None,
    groups: int,
    spec: str,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.prefill_attention`."""
    batch_size, query_heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    require(query.dtype in (torch.float32, torch.float16, torch.bfloat16), f"queries are {query.dtype}")
    require(head_dim <= 256, f"head_dim is {head_dim}, and the kernel holds at most 256")
    if query.is_cuda:
        is_slow = query.dtype == torch.float32 or torch.cuda.get_device_capability(query.device) < (8, 0)
        require(not is_slow, "for float32, and before compute capability 8.0, torch's attention is faster")
    # Autocast mixes dtypes.
    query, key, value = (rows_with_unit_stride(states.to(query.dtype)) for states in (query, key, value))
    valid = None if padding_mask is None else (padding_mask[:, :tokens] != 0).contiguous()
    policy = decode_spec(spec) if spec else None
    seed_rows = int(policy.seed_rows(tokens)) if policy else 0
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    mass = torch.empty((batch_size, groups, seed_rows, tokens), dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if seed_rows else None
    strides = (*query.stride()[:3], *key.stride()[:3])
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    dim = max(16, triton.next_power_of_2(head_dim))
    shape = {"CAP_LOG2": soft_cap * _LOG2_E, "HEAD_DIM": head_dim, "DIM": dim, "PRECISION": precision}
    attend_causally[lambda constants: (triton.cdiv(tokens, constants["BLOCK_M"]), batch_size * query_heads)](
        query, key, value, valid, out, lse, tokens, scale * _LOG2_E, *strides, *value.stride()[:3],
        QUERY_HEADS=query_heads, RATIO=query_heads // kv_heads, **shape,
    )  # fmt: skip
    if policy is None or seed_rows == 0:
        return out, mass
    heads = {"QUERY_HEADS": query_heads, "KV_HEADS": kv_heads, "GROUPS": groups}
    if policy.rank == "sum":
        mass_of_all_rows[lambda constants: (triton.cdiv(tokens, constants["BLOCK_N"]), batch_size * groups)](
            query, key, valid, lse, mass, tokens, scale * _LOG2_E, *strides, **heads, **shape,
        )  # fmt: skip
        return out, mass
    chosen = real = None
    if valid is not None:
        chosen, real = last_queries(query, valid, 0, seed_rows)
        assert real is not None
        chosen, real = chosen.contiguous(), real.contiguous()
    mass_of_last_rows[
        lambda constants: (
            triton.cdiv(tokens, constants["BLOCK_N"]),
            triton.cdiv(seed_rows, constants["BLOCK_M"]),
            batch_size * groups,
        )
    ](
        query, key, valid, lse, chosen, real, mass, tokens, seed_rows, scale * _LOG2_E, *strides, **heads, **shape,
    )  # fmt: skip
    return out, mass
