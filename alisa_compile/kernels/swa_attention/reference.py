from __future__ import annotations

import torch
import torch.nn.functional as F

from ..capped_attention import capped_attention, soft_capped
from ..kv_read.reference import read_rows


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Attention mass is kept in float32, or in float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """Attention of one new token per sequence over its working set (ALISA, Algorithm 1, lines 5 to 8).

    query: `[B, Hq, 1, D]`; pool, scales, table, length: as in `kv_append`, after this token's append. valid: `[B, C]`
    or None when no sequence is padded. rows: `[L, B, G, W]` int32 positions in ascending order and counts: `[L, B, G]`
    int32, how many of them count; a count of -1 stands for every valid position (a refresh step), and rows None for a
    store that never selects. A layer's counts are all -1 or none is. soft_cap: see `soft_capped`; 0 = none.

    Returns the attention output `[B, Hq, 1, D]` and the mass `[B, G, C]`: entry i is the attention that the i-th
    attended row received, summed over the group's query heads; entries past the count are undefined. Without rows
    the mass is `[B, G, 0]`. The reduction runs over rows in order of position, never of slot.
    """
    tokens = int(length[layer])
    if rows is None or counts is None:
        return _dense(query, pool, scales, table, valid, layer, tokens, scale, soft_cap)
    count = counts[layer]
    if bool((count < 0).any()):
        positions = None
        slots = table[layer, :, :, :tokens]
        attends = None if valid is None else valid[:, None, :tokens].expand_as(slots)
    else:
        positions = rows[layer, :, :, : int(count.max())].long()
        attends = torch.arange(positions.shape[-1], device=query.device) < count.unsqueeze(-1)
        # Entries past the count may name rows never written, and a weight of 0 does not hide a NaN.
        positions = positions.masked_fill(~attends, tokens - 1)
        slots = table[layer].gather(-1, positions)
    key, value = read_rows(pool, scales, slots, query.dtype)
    return attend_to_rows(query, key, value, attends, table.shape[2], table.shape[3], scale, soft_cap)


def attend_to_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attends: torch.Tensor | None,
    groups: int,
    capacity: int,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `[B, Hq, 1, D]` to the rows `[B, Hkv, W, D]` that `attends [B, G, W]`, and the mass of each."""
    batch_size, query_heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(batch_size, kv_heads, query_heads // kv_heads, head_dim)
    logits = (packed @ key.transpose(-1, -2)).to(score_dtype(query.dtype)) * scale
    logits = soft_capped(logits, soft_cap)
    if attends is not None:
        per_head = attends.repeat_interleave(kv_heads // groups, dim=1)
        logits = logits.masked_fill(~per_head.unsqueeze(2), float("-inf"))
    weights = logits.softmax(-1)
    out = weights.to(query.dtype) @ value
    mass = weights.new_zeros(batch_size, groups, capacity)
    mass[..., : key.shape[2]] = weights.reshape(batch_size, groups, -1, key.shape[2]).sum(2)
    return out.reshape(query.shape), mass


def _dense(
    query: torch.Tensor,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    valid: torch.Tensor | None,
    layer: int,
    tokens: int,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All valid rows. Query heads that share a KV head become query rows: torch's `enable_gqa` would copy K and V."""
    batch_size, query_heads, _, head_dim = query.shape
    key, value = read_rows(pool, scales, table[layer, :, :, :tokens], query.dtype)
    packed = query.reshape(batch_size, key.shape[1], query_heads // key.shape[1], head_dim)
    mask = None if valid is None else valid[:, None, None, :tokens]
    if soft_cap:
        out = capped_attention(packed, key, value, mask, scale=scale, soft_cap=soft_cap)
    else:
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return out.reshape(query.shape), query.new_empty((batch_size, table.shape[2], 0), dtype=score_dtype(query.dtype))
