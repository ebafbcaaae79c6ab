"""Kernels that move, append and select rows, compiled for four generations of GPUs: no spills, enough shared memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alisa_compile.config import AlisaConfig
from alisa_compile.kernels.assign_slots.triton import assign_slots
from alisa_compile.kernels.copy_rows.triton import copy_rows
from alisa_compile.kernels.gather_rows.triton import gather_rows
from alisa_compile.kernels.kv_append.triton import kv_append
from alisa_compile.kernels.kv_select.triton import kv_select
from alisa_compile.kernels.scatter_rows.triton import scatter_rows
from alisa_compile.kernels.selection import SelectionSpec
from alisa_compile.runtime.policies import selection_spec
from tests.kernels.triton.compiling import SHARED_MEMORY, check_fits, compile_launches

_LAYERS, _BATCH, _GROUPS, _CAPACITY, _WIDTH = 2, 3, 1, 4096, 640
_LISTS = (_LAYERS, _BATCH, _GROUPS)


def _ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _move(heads: int, dim: int, dtype: torch.dtype) -> None:
    pool, slots = torch.zeros((64, 2, heads, dim), dtype=dtype), _ints(300)
    copy_rows(pool, slots, pool, slots)
    scatter_rows(pool, slots, gather_rows(pool, slots))


def _append(dtype: torch.dtype, tokens: int, is_int8: bool) -> None:
    pool = torch.zeros((64, 2, 8, 128), dtype=torch.int8 if is_int8 else dtype)
    states = torch.zeros((_BATCH, tokens, 8, 128), dtype=pool.dtype).transpose(1, 2)
    scales = torch.zeros((64, 2, 8)) if is_int8 else None
    row_scales = torch.zeros((_BATCH, 8, tokens)) if is_int8 else None
    kv_append(
        pool, scales, _ints(*_LISTS, _CAPACITY), _ints(_LAYERS, dtype=torch.int64),
        torch.ones((_BATCH, _CAPACITY), dtype=torch.bool), states, states, row_scales, row_scales,
        _ints(_BATCH, 100, dtype=torch.int64), 0,
    )  # fmt: skip


def _select(padded: bool, **options: object) -> None:
    spec = selection_spec(AlisaConfig.from_options(options))
    assert isinstance(spec, SelectionSpec)
    kv_select(
        torch.zeros((*_LISTS, 1, _CAPACITY)), _ints(*_LISTS, _WIDTH), _ints(*_LISTS),
        torch.zeros((_BATCH, _GROUPS, _CAPACITY)), _ints(_LAYERS, dtype=torch.int64), _ints(2, dtype=torch.int64),
        torch.ones((_BATCH, _CAPACITY), dtype=torch.bool) if padded else None, 0, spec.encode(),
    )  # fmt: skip


def _assign(sparse: bool) -> None:
    regions = torch.arange(_LAYERS * _BATCH * _GROUPS).view(_LISTS)
    assign_slots(
        _ints(*_LISTS, _CAPACITY), _ints(regions.numel() * 700), _ints(2, dtype=torch.int64), regions,
        _ints(*_LISTS, _WIDTH) if sparse else None, _ints(*_LISTS) if sparse else None, 0, 2000, 1500,
    )  # fmt: skip


LAUNCHES: dict[str, Callable[[], None]] = {
    "rows of 4 KiB": lambda: _move(8, 128, torch.bfloat16),
    "rows of 6 B": lambda: _move(1, 3, torch.int8),
    "append bfloat16": lambda: _append(torch.bfloat16, 1, False),
    "append a block of int8": lambda: _append(torch.bfloat16, 100, True),
    "select": lambda: _select(False),
    "select with padding": lambda: _select(True),
    "select h2o": lambda: _select(False, policy="h2o"),
    "select strided": lambda: _select(True, policy="strided"),
    "assign": lambda: _assign(True),
    "assign one slot": lambda: _assign(False),
}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles(launch: str, capability: int) -> None:
    """Every kernel that the op starts."""
    check_fits(compile_launches(capability, LAUNCHES[launch]))
