"""`alisa::swa_attention`: one decode step of sparse window attention over the working set."""

from __future__ import annotations

import torch

from ..library import define
from .reference import score_dtype, swa_attention


def _fake(
    query: torch.Tensor,
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    layer: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, batch_size, groups, capacity = table.shape
    mass_shape = (batch_size, groups, 0 if rows is None else capacity)
    return query.new_empty(query.shape), query.new_empty(mass_shape, dtype=score_dtype(query.dtype))


define(
    "swa_attention(Tensor query, Tensor pool, Tensor? scales, Tensor table, Tensor length, Tensor? valid, "
    "Tensor? rows, Tensor? counts, int layer, float scale) -> (Tensor, Tensor)",
    swa_attention,
    _fake,
    native=True,
)
