"""CUDA kernels of `alisa::kv_append`; `reference.py` says what they must do.

Int8 rows come quantised: `quantize_row` is decomposed, so Inductor fuses it into whatever makes K and V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..inlining import is_tracing, layer_code, traceable
from ..triton_launch import require

_TILE = 2048
_MASK_BLOCK = 1024


@triton.jit
def layer_of(layer_code):
    """See `inlining.layer_code`."""
    return (layer_code - 3) // 2


@triton.jit(do_not_specialize=["layer_code", "capacity", "new_tokens"])
def write_rows(
    key, value, key_scale, value_scale, pool, scales, table, length, layer_code, capacity, new_tokens,
    key_b, key_h, key_t, key_d, value_b, value_h, value_t, value_d,
    GROUPS: tl.constexpr, SLOT_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """K and V of one KV head: grid (B * Hkv, blocks of TOKENS tokens). Scales: `[B, Hkv, T]` contiguous, or None."""
    KV_HEADS: tl.constexpr = GROUPS * SLOT_HEADS
    sequence = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, DIM)
    is_token = token < new_tokens
    layer = layer_of(layer_code)
    position = tl.load(length + layer) + token
    list_row = (layer * (tl.num_programs(0) // KV_HEADS) + sequence) * GROUPS + head // SLOT_HEADS
    slot = tl.load(table + list_row * capacity + position, mask=is_token & (position < capacity), other=-1).to(tl.int64)
    is_token &= slot >= 0
    mask = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    at = token.to(tl.int64)[:, None]
    k = tl.load(key + sequence * key_b + head * key_h + at * key_t + dim[None, :] * key_d, mask=mask)
    v = tl.load(value + sequence * value_b + head * value_h + at * value_t + dim[None, :] * value_d, mask=mask)
    key_row = slot * (2 * SLOT_HEADS) + head % SLOT_HEADS
    to = pool + key_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(to, k.to(pool.dtype.element_ty), mask=mask)
    tl.store(to + SLOT_HEADS * HEAD_DIM, v.to(pool.dtype.element_ty), mask=mask)
    if scales is not None:
        row = tl.program_id(0).to(tl.int64) * new_tokens + token
        tl.store(scales + key_row, tl.load(key_scale + row, mask=is_token), mask=is_token)
        tl.store(scales + key_row + SLOT_HEADS, tl.load(value_scale + row, mask=is_token), mask=is_token)


@triton.jit(do_not_specialize=["layer_code", "capacity", "new_tokens", "columns"])
def restate_padding(
    valid, padding_mask, length, layer_code, capacity, new_tokens, columns, mask_b, mask_c, BLOCK: tl.constexpr
):
    """The validity bits of everything stored: grid (blocks of columns, B). valid: `[B, C]` bool."""
    sequence = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = column < tl.minimum(tl.load(length + layer_of(layer_code)) + new_tokens, columns)
    given = tl.load(padding_mask + sequence * mask_b + column * mask_c, mask=kept, other=0)
    tl.store(valid + sequence * capacity + column, (given != 0).to(tl.int8), mask=kept)


def kv_append(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    layer: int,
) -> None:
    """See `reference.kv_append`."""
    batch_size, kv_heads, new_tokens, head_dim = key.shape
    _, _, groups, capacity = table.shape
    require(
        pool.is_contiguous() and table.is_contiguous() and valid.is_contiguous(), "a tensor of the store is strided"
    )
    # One token's K and V are contiguous as models lay them out; a graph's longer blocks have strides that may change.
    require(new_tokens == 1 or not is_tracing(), "a block of several tokens is one call in a graph")
    if new_tokens == 1:
        key, value = key.contiguous(), value.contiguous()
    dim = triton.next_power_of_2(head_dim)
    tokens = 1 if new_tokens == 1 else max(1, _TILE // dim)
    is_int8 = scales is not None and key_scale is not None and value_scale is not None
    if new_tokens:
        traceable(write_rows)[batch_size * kv_heads, triton.cdiv(new_tokens, tokens)](
            key, value,
            key_scale.contiguous() if is_int8 and key_scale is not None else None,
            value_scale.contiguous() if is_int8 and value_scale is not None else None,
            pool, scales if is_int8 else None, table, length, layer_code(layer), capacity, new_tokens,
            *key.stride(), *value.stride(),
            GROUPS=groups, SLOT_HEADS=kv_heads // groups, HEAD_DIM=head_dim, DIM=dim, TOKENS=tokens,
        )  # fmt: skip
    if padding_mask is not None and padding_mask.shape[1]:
        columns = torch.sym_min(capacity, padding_mask.shape[1])
        traceable(restate_padding)[triton.cdiv(columns, _MASK_BLOCK), batch_size](
            valid, padding_mask, length, layer_code(layer), capacity, new_tokens, columns, *padding_mask.stride(),
            BLOCK=_MASK_BLOCK,
        )  # fmt: skip
    length[layer].add_(new_tokens)  # after both have read it
