from __future__ import annotations

import torch


def kv_wait(pool: torch.Tensor, ticket: torch.Tensor, anchor: torch.Tensor, layer: int) -> None:
    """Return when the transfers that the layer started in the step before have ended.

    pool: `[N, 2, P, D]`, changed by those transfers. ticket: see `kernels/tiers.py`. anchor: a value that the step
    computes for this layer; without it a compiler may wait for all layers at the start. The plain-torch transfers run
    where they are started, so there is never one to wait for.
    """
    ticket[layer] = 0
