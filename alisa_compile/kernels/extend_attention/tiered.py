from __future__ import annotations

import torch

from ..kv_read.reference import load_rows, read_rows
from ..selection import decode_spec
from ..streaming import attend_in_blocks, mass_in_blocks
from ..swa_attention.reference import score_dtype
from ..tiers import state_of
from .reference import attend_sparsely, extend_attention, working_history


def extend_attention_tiered(
    query: torch.Tensor,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    layer: int,
    spec: str,
    scale: float,
    ticket: torch.Tensor,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`extend_attention` of a store whose rows do not all fit the device: those below stream through it in blocks.

    ticket: see `kernels/tiers.py`.
    """
    state = state_of(ticket)
    if int(state.below[layer]) == 0:
        return extend_attention(query, pool, scales, table, length, valid, rows, counts, layer, spec, scale, soft_cap)
    groups, capacity = table.shape[2:]
    new_tokens, tokens = query.shape[2], int(length[layer])
    start = tokens - new_tokens
    policy = decode_spec(spec) if spec else None
    seed_rows = int(policy.seed_rows(new_tokens, capacity)) if policy else 0
    own = None if valid is None else valid[:, :tokens]
    chosen = working_history(rows, counts, layer, new_tokens)
    if policy is not None and chosen is not None:

        def fetch(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return load_rows(state, pool, scales, table, layer, positions, query.dtype)

        return attend_sparsely(query, fetch, capacity, own, *chosen, start, seed_rows, policy, scale, soft_cap)

    def read(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return read_rows(*state.stage(pool, scales, table, layer, first, end), query.dtype)

    blocks = state.blocks(tokens, start)
    out, lse = attend_in_blocks(query, read, blocks, own, start, scale, score_dtype(query.dtype), soft_cap)
    mass = lse.new_zeros(query.shape[0], groups, seed_rows, capacity)
    if policy is not None and seed_rows:
        mass[..., :tokens] = mass_in_blocks(
            query, lse, read, blocks, own, start, groups, seed_rows, scale, soft_cap, total=policy.rank == "sum"
        )
    return out, mass
