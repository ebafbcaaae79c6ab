"""`alisa::prefill_attention`: dense causal attention of a whole prompt, and its last rows' attention mass."""

from __future__ import annotations

import torch

from ..library import define
from ..selection import decode_spec
from ..swa_attention.reference import score_dtype
from .reference import prefill_attention


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding_mask: torch.Tensor | None,
    groups: int,
    spec: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    seed_rows = decode_spec(spec).seed_rows(query.shape[2]) if spec else 0
    mass = query.new_empty((query.shape[0], groups, seed_rows, key.shape[2]), dtype=score_dtype(query.dtype))
    return query.new_empty(query.shape), mass


define(
    "prefill_attention(Tensor query, Tensor key, Tensor value, Tensor? padding_mask, int groups, str spec, "
    "float scale) -> (Tensor, Tensor)",
    prefill_attention,
    _fake,
)
