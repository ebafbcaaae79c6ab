from __future__ import annotations

import torch


def copy_rows(
    source: torch.Tensor, source_slots: torch.Tensor, target: torch.Tensor, target_slots: torch.Tensor
) -> None:
    """Copy row `source_slots[i]` of `source [N, ...]` to row `target_slots[i]` of `target [M, ...]`, for each i.

    source_slots, target_slots: `[R]` int32 or int64; where either is negative nothing is copied. Target slots are
    distinct. The pools have one dtype and row shape; on a GPU either may be pinned host memory by its device alias.
    """
    copied = (source_slots >= 0) & (target_slots >= 0)
    target[target_slots[copied].long()] = source[source_slots[copied].long()]
