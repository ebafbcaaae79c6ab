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
    value_scale: `[B, G * P, T]`. padding_mask: `[B, length + T]`, nonzero = a real token; only columns of new tokens
    are read when T is 1, all of them otherwise, so that a turn may re-state the mask of its history. None leaves
    `valid` alone. The caller makes sure that `length + T <= C`.
    """
    batch_size, _, new_tokens, head_dim = key.shape
    groups, heads = table.shape[2], pool.shape[2]
    start = int(length[layer])
    end = start + new_tokens
    slots = table[layer, :, :, start:end].long()
    shape = (batch_size, groups, heads, new_tokens, head_dim)
    pool[slots, 0] = key.reshape(shape).transpose(2, 3).to(pool.dtype)
    pool[slots, 1] = value.reshape(shape).transpose(2, 3).to(pool.dtype)
    if scales is not None and key_scale is not None and value_scale is not None:
        scales[slots, 0] = key_scale.reshape(shape[:-1]).transpose(2, 3)
        scales[slots, 1] = value_scale.reshape(shape[:-1]).transpose(2, 3)
    if padding_mask is not None:
        first = start if new_tokens == 1 else 0
        valid[:, first:end] = padding_mask[:, first:end] != 0
    length[layer] = end
