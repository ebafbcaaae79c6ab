from __future__ import annotations

import torch

from ..tiers import drain, first_recent, state_of


def kv_offload(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    ticket: torch.Tensor,
    layer: int,
    spec: str,
) -> None:
    """Start to write the rows of a layer that are no longer recent below the device; they stay in their slots.

    pool, scales, table, length: as in `kv_append`. ticket: see `kernels/tiers.py`. spec: of the policy, "" for dense.
    """
    state = state_of(ticket)
    drain(state)
    tokens = int(length[layer])
    first, end = int(state.below[layer]), first_recent(tokens, state.quota, spec, state.max_rows)
    if first >= end:
        return
    slots = table[layer, :, :, first:end].long()
    state.down(layer, pool[slots], None if scales is None else scales[slots])
