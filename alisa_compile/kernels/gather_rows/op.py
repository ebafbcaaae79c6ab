"""`alisa::gather_rows`: pack scattered rows of a pool, by runs of neighbouring slots."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import gather_rows


def _fake(pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return pool.new_empty((slots.shape[0], *pool.shape[1:]))


define(
    "gather_rows(Tensor pool, Tensor slots) -> Tensor", gather_rows, _fake, native=True, cuda=triton_first(gather_rows)
)
