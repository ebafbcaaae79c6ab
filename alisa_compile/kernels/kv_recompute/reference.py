from __future__ import annotations

import time

import torch

from ..tiers import HOST_TO_DEVICE, hidden_of, state_of


def kv_recompute(pool: torch.Tensor, scales: torch.Tensor | None, ticket: torch.Tensor, layer: int) -> None:
    """Make K and V of the coming step's rows that exist only as layer inputs, in one batch, into their slots.

    pool, scales: as in `kv_append`. ticket: see `kernels/tiers.py`. `kv_prefetch` has chosen the rows and their slots.
    """
    state = state_of(ticket)
    hidden = hidden_of(state)
    pending = hidden.pending.pop(layer, None)
    if pending is not None:
        began, nbytes = time.perf_counter_ns(), len(pending.slots) * hidden.row_bytes
        rows = (pending.sequences, pending.positions, pending.groups)
        hidden.rebuild(layer, *rows, pool, scales, pending.slots)
        state.traffic[HOST_TO_DEVICE] += nbytes
        state.note_interval("recompute", began, nbytes, layer)
