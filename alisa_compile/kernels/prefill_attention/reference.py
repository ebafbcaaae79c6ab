from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..capped_attention import capped_attention, soft_capped
from ..selection import decode_spec, last_queries
from ..swa_attention.reference import score_dtype

_MASK_ELEMENTS = 1 << 22  # bounds the mask of a block of query rows; no S x S buffer exists
_BLOCK_ROWS = 256  # a block sees the keys up to its own end: short blocks waste little above the diagonal
_MASS_ELEMENTS = 1 << 20  # logits of a block of last rows: several passes go over them, so they should stay cached


def prefill_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    groups: int,
    seed_rows: int,
    start: int,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """`last_rows_mass` of queries that begin at position `start`, not summed over rows."""
    return last_rows_mass(query, key, valid, groups, seed_rows, query_start=start, scale=scale, soft_cap=soft_cap)


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding_mask: torch.Tensor | None,
    groups: int,
    spec: str,
    scale: float,
    soft_cap: float = 0.0,
    *,
    mass_of: Callable[..., torch.Tensor] = prefill_mass,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention without history.

    query: `[B, Hq, S, D]`, key, value: `[B, Hkv, S, D]`, padding_mask: `[B, S]` nonzero = real token, or None. A query
    row before which there is no real token attends to itself alone, so nothing is ever NaN. groups: head groups with
    one index set each. spec: an encoded `SelectionSpec`, or "" for no mass. soft_cap: see `soft_capped`; 0 = none.

    Returns the output `[B, Hq, S, D]` and the mass `[B, groups, R, S]`, R = `spec.seed_rows(S)`: the attention rows of
    each sequence's last R valid tokens, oldest first, summed over the group's query heads. A sequence with fewer
    valid tokens has zeros in its oldest rows. For a spec of rank `sum` it is one row, the sum over all valid tokens.
    mass_of: what computes rows that are not summed: `prefill_mass`, or an op of its kind.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)  # autocast mixes them
    valid = None if padding_mask is None else padding_mask[:, : key.shape[2]] != 0
    if valid is None and not soft_cap:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        # As the shape function promises: torch may follow the strides of the query, and autocast change the dtype.
        out = out.to(query.dtype).contiguous()
    else:
        out = blockwise_attention(query, key, value, valid, query_start=0, scale=scale, soft_cap=soft_cap)
    policy = decode_spec(spec) if spec else None
    seed_rows = int(policy.seed_rows(query.shape[2])) if policy else 0
    if policy is not None and policy.rank == "sum":
        total = last_rows_mass(
            query, key, valid, groups, seed_rows, query_start=0, scale=scale, soft_cap=soft_cap, total=True
        )
        return out, total
    return out, mass_of(query, key, valid, groups, seed_rows, 0, scale, soft_cap)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    query_start: int,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """Causal attention over blocks of query rows: query row i stands at position `query_start + i`.

    valid: `[B, Skv]` bool or None. A query row before which there is no valid key attends to itself alone. Returns
    `[B, Hq, S, D]`.
    """
    batch_size, query_heads, query_length, _ = query.shape
    kv_length = key.shape[2]
    columns = torch.arange(kv_length, device=query.device)
    heads_at_once = query_heads if soft_cap else 1  # torch's attention keeps no scores
    block = max(1, min(_BLOCK_ROWS, _MASK_ELEMENTS // (batch_size * heads_at_once * kv_length)))
    out = query.new_empty(query.shape)
    alone = None if valid is None else valid.long().cumsum(-1) == 0  # padding with no real token before it
    for start in range(0, query_length, block):
        end = query_start + min(start + block, query_length)
        positions = torch.arange(query_start + start, end, device=query.device)
        mask = (columns[:end] <= positions[:, None])[None, None]
        if valid is not None and alone is not None:
            itself = (columns[:end] == positions[:, None]) & alone[:, None, positions, None]
            mask = (mask & valid[:, None, None, :end]) | itself
        rows, keys, values = query[:, :, start : start + block], key[:, :, :end], value[:, :, :end]
        if soft_cap:
            attended = capped_attention(rows, keys, values, mask, scale=scale, soft_cap=soft_cap)
        else:
            grouped = query_heads != key.shape[1]
            attended = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale, enable_gqa=grouped)
        out[:, :, start : start + block] = attended
    return out


def last_rows_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    groups: int,
    seed_rows: int,
    *,
    query_start: int,
    scale: float,
    soft_cap: float = 0.0,
    total: bool = False,
) -> torch.Tensor:
    """Attention rows of the last `seed_rows` valid queries, summed over heads: `[B, groups, seed_rows, Skv]`.

    total: instead one row, the sum over all queries.
    """
    batch_size, query_heads, query_length, head_dim = query.shape
    kv_heads, kv_length = key.shape[1], key.shape[2]
    dtype = score_dtype(query.dtype)
    mass = torch.zeros((batch_size, groups, 1 if total else seed_rows, kv_length), dtype=dtype, device=query.device)
    if total:
        seed_rows = query_length
    chosen, real = last_queries(query, valid, query_start, seed_rows)
    columns = torch.arange(kv_length, device=query.device)
    block = max(1, _MASS_ELEMENTS // (batch_size * query_heads * kv_length))
    for start in range(0, seed_rows, block):
        index = chosen[:, start : start + block]
        count = index.shape[1]
        queries = query.gather(2, index[:, None, :, None].expand(-1, query_heads, -1, head_dim))
        packed = queries.reshape(batch_size, kv_heads, -1, head_dim)  # [B, Hkv, Hq / Hkv * count, D]
        logits = (packed @ key.transpose(-1, -2)).to(dtype).mul_(scale)
        logits = soft_capped(logits, soft_cap).reshape(batch_size, query_heads, count, kv_length)
        positions = index + query_start
        attends = columns <= positions[..., None]
        if valid is not None:
            attends = (attends & valid[:, None, :]) | (columns == positions[..., None])
        weights = logits.masked_fill_(~attends[:, None], float("-inf")).softmax(-1)
        if real is not None:
            weights = weights * real[:, None, start : start + block, None]
        rows = weights.reshape(batch_size, groups, -1, count, kv_length).sum(2)
        if total:
            mass += rows.sum(2, keepdim=True)
        else:
            mass[:, :, start : start + block] = rows
    return mass
