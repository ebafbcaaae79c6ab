"""`alisa::kv_recompute`: K and V of deleted rows from saved layer inputs; and the ops that check and read such rows.

K and V are made by code of the model that only Python can call, so `kv_offload.recomputing`, which compares the first
rows that leave, and `swa_attention.recomputing`, which attends to deleted rows, begin in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kv_offload.op import _fake as _fake_offload
from ..library import define
from ..swa_attention.op import _fake as _fake_attention
from .reference import kv_offload_recomputing, kv_recompute, swa_attention_recomputing


def _fake(pool: torch.Tensor, scales: torch.Tensor | None, ticket: torch.Tensor, layer: int) -> None:
    return None


def _define_overload(of: Any, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An op with the same arguments."""
    name, arguments = str(of._schema).removeprefix("alisa::").split("(", 1)
    define(f"{name.split('.')[0]}.recomputing({arguments}", implementation, fake)


define(
    "kv_recompute(Tensor(a!) pool, Tensor(b!)? scales, Tensor(c!) ticket, int layer) -> ()",
    kv_recompute,
    _fake,
)
_define_overload(torch.ops.alisa.kv_offload.default, kv_offload_recomputing, _fake_offload)
_define_overload(torch.ops.alisa.swa_attention.tiered, swa_attention_recomputing, _fake_attention)
