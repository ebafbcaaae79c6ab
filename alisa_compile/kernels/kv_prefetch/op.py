"""`alisa::kv_prefetch`: start to fetch what a layer's coming working set lacks on the device."""

from __future__ import annotations

import torch

from ..library import define
from .cuda import kv_prefetch_cuda
from .reference import kv_prefetch


def _fake(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    ticket: torch.Tensor,
    layer: int,
) -> None:
    return None


define(
    "kv_prefetch(Tensor(a!) pool, Tensor(b!)? scales, Tensor(c!) table, Tensor length, Tensor? rows, Tensor? counts, "
    "Tensor(d!) ticket, int layer) -> ()",
    kv_prefetch,
    _fake,
    native=True,
    cuda=kv_prefetch_cuda,
)
