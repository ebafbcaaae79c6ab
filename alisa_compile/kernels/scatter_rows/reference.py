from __future__ import annotations

import torch


def scatter_rows(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write packed rows `[R, ...]` to distinct slots `[R]` (int32 or int64) of a pool `[N, ...]` of the same dtype."""
    pool.index_copy_(0, slots.long(), rows)
