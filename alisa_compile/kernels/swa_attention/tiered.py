from __future__ import annotations

import torch

from ..kv_read.reference import load_rows, read_rows
from ..streaming import decode_in_blocks
from ..tiers import ROWS_MISSED, state_of
from .reference import attend_to_rows, score_dtype


def swa_attention_tiered(
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
    ticket: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`swa_attention` of a store whose rows do not all fit the device.

    A working set is on the device, as `kv_prefetch` has seen to, and so the plain op serves; rows that it missed are
    fetched here. Where all positions are attended, those below the device stream through it in blocks. The native
    kernel streams tile by tile and gives the plain kernel's bits; it leaves out rows of padding, which are fetched and
    counted here. ticket: see `kernels/tiers.py`.
    """
    state = state_of(ticket)
    plain = (query, pool, scales, table, length, valid, rows, counts, layer, scale)
    sparse = rows is not None and counts is not None and int(counts[layer].min()) >= 0
    missed = int(state.misses[layer]) if sparse else 0
    if (sparse and missed == 0) or (not sparse and int(state.below[layer]) == 0):
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.alisa.swa_attention.default(*plain)
        return result
    tokens = int(length[layer])
    if sparse:
        assert rows is not None and counts is not None
        state.traffic[ROWS_MISSED] += missed
        count = counts[layer]
        positions = rows[layer, :, :, : int(count.max())].long()
        attends = torch.arange(positions.shape[-1], device=query.device) < count.unsqueeze(-1)
        positions = positions.masked_fill(~attends, tokens - 1)
        key, value = load_rows(state, pool, scales, table, layer, positions, query.dtype)
        return attend_to_rows(query, key, value, attends, table.shape[2], table.shape[3], scale)
    out, weights = decode_in_blocks(
        query,
        lambda first, end: read_rows(*state.stage(pool, scales, table, layer, first, end), query.dtype),
        state.blocks(tokens, tokens),
        None if valid is None else valid[:, :tokens],
        scale,
        score_dtype(query.dtype),
    )
    groups = table.shape[2]
    mass = weights.new_zeros(query.shape[0], groups, 0 if rows is None else table.shape[3])
    if rows is not None:
        mass[..., :tokens] = weights.reshape(query.shape[0], groups, -1, tokens).sum(2)
    return out, mass
