from __future__ import annotations

import torch

from ..tiers import engine_of, first_recent, state_of


def kv_offload_cuda(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    ticket: torch.Tensor,
    layer: int,
    spec: str,
) -> None:
    """`kv_offload` on the stream of transfers: how many rows leave is known to the host, from the length alone."""
    state = state_of(ticket)
    engine = engine_of(state)
    first, end = int(state.below[layer]), first_recent(engine.tokens, state.quota, spec, state.max_rows)
    if first < end:
        engine.offload(state, pool, scales, table, layer, first, end)
