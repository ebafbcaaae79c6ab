from __future__ import annotations

import torch

from ..kv_read.reference import read_rows
from ..prefill_attention.reference import blockwise_attention, last_rows_mass
from ..selection import decode_spec


def extend_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    layer: int,
    spec: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of T new tokens over everything stored, at any sparsity: a block of tokens is always dense.

    query: `[B, Hq, T, D]`; the rest as in `swa_attention`, after the append of these T tokens. Returns the output
    `[B, Hq, T, D]` and the mass `[B, G, R, C]` of the last R = `spec.seed_rows(T, C)` valid new tokens, as
    `prefill_attention` does; columns past the length are zero.
    """
    _, batch_size, groups, capacity = table.shape
    tokens = int(length[layer])
    start = tokens - query.shape[2]
    key, value = read_rows(pool, scales, table[layer, :, :, :tokens], query.dtype)
    own = None if valid is None else valid[:, :tokens]
    out = blockwise_attention(query, key, value, own, query_start=start, scale=scale)
    seed_rows = int(decode_spec(spec).seed_rows(query.shape[2], capacity)) if spec else 0
    recent = last_rows_mass(query, key, own, groups, seed_rows, query_start=start, scale=scale)
    mass = recent.new_zeros(batch_size, groups, seed_rows, capacity)
    mass[..., :tokens] = recent
    return out, mass
