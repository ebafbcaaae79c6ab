"""`alisa::kv_seed` and `alisa::kv_select`: rank tokens and choose the working set of the next step."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import kv_seed, kv_select


def _fake(
    scores: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    mass: torch.Tensor,
    length: torch.Tensor,
    origin: torch.Tensor,
    valid: torch.Tensor | None,
    *args: object,
) -> None:
    return None


_STATE = (
    "Tensor(a!) scores, Tensor(b!) rows, Tensor(c!) counts, Tensor mass, Tensor length, Tensor origin, Tensor? valid"
)
define(f"kv_seed({_STATE}, SymInt new_tokens, int layer, str spec) -> ()", kv_seed, _fake, native=True)
define(
    f"kv_select({_STATE}, int layer, str spec) -> ()",
    kv_select,
    _fake,
    native=True,
    cuda=triton_first(kv_select),
    inlined=True,
)
