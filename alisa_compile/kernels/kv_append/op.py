"""`alisa::kv_append`: write the rows of new tokens, their validity, and advance the layer's length."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import kv_append
from .tiered import kv_append_tiered


def _fake(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    layer: int,
    *tiers: object,
) -> None:
    return None


_ROWS = "Tensor key, Tensor value, Tensor? key_scale, Tensor? value_scale, Tensor? padding_mask, int layer"

define(
    f"kv_append(Tensor(a!) pool, Tensor(b!)? scales, Tensor table, Tensor(c!) length, Tensor(d!) valid, {_ROWS}) -> ()",
    kv_append,
    _fake,
    native=True,
    cuda=triton_first(kv_append),
    inlined=True,
)
define(
    "kv_append.tiered(Tensor(a!) pool, Tensor(b!)? scales, Tensor(c!) table, Tensor(d!) length, Tensor(e!) valid, "
    f"{_ROWS}, str spec, Tensor(f!) ticket) -> ()",
    kv_append_tiered,
    _fake,
)
