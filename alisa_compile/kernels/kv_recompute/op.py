"""`alisa::kv_recompute`: K and V of deleted rows from saved layer inputs; and the other ops of stores that need it.

K and V are made by code of the model that only Python can call, so in such a store rows are moved by the plain-torch
implementations, also where others have native kernels: these are the overloads named `recomputing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kv_offload.op import _fake as _fake_offload
from ..kv_offload.reference import kv_offload
from ..kv_prefetch.op import _fake as _fake_prefetch
from ..kv_prefetch.reference import kv_prefetch
from ..library import define
from ..swa_attention.op import _fake as _fake_attention
from ..swa_attention.tiered import swa_attention_tiered
from .reference import kv_recompute


def _fake(pool: torch.Tensor, scales: torch.Tensor | None, ticket: torch.Tensor, layer: int) -> None:
    return None


def _define_overload(of: Any, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The same op with the same arguments, always in plain torch."""
    name, arguments = str(of._schema).removeprefix("alisa::").split("(", 1)
    define(f"{name.split('.')[0]}.recomputing({arguments}", implementation, fake)


define(
    "kv_recompute(Tensor(a!) pool, Tensor(b!)? scales, Tensor(c!) ticket, int layer) -> ()",
    kv_recompute,
    _fake,
)
_define_overload(torch.ops.alisa.kv_offload.default, kv_offload, _fake_offload)
_define_overload(torch.ops.alisa.kv_prefetch.default, kv_prefetch, _fake_prefetch)
_define_overload(torch.ops.alisa.swa_attention.tiered, swa_attention_tiered, _fake_attention)
