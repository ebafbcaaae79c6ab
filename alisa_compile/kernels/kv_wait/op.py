"""`alisa::kv_wait`: the rows fetched for a layer have landed."""

from __future__ import annotations

import torch

from ..library import define
from .cuda import kv_wait_cuda
from .reference import kv_wait


def _fake(pool: torch.Tensor, ticket: torch.Tensor, anchor: torch.Tensor, layer: int) -> None:
    return None


define(
    "kv_wait(Tensor(a!) pool, Tensor(b!) ticket, Tensor anchor, int layer) -> ()",
    kv_wait,
    _fake,
    native=True,
    cuda=kv_wait_cuda,
)
