from __future__ import annotations

import torch

from ..tiers import drain, state_of


def kv_prefetch(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    ticket: torch.Tensor,
    layer: int,
) -> None:
    """Start to fetch the rows of the coming step's working set that are not on the device; only the difference moves.

    pool, scales, table, length, rows, counts: as in `swa_attention`, after `kv_select`. ticket: see `kernels/tiers.py`.
    Entering rows take free slots, then slots of rows that are below the device and not in the working set, each in
    order of slot; one more slot is kept for the coming token, in the last resort one of the working set. Rows for which
    slots are too few stay below, and count as misses.
    """
    state = state_of(ticket)
    drain(state)
    capacity, tokens, below = table.shape[3], int(length[layer]), int(state.below[layer])
    missed = 0
    entered: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    places: list[torch.Tensor] = []
    for sequence, regions in enumerate(state.regions(layer).tolist()):
        for group, region in enumerate(regions):
            place = table[layer, sequence, group]
            owner = state.owner[region * state.quota : (region + 1) * state.quota]
            count = -1 if counts is None else int(counts[layer, sequence, group])
            wanted = torch.zeros(capacity, dtype=torch.bool)
            if rows is not None and count >= 0:
                chosen = rows[layer, sequence, group, :count].long()
                wanted[chosen[chosen < tokens]] = True
            reserve = int(tokens < capacity and int(place[tokens]) < 0)
            entering = (wanted[:tokens] & (place[:tokens] < 0)).nonzero().flatten()
            free = (owner < 0).nonzero().flatten()
            cached = (owner >= 0) & (owner < below)
            unwanted = cached & ~wanted[owner.long().clamp_min(0)]
            spare = torch.cat((free, unwanted.nonzero().flatten()))
            fit = max(0, min(len(entering), len(spare) - reserve))
            # Where every slot is wanted, the coming token has to take one of them.
            slots = torch.cat((spare, (cached & ~unwanted).nonzero().flatten()))[: fit + reserve]
            missed += len(entering) - fit + max(0, len(slots) - len(spare))
            entering = entering[:fit]
            left = owner[slots].long()
            place[left[left >= 0]] = -1
            owner[slots] = -1
            entered.append((torch.full_like(entering, region), entering, slots[:fit] + region * state.quota))
            places.append(place)
            if len(slots) > fit:
                owner[slots[fit]] = tokens
                place[tokens] = region * state.quota + slots[fit]
    state.misses[layer] = missed
    regions, positions, slots = (torch.cat(parts) for parts in zip(*entered, strict=True))
    state.enter(layer, regions, positions, pool, scales, slots)
    # Last: rows that could not be read are not on the device.
    for place, (_, positions, slots) in zip(places, entered, strict=True):
        place[positions] = slots.to(place.dtype)
        state.owner[slots] = positions.to(state.owner.dtype)
