"""`alisa::scatter_rows`: write packed rows to their slots in a pool, by runs of neighbouring slots."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import scatter_rows


def _fake(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    return None


define(
    "scatter_rows(Tensor(a!) pool, Tensor slots, Tensor rows) -> ()",
    scatter_rows,
    _fake,
    native=True,
    cuda=triton_first(scatter_rows),
)
