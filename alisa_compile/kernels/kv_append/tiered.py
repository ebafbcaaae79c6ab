from __future__ import annotations

import torch

from ..tiers import TierState, drain, first_recent, state_of
from .reference import rows_of


def kv_append_tiered(
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
    spec: str,
    ticket: torch.Tensor,
) -> None:
    """`kv_append` of a block of any length to a store whose rows do not all fit the device.

    Rows that are not among the most recent after the block go below the device: those that were on the device, then
    those of the block itself, which never take a device slot. spec and ticket: as in `kv_offload`. The others take free
    slots, then slots of rows that are below.
    """
    groups, new_tokens = table.shape[2], key.shape[2]
    shape = (key.shape[0], groups, new_tokens)
    rows = rows_of(key, value, groups, pool.dtype)
    row_scales = None
    if scales is not None and key_scale is not None and value_scale is not None:
        row_scales = rows_of(key_scale, value_scale, groups, scales.dtype).view(*shape, *scales.shape[1:])
    state = state_of(ticket)
    start = int(length[layer]) if state.engine is None else state.engine.tokens - new_tokens
    place_rows(state, pool, scales, table, layer, start, rows.view(*shape, *pool.shape[1:]), row_scales, spec)
    end = start + new_tokens
    if padding_mask is not None:
        valid[:, :end] = padding_mask[:, :end] != 0
    length[layer] = end


def place_rows(
    state: TierState,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    layer: int,
    start: int,
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    spec: str,
) -> None:
    """Put the rows `[B, G, T, 2, P, D]`, scales `[B, G, T, 2, P]`, of the positions from `start` on in their tiers."""
    end, below = start + rows.shape[2], int(state.below[layer])
    first = max(below, first_recent(end, state.quota, spec, state.max_rows))
    if state.engine is not None:
        state.engine.place(state, pool, scales, table, layer, start, rows, row_scales, first)
        return
    drain(state)
    if below < min(first, start):
        slots = table[layer, :, :, below : min(first, start)].long()
        state.down(layer, pool[slots], None if scales is None else scales[slots])
    kept = max(start, first)
    if start < kept:
        own = None if row_scales is None else row_scales[:, :, : kept - start]
        state.down(layer, rows[:, :, : kept - start], own)
    for sequence, regions in enumerate(state.regions(layer).tolist()):
        for group, region in enumerate(regions):
            place, owner = table[layer, sequence, group], state.owner[region * state.quota : (region + 1) * state.quota]
            if kept > start and int(place[start]) >= 0:  # kept for a next token, which goes below instead
                owner[int(place[start]) - region * state.quota] = -1
                place[start] = -1
            _make_room(place, owner, region * state.quota, kept, end, first)
    slots = table[layer, :, :, kept:end].long()
    pool[slots] = rows[:, :, kept - start :]
    if scales is not None and row_scales is not None:
        scales[slots] = row_scales[:, :, kept - start :]


def _make_room(place: torch.Tensor, own: torch.Tensor, base: int, start: int, end: int, below: int) -> None:
    """Give the positions [start, end) slots of one quota: free ones first, then those of rows that are below."""
    wanted = torch.arange(start, end)[place[start:end].cpu() < 0]  # a slot may have been kept for the first of them
    free = (own < 0).nonzero().flatten()
    spare = ((own >= 0) & (own < below)).nonzero().flatten()
    slots = torch.cat((free, spare))[: len(wanted)]
    left = own[slots].long()
    place[left[left >= 0]] = -1
    own[slots] = wanted.to(own.dtype)
    place[wanted] = (slots + base).to(place.dtype)
