from __future__ import annotations

import torch

from ..tiers import engine_of, state_of


def kv_wait_cuda(pool: torch.Tensor, ticket: torch.Tensor, anchor: torch.Tensor, layer: int) -> None:
    """`kv_wait` of the compute stream; the host goes on."""
    engine_of(state_of(ticket)).wait(layer)
    ticket[layer] = 0
