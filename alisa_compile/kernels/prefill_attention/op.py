"""`alisa::prefill_attention`: dense causal attention of a whole prompt, and its last rows' attention mass.

`alisa::prefill_mass`: the mass alone, for the queries of a prompt or of a block on a history.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..library import define
from ..selection import decode_spec
from ..swa_attention.reference import score_dtype
from ..triton_launch import triton_first
from .reference import prefill_attention, prefill_mass


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding_mask: torch.Tensor | None,
    groups: int,
    spec: str,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    seed_rows = decode_spec(spec).seed_rows(query.shape[2]) if spec else 0
    mass = query.new_empty((query.shape[0], groups, seed_rows, key.shape[2]), dtype=score_dtype(query.dtype))
    return query.new_empty(query.shape), mass


def _mass(query: torch.Tensor, key: torch.Tensor, *arguments: Any) -> torch.Tensor:
    rows = key if key.stride(-1) == 1 else key.contiguous()  # the native kernel reads them as they lie
    mass: torch.Tensor = torch.ops.alisa.prefill_mass.default(query, rows, *arguments)
    return mass


def _fake_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    groups: int,
    seed_rows: int,
    start: int,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    return query.new_empty((query.shape[0], groups, seed_rows, key.shape[2]), dtype=score_dtype(query.dtype))


define(
    "prefill_mass(Tensor query, Tensor key, Tensor? valid, int groups, SymInt seed_rows, SymInt start, float scale, "
    "float soft_cap=0.0) -> Tensor",
    prefill_mass,
    _fake_mass,
    native=True,
)
define(
    "prefill_attention(Tensor query, Tensor key, Tensor value, Tensor? padding_mask, int groups, str spec, "
    "float scale, float soft_cap=0.0) -> (Tensor, Tensor)",
    functools.partial(prefill_attention, mass_of=_mass),
    _fake,
    cuda=triton_first(prefill_attention),
)
