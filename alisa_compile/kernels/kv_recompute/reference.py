from __future__ import annotations

from typing import Any

import torch

from ..swa_attention.tiered import swa_attention_tiered
from ..tiers import first_recent, hidden_of, state_of


def kv_recompute(pool: torch.Tensor, scales: torch.Tensor | None, ticket: torch.Tensor, layer: int) -> None:
    """Make K and V of the coming step's rows that exist only as layer inputs, in one batch, into their slots.

    pool, scales: as in `kv_append`. ticket: see `kernels/tiers.py`. `kv_prefetch` has chosen the rows and their slots,
    and started to fetch the others, which goes on meanwhile.
    """
    state_of(ticket).rebuild_pending(ticket, layer, pool, scales)


def kv_offload_recomputing(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    ticket: torch.Tensor,
    layer: int,
    spec: str,
) -> None:
    """`kv_offload` of a store that deletes rows: the first that leave are compared with what is rebuilt."""
    state = state_of(ticket)
    hidden = hidden_of(state)
    if hidden.unverified.get(layer):
        first, end = int(state.below[layer]), first_recent(int(length[layer]), state.quota, spec, state.max_rows)
        for position in [p for p in hidden.unverified[layer] if first <= p < end]:
            slots = table[layer, :, :, position : position + 1].long()
            hidden.verify(layer, position, pool[slots], None if scales is None else scales[slots], state.home)
    try:
        torch.ops.alisa.kv_offload.default(pool, scales, table, length, ticket, layer, spec)
    except RuntimeError:
        end = first_recent(int(length[layer]), state.quota, spec, state.max_rows)
        hidden.require_saved(range(int(hidden.saved[layer]), end - state.ring))
        raise


def swa_attention_recomputing(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`swa_attention.tiered` of a store that deletes rows: in plain torch where some of the layer's may be rebuilt."""
    layer, ticket = arguments[8], arguments[10]
    op = swa_attention_tiered if hidden_of(state_of(ticket)).deleted[layer] else torch.ops.alisa.swa_attention.tiered
    result: tuple[torch.Tensor, torch.Tensor] = op(*arguments)
    return result
