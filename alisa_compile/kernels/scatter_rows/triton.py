"""CUDA version of `alisa::scatter_rows`, by the kernel of `copy_rows`."""

from __future__ import annotations

import torch

from ..copy_rows.triton import copy


def scatter_rows(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """See `reference.scatter_rows`; the pool may be pinned host memory by its device alias."""
    copy(rows.contiguous(), None, pool, slots)
