"""`alisa::hidden_append`: save the layer inputs of new tokens from which their K and V will be made again."""

from __future__ import annotations

import torch

from ..library import define
from .reference import hidden_append


def _fake(
    hidden: torch.Tensor, positions: torch.Tensor | None, length: torch.Tensor, ticket: torch.Tensor, layer: int
) -> None:
    return None


define(
    "hidden_append(Tensor hidden, Tensor? positions, Tensor length, Tensor(a!) ticket, int layer) -> ()",
    hidden_append,
    _fake,
)
