from __future__ import annotations

import torch


def gather_rows(pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows of a pool, packed: pool `[N, ...]` of any dtype, slots `[R]` int32 or int64; returns `[R, ...]`."""
    return pool.index_select(0, slots)
