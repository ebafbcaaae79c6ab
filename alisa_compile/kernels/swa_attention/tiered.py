from __future__ import annotations

import torch

from ..kv_read.reference import load_rows, read_rows
from ..streaming import decode_in_blocks
from ..tiers import ROWS_MISSED, TierState, engine_of, state_of
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
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`swa_attention` of a store whose rows do not all fit the device.

    A working set is on the device, as `kv_prefetch` has seen to, and so the plain op serves; rows that it missed are
    fetched here. Where all positions are attended, those below the device stream through it in blocks. The native
    kernel streams tile by tile and gives the plain kernel's bits; it leaves out rows of padding, which are fetched and
    counted here. ticket: see `kernels/tiers.py`.
    """
    state = state_of(ticket)
    plain = (query, pool, scales, table, length, valid, rows, counts, layer, scale, soft_cap)
    if state.engine is not None:
        sparse = rows is not None and not state.engine.dense[layer]
        # Whether rows were missed, only the device knows. Without padding a working set that fits has its slots.
        complete = sparse and rows is not None and valid is None and rows.shape[3] <= state.quota
    else:
        sparse = rows is not None and counts is not None and int(counts[layer].min()) >= 0
        complete = sparse and int(state.misses[layer]) == 0
    if complete or (not sparse and int(state.below[layer]) == 0):
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.alisa.swa_attention.default(*plain)
        return result
    if sparse and state.engine is not None:
        assert rows is not None and counts is not None
        return _attend_to_packed(query, pool, scales, table, rows, counts, layer, scale, soft_cap, state)
    tokens = int(length[layer]) if state.engine is None else state.engine.tokens
    if sparse:
        assert rows is not None and counts is not None
        state.traffic[ROWS_MISSED] += int(state.misses[layer])
        count = counts[layer]
        positions = rows[layer, :, :, : int(count.max())].long()
        attends = torch.arange(positions.shape[-1], device=query.device) < count.unsqueeze(-1)
        positions = positions.masked_fill(~attends, tokens - 1)
        key, value = load_rows(state, pool, scales, table, layer, positions, query.dtype)
        return attend_to_rows(query, key, value, attends, table.shape[2], table.shape[3], scale, soft_cap)
    out, weights = decode_in_blocks(
        query,
        lambda first, end: read_rows(*state.stage(pool, scales, table, layer, first, end), query.dtype),
        state.blocks(tokens, tokens),
        None if valid is None else valid[:, :tokens],
        scale,
        score_dtype(query.dtype),
        soft_cap,
    )
    groups = table.shape[2]
    mass = weights.new_zeros(query.shape[0], groups, 0 if rows is None else table.shape[3])
    if rows is not None:
        mass[..., :tokens] = weights.reshape(query.shape[0], groups, -1, tokens).sum(2)
    return out, mass


def _attend_to_packed(
    query: torch.Tensor,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    scale: float,
    soft_cap: float,
    state: TierState,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain op over a copy of the working set in which slots are places in it: none is missing there."""
    _, batch_size, groups, width = rows.shape
    packed, packed_scales = engine_of(state).working_set(state, pool, scales, table, rows, counts, layer)
    slots = torch.arange(batch_size * groups * width, dtype=torch.int32, device=query.device)
    places = slots.view(1, batch_size, groups, width) % width
    one = torch.ones(1, dtype=torch.int64, device=query.device)  # entries past a count stand for the first row
    out, received = torch.ops.alisa.swa_attention.default(
        query, packed, packed_scales, slots.view(1, batch_size, groups, width), one, None, places,
        counts[layer : layer + 1], 0, scale, soft_cap,
    )  # fmt: skip
    mass = received.new_zeros(batch_size, groups, table.shape[3])
    mass[..., :width] = received
    return out, mass
