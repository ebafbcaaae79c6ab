from __future__ import annotations

from collections.abc import Callable

import torch

from ..capped_attention import soft_capped
from ..kv_read.reference import read_rows
from ..prefill_attention.reference import blockwise_attention, last_rows_mass
from ..selection import SPARSE_BLOCK, SelectionSpec, decode_spec
from ..swa_attention.reference import score_dtype


def extend_attention(
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
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of T new tokens on a history.

    At most `SPARSE_BLOCK` new tokens attend to the working set that was chosen for the first of them, and causally to
    each other. More attend to everything stored, and so do few where a refresh is due (a count of -1).

    query: `[B, Hq, T, D]`; the rest as in `swa_attention`, after the append of these T tokens. Returns the output
    `[B, Hq, T, D]` and the mass `[B, G, R, C]` of the last R = `spec.seed_rows(T, C)` valid new tokens, as
    `prefill_attention` does; columns past the length and rows not attended are zero.
    """
    groups, capacity = table.shape[2:]
    new_tokens, tokens = query.shape[2], int(length[layer])
    start = tokens - new_tokens
    policy = decode_spec(spec) if spec else None
    seed_rows = int(policy.seed_rows(new_tokens, capacity)) if policy else 0
    own = None if valid is None else valid[:, :tokens]
    chosen = working_history(rows, counts, layer, new_tokens)
    if policy is not None and chosen is not None:

        def read(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return read_rows(pool, scales, table[layer].gather(-1, positions), query.dtype)

        return attend_sparsely(query, read, capacity, own, *chosen, start, seed_rows, policy, scale, soft_cap)
    key, value = read_rows(pool, scales, table[layer, :, :, :tokens], query.dtype)
    out = blockwise_attention(query, key, value, own, query_start=start, scale=scale, soft_cap=soft_cap)
    total = policy is not None and policy.rank == "sum"
    recent = last_rows_mass(
        query, key, own, groups, seed_rows, query_start=start, scale=scale, soft_cap=soft_cap, total=total
    )
    mass = recent.new_zeros(*recent.shape[:3], capacity)
    mass[..., :tokens] = recent
    return out, mass


def working_history(
    rows: torch.Tensor | None, counts: torch.Tensor | None, layer: int, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Positions `[B, G, W]` before a block that it attends to, and which of them count; None = all."""
    if rows is None or counts is None or new_tokens > SPARSE_BLOCK or bool((counts[layer] < 0).any()):
        return None
    count = counts[layer]
    history = rows[layer, :, :, : int(count.max()) - 1].long()  # its last row is the first new token itself
    return history, torch.arange(history.shape[-1], device=rows.device) < (count - 1).unsqueeze(-1)


def attend_sparsely(
    query: torch.Tensor,
    read: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    capacity: int,
    valid: torch.Tensor | None,
    history: torch.Tensor,
    kept: torch.Tensor,
    start: int,
    seed_rows: int,
    policy: SelectionSpec,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and mass of a block that attends to a working set.

    history: `[B, G, W]` positions before `start`, of which those `kept` count; all in order of position. read: K and V
    `[B, Hkv, W, D]` of positions `[B, G, W]`.
    """
    batch_size, _, new_tokens, head_dim = query.shape
    groups = history.shape[1]
    block = torch.arange(start, start + new_tokens, device=query.device)
    # Entries past the count may name rows never written, and a weight of 0 does not hide a NaN.
    history = history.masked_fill(~kept, start)
    positions = torch.cat((history, block.expand(batch_size, groups, -1)), dim=-1)
    key, value = read(positions)
    kv_heads = key.shape[1]
    causal = block[:, None] >= block  # [T, T]
    within = causal.expand(batch_size, 1, -1, -1)
    if valid is not None:
        # A query row with nothing to attend to attends to itself.
        alone = (valid[:, None, start:].long().cumsum(-1) == 0) & ~kept.any(-1, keepdim=True)
        itself = torch.eye(new_tokens, dtype=torch.bool, device=query.device) & alone.unsqueeze(-1)
        within = (within & valid[:, None, None, start:]) | itself
    attends = torch.cat(
        (kept[:, :, None].expand(-1, -1, new_tokens, -1), within.expand(-1, groups, -1, -1)), dim=-1
    )  # [B, G, T, W + T]
    packed = query.reshape(batch_size, kv_heads, -1, head_dim)
    logits = (packed @ key.transpose(-1, -2)).to(score_dtype(query.dtype)) * scale
    logits = soft_capped(logits, soft_cap).reshape(batch_size, groups, -1, new_tokens, positions.shape[-1])
    weights = logits.masked_fill(~attends[:, :, None], float("-inf")).softmax(-1)
    out = weights.to(query.dtype).reshape(batch_size, kv_heads, -1, positions.shape[-1]) @ value
    received = weights.sum(2)  # [B, G, T, W + T]
    if valid is not None:
        received = received * valid[:, None, start:, None]
        # The seeds are the last valid rows, so invalid ones go first.
        order = valid[:, start:].to(torch.int8).argsort(dim=-1, stable=True)[:, None, :, None]
        received = received.gather(2, order.expand_as(received))
    received = received.sum(2, keepdim=True) if policy.rank == "sum" else received[:, :, new_tokens - seed_rows :]
    mass = received.new_zeros(batch_size, groups, seed_rows, capacity)
    # Entries that do not count name position `start` again, hence scatter_add of their zeros.
    mass.scatter_add_(-1, positions[:, :, None].expand_as(received), received)
    return out.reshape(query.shape), mass
