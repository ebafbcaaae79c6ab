"""`alisa::swa_attention`: one decode step of sparse window attention over the working set."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import score_dtype, swa_attention
from .tiered import swa_attention_tiered


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
    *rest: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, batch_size, groups, capacity = table.shape
    mass_shape = (batch_size, groups, 0 if rows is None else capacity)
    return query.new_empty(query.shape), query.new_empty(mass_shape, dtype=score_dtype(query.dtype))


_ARGUMENTS = (
    "Tensor query, Tensor pool, Tensor? scales, Tensor table, Tensor length, Tensor? valid, Tensor? rows, "
    "Tensor? counts, int layer, float scale"
)

define(
    f"swa_attention({_ARGUMENTS}, float soft_cap=0.0) -> (Tensor, Tensor)",
    swa_attention,
    _fake,
    native=True,
    cuda=triton_first(swa_attention),
    inlined=True,
)
define(
    f"swa_attention.tiered({_ARGUMENTS}, Tensor ticket, float soft_cap=0.0) -> (Tensor, Tensor)",
    swa_attention_tiered,
    _fake,
    native=True,
)
