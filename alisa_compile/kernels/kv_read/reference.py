from __future__ import annotations

from typing import Any

import torch

from ..quantize_row import dequantize_row
from ..tiers import TierState, state_of


def read_rows(
    pool: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the given slots: slots `[B, G, T]` to two `[B, G * P, T, D]` tensors of `dtype`."""
    batch_size, groups, tokens = slots.shape
    heads, head_dim = pool.shape[2], pool.shape[3]
    index = slots.reshape(-1)
    taken = pool.index_select(0, index)
    rows = taken.to(dtype) if scales is None else dequantize_row(taken, scales.index_select(0, index), dtype)
    rows = rows.view(batch_size, groups, tokens, 2, heads, head_dim).permute(3, 0, 1, 4, 2, 5)
    key, value = rows.reshape(2, batch_size, groups * heads, tokens, head_dim).unbind(0)
    return key, value


def load_rows(
    state: TierState,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    layer: int,
    positions: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of `positions [B, G, T]` on whatever tier they are: two `[B, G * P, T, D]` tensors of `dtype`."""
    rows, row_scales = state.load(pool, scales, table, layer, positions)
    slots = torch.arange(positions.numel(), device=positions.device).view_as(positions)
    return read_rows(rows, row_scales, slots, dtype)


def kv_read(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor,
    scores: torch.Tensor | None,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    origin: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    stage: str,
    spec: str,
    padded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K and V of a layer, two `[B, G * P, T, D]` tensors in the dtype of `key`.

    stage `prefill` (no history): the T new rows as they came, before quantisation. `decode` and `extend`: all C
    positions; those not written yet are zero and masked by the caller. Shapes of the rest as in `kv_append` and
    `kv_select`; `valid`, `scores`, `rows`, `counts`, `origin`, `spec` and `padded` only ride along for the rewrite.
    """
    if stage == "prefill":
        return _own_contiguous(key), _own_contiguous(value)
    keys, values = read_rows(pool, scales, table[layer], key.dtype)
    return _own_contiguous(keys), _own_contiguous(values)


def _own_contiguous(states: torch.Tensor) -> torch.Tensor:
    """Laid out as the shape function promises, and sharing memory with no input and no other result."""
    return states.clone(memory_format=torch.contiguous_format)


def kv_read_tiered(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor,
    scores: torch.Tensor | None,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    origin: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    stage: str,
    spec: str,
    padded: bool,
    ticket: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kv_read` of a store whose rows do not all fit the device: all K and V at once, as activations.

    Only attention that was left dense uses the result. ticket: see `kernels/tiers.py`.
    """
    if stage == "prefill":
        return _own_contiguous(key), _own_contiguous(value)
    state, tokens, capacity = state_of(ticket), int(length[layer]), table.shape[3]
    keys = key.new_zeros((*key.shape[:2], capacity, key.shape[3]))
    values = torch.zeros_like(keys)
    for first, end in state.blocks(tokens, tokens):
        staged, staged_scales, slots = state.stage(pool, scales, table, layer, first, end)
        keys[:, :, first:end], values[:, :, first:end] = read_rows(staged, staged_scales, slots, key.dtype)
    return keys, values


def kv_read_recomputing(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`kv_read.tiered` of a store that deletes rows. The last argument, its `hidden_size`, only rides along."""
    return kv_read_tiered(*arguments[:-1])
