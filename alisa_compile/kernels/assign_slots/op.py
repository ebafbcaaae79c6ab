"""`alisa::assign_slots`: which rows enter the device, and which slots they get, decided on the device."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import assign_slots


def _fake(
    table: torch.Tensor,
    owner: torch.Tensor,
    tally: torch.Tensor,
    regions: torch.Tensor,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    layer: int,
    tokens: int,
    below: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, batch_size, groups, _ = table.shape
    entries = min(owner.shape[0] // regions.numel(), 1 if rows is None else rows.shape[-1] + 1)
    return table.new_empty((batch_size, groups, entries)), table.new_empty((batch_size, groups, entries))


define(
    "assign_slots(Tensor(a!) table, Tensor(b!) owner, Tensor(c!) tally, Tensor regions, Tensor? rows, Tensor? counts, "
    "int layer, int tokens, int below) -> (Tensor, Tensor)",
    assign_slots,
    _fake,
    cuda=triton_first(assign_slots),
)
