"""CUDA version of `alisa::gather_rows`, by the kernel of `copy_rows`."""

from __future__ import annotations

import torch

from ..copy_rows.triton import copy


def gather_rows(pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """See `reference.gather_rows`; the pool may be pinned host memory by its device alias."""
    rows = torch.empty((slots.shape[0], *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
    copy(pool, slots, rows, None)
    return rows
