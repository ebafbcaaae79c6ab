from __future__ import annotations

import torch

from ..tiers import engine_of, state_of


def kv_prefetch_cuda(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    ticket: torch.Tensor,
    layer: int,
) -> None:
    """`kv_prefetch` on the stream of transfers: which rows enter is decided on the device, and stays there."""
    state = state_of(ticket)
    engine_of(state).prefetch(state, pool, scales, table, rows, counts, layer)
    ticket[layer] = 1
