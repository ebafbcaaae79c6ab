"""`alisa::kv_offload`: start to write a layer's rows that are no longer recent below the device."""

from __future__ import annotations

import torch

from ..library import define
from .cuda import kv_offload_cuda
from .reference import kv_offload


def _fake(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    ticket: torch.Tensor,
    layer: int,
    spec: str,
) -> None:
    return None


define(
    "kv_offload(Tensor pool, Tensor? scales, Tensor table, Tensor length, Tensor(a!) ticket, int layer, str spec) "
    "-> ()",
    kv_offload,
    _fake,
    native=True,
    cuda=kv_offload_cuda,
)
