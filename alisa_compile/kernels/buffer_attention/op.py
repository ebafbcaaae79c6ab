"""`alisa::buffer_attention`: sparse decode over K and V buffers that belong to the user's own module."""

from __future__ import annotations

import torch

from ..library import define
from .reference import buffer_attention


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: torch.Tensor,
    observed: torch.Tensor,
    layer: int,
    spec: str,
    scale: float,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


define(
    "buffer_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor(a!) scores, Tensor(b!) observed, "
    "int layer, str spec, float scale) -> Tensor",
    buffer_attention,
    _fake,
)
