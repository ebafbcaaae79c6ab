from __future__ import annotations

import torch


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
    """Write T new tokens of one layer.

    pool: `[N, 2, P, D]` (K then V), scales: `[N, 2, P]` float32 or None, table: `[L, B, G, C]` int32 slot of each
    position, length: `[L]` int64, valid: `[B, C]` bool. key, value: `[B, G * P, T, D]` in the pool's dtype, key_scale,
    value_scale: `[B, G * P, T]`. padding_mask: `[B, length + T]`, nonzero = a real token; all columns are read, so that
    any forward pass may re-state the mask of its history. None leaves `valid` alone. The caller makes sure that
    `length + T <= C`.
    """
    new_tokens = key.shape[2]
    start = int(length[layer])
    end = start + new_tokens
    slots = table[layer, :, :, start:end].reshape(-1).long()
    pool.index_copy_(0, slots, rows_of(key, value, table.shape[2], pool.dtype))
    if scales is not None and key_scale is not None and value_scale is not None:
        scales.index_copy_(0, slots, rows_of(key_scale, value_scale, table.shape[2], scales.dtype))
    if padding_mask is not None:
        valid[:, :end] = padding_mask[:, :end] != 0
    length[layer] = end


def rows_of(key: torch.Tensor, value: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """`[B, G * P, T, ...]` K and V as slots in the order of `table`: `[B * G * T, 2, P, ...]`."""
    both = torch.stack((key, value), dim=1).to(dtype)
    batch_size, _, kv_heads, new_tokens = both.shape[:4]
    split = both.reshape(batch_size, 2, groups, kv_heads // groups, new_tokens, *both.shape[4:])
    ordered = split.permute(0, 2, 4, 1, 3, *range(5, split.dim()))
    return ordered.reshape(-1, 2, kv_heads // groups, *both.shape[4:])
