"""`alisa::extend_attention`: several new tokens on top of a history (chunks of a prompt, further turns)."""

from __future__ import annotations

import torch

from ..library import define
from ..selection import decode_spec
from ..swa_attention.reference import score_dtype
from .reference import extend_attention
from .tiered import extend_attention_tiered


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
    spec: str,
    scale: float,
    *rest: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, batch_size, groups, capacity = table.shape
    seed_rows = decode_spec(spec).seed_rows(query.shape[2], capacity) if spec else 0
    mass = query.new_empty((batch_size, groups, seed_rows, capacity), dtype=score_dtype(query.dtype))
    return query.new_empty(query.shape), mass


_ARGUMENTS = (
    "Tensor query, Tensor pool, Tensor? scales, Tensor table, Tensor length, Tensor? valid, Tensor? rows, "
    "Tensor? counts, int layer, str spec, float scale"
)

define(f"extend_attention({_ARGUMENTS}, float soft_cap=0.0) -> (Tensor, Tensor)", extend_attention, _fake)
define(
    f"extend_attention.tiered({_ARGUMENTS}, Tensor ticket, float soft_cap=0.0) -> (Tensor, Tensor)",
    extend_attention_tiered,
    _fake,
)
