from __future__ import annotations

import time

import torch

from ..tiers import hidden_of, state_of


def hidden_append(
    hidden: torch.Tensor, positions: torch.Tensor | None, length: torch.Tensor, ticket: torch.Tensor, layer: int
) -> None:
    """Save the inputs of one layer for new tokens whose K and V will be deleted; before their `kv_append`.

    hidden: `[B, T, hidden]`. positions: what K is rotated by, `[B, T]` or `[1, T]`; None where nothing is. length:
    `[L]` int64, tokens before these. ticket: see `kernels/tiers.py`.
    """
    state, began = state_of(ticket), time.perf_counter_ns()
    written = hidden_of(state).append(layer, int(length[layer]), hidden, positions, state.home)
    state.note_interval("down", began, written, layer)
