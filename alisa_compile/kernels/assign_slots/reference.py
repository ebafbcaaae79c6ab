"""Which rows get which device slots, decided on the device: plain torch without a host synchronisation.

The loops of `kv_prefetch/reference.py` and `kv_append/tiered.py` say the same one list at a time. Here every (sequence,
group) of a layer is decided at once, in tensors whose sizes the host knows.
"""

from __future__ import annotations

import torch

_FREE, _SPARE, _LAST_RESORT, _KEPT = range(4)  # slots in the order in which they are taken


def assign_slots(
    table: torch.Tensor,
    owner: torch.Tensor,
    tally: torch.Tensor,
    regions: torch.Tensor,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    layer: int,
    tokens: int,
    below: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots for the coming working set's rows that have none, and for the coming token; as `kv_prefetch` says.

    table: `[L, B, G, C]` int32; owner: `[N]` int32, the position in each slot, -1 = free; regions: `[L, B, G]` int64,
    which quota of slots is whose; rows `[L, B, G, W]` int32 and counts `[L, B, G]` int32: working sets, a negative
    count standing for all positions, for which no row enters. tokens, below: positions stored in the layer, and how
    many of them have a row below the device. tally: `[2]` int64, to which the numbers of rows that enter and that find
    no slot are added.

    Changes table and owner. Returns slots and positions of the rows to fetch, `[B, G, E]` int32 each with
    E = min(quota, W + 1); both are -1 where there is none.
    """
    place, own, base = _quotas(table, owner, regions, layer)
    capacity = place.shape[-1]
    position = torch.arange(capacity, dtype=torch.int32, device=place.device)
    if rows is None or counts is None:
        wanted, width = torch.zeros_like(place, dtype=torch.bool), 0
    else:
        chosen, width = rows[layer], rows.shape[-1]
        counted = torch.arange(width, dtype=torch.int32, device=place.device) < counts[layer].unsqueeze(-1)
        index = torch.where(counted & (chosen < tokens), chosen, capacity).long()
        wanted = torch.zeros((*place.shape[:2], capacity + 1), dtype=torch.bool, device=place.device)
        wanted = wanted.scatter(-1, index, True)[..., :capacity]
    lacking = place < 0
    entering = wanted & lacking & (position < tokens)
    coming = lacking & (position == tokens)
    free, cached = own < 0, (own >= 0) & (own < below)
    held = wanted.gather(-1, own.clamp_min(0).long())
    kind = torch.where(free, _FREE, torch.where(cached, torch.where(held, _LAST_RESORT, _SPARE), _KEPT))
    spare, usable = (kind <= _SPARE).sum(-1), (kind < _KEPT).sum(-1)
    count, reserve = entering.sum(-1), coming.sum(-1)
    fit = torch.minimum(count, spare - reserve).clamp_min(0)
    entering &= entering.cumsum(-1) <= fit.unsqueeze(-1)
    slots, positions = _give(place, own, base, entering | coming, kind, width + 1)
    owner.view(-1, own.shape[-1])[regions[layer]] = own
    # Where every slot is wanted, the coming token has taken one of the working set.
    displaced = (torch.minimum(fit + reserve, usable) - spare).clamp_min(0)
    tally += torch.stack((fit.sum(), (count - fit + displaced).sum()))
    fetched = (positions >= 0) & (positions != tokens)
    return torch.where(fetched, slots, -1), torch.where(fetched, positions, -1)


def assign_block(
    table: torch.Tensor,
    owner: torch.Tensor,
    regions: torch.Tensor,
    layer: int,
    start: int,
    kept: int,
    end: int,
    below: int,
) -> None:
    """Slots for the positions [kept, end) of a block that starts at `start`; those before `kept` go below the device.

    The tensors are those above. below: how many positions have, or are about to have, a row below the device.
    """
    place, own, base = _quotas(table, owner, regions, layer)
    position = torch.arange(place.shape[-1], dtype=torch.int32, device=place.device)
    if kept > start:  # a slot kept for the block's first token, which goes below instead
        own.copy_(torch.where(own == start, -1, own))
        place.copy_(torch.where(position == start, -1, place))
    entering = (place < 0) & (position >= kept) & (position < end)
    kind = torch.where(own < 0, _FREE, torch.where(own < below, _SPARE, _KEPT))
    _give(place, own, base, entering, kind, max(0, end - kept))
    owner.view(-1, own.shape[-1])[regions[layer]] = own


def _quotas(
    table: torch.Tensor, owner: torch.Tensor, regions: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's part of the table `[B, G, C]`, a copy of the owners `[B, G, Q]`, and the first slots `[B, G]` int32."""
    owners = owner.view(regions.numel(), -1)
    first_slots = (regions[layer] * owners.shape[-1]).to(torch.int32)
    return table[layer], owners[regions[layer]], first_slots


def _give(
    place: torch.Tensor, owner: torch.Tensor, base: torch.Tensor, entering: torch.Tensor, kind: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the i-th entering position take the i-th slot in order of kind.

    entering: `[B, G, C]` bool, at most `most` in each list. Changes place `[B, G, C]` and owner `[B, G, Q]`. Returns
    slots in the pool and positions, `[B, G, E]` int32 with E = min(Q, most), -1 where nothing was given.
    """
    capacity, quota = place.shape[-1], owner.shape[-1]
    most = min(most, quota)
    order = kind.argsort(dim=-1, stable=True)[..., :most]
    positions = entering.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    line = torch.arange(most, device=place.device)
    given = line < torch.minimum(entering.sum(-1), (kind < _KEPT).sum(-1)).unsqueeze(-1)
    # One entry more takes what is given to nobody: to leave it out, the host would have to know how many there are.
    owners = torch.cat((owner, owner[..., :1]), dim=-1)
    owners.scatter_(-1, torch.where(given, order, quota), positions.to(owner.dtype))
    owner.copy_(owners[..., :quota])
    places = torch.full((*place.shape[:2], capacity + 1), -1, dtype=place.dtype, device=place.device)
    slot = torch.arange(quota, dtype=place.dtype, device=place.device) + base.unsqueeze(-1)
    places.scatter_(-1, torch.where(owner < 0, capacity, owner).long(), slot)
    place.copy_(places[..., :capacity])
    slots = torch.where(given, order + base.unsqueeze(-1), -1).to(place.dtype)
    return slots, torch.where(given, positions, -1).to(place.dtype)
