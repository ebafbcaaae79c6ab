"""Rows copied, gathered, scattered and appended by the Triton kernels: bit for bit as the references do it."""

from __future__ import annotations

import itertools

import pytest
import torch

from alisa_compile.kernels.copy_rows import triton as copying
from alisa_compile.kernels.copy_rows.reference import copy_rows as copy_reference
from alisa_compile.kernels.gather_rows import triton as gathering
from alisa_compile.kernels.kv_append import triton as appending
from alisa_compile.kernels.kv_append.reference import kv_append as append_reference
from alisa_compile.kernels.quantize_row import quantize_row
from alisa_compile.kernels.scatter_rows import triton as scattering
from tests.kernels.triton.running import DEVICE

#: Row shapes and dtypes: rows of 1 B to 24 KiB, some not a multiple of 8, 4 or 2 bytes.
ROWS = [
    ((1,), torch.int8),
    ((3, 5), torch.int8),
    ((7,), torch.bfloat16),
    ((2, 3), torch.float32),
    ((2, 1, 64), torch.float16),
    ((2, 8, 80), torch.bfloat16),
    ((2, 3, 1024), torch.float32),
]


def _pool(slots: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, (slots, *shape), generator=generator).to(dtype)
    if dtype.is_floating_point:
        values[::3] = float("nan")  # bits are copied, whatever they mean
    return values


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.cpu().view(torch.int8), expected.view(torch.int8))


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
@pytest.mark.parametrize("index", [torch.int32, pytest.param(torch.int64, marks=pytest.mark.slow)], ids=str)
def test_rows_go_where_they_should(shape: tuple[int, ...], dtype: torch.dtype, index: torch.dtype) -> None:
    """Some left out on either side; 0, 1, and more rows than a program takes."""
    for count in (0, 1, 63, 130):
        generator = torch.Generator().manual_seed(count)
        source, target = _pool(70, shape, dtype, 1), _pool(200, shape, dtype, 2)
        here = torch.randint(0, 70, (count,), generator=generator).to(index)
        there = torch.randperm(200, generator=generator)[:count].to(index)
        here[::5], there[3::7] = -1, -1
        moved = target.to(DEVICE, copy=True)
        copying.copy_rows(source.to(DEVICE), here.to(DEVICE), moved, there.to(DEVICE))
        copy_reference(source, here, target, there)
        _same(moved, target)


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
def test_gather_and_scatter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Packed rows out of a pool, and into one."""
    pool = _pool(200, shape, dtype, 1)
    for count in (0, 1, 111):
        slots = torch.randperm(200, generator=torch.Generator().manual_seed(count))[:count]
        packed = gathering.gather_rows(pool.to(DEVICE), slots.to(DEVICE))
        _same(packed, pool[slots])
        target = torch.zeros_like(pool).to(DEVICE)
        scattering.scatter_rows(target, slots.int().to(DEVICE), packed)
        expected = torch.zeros_like(pool)
        expected[slots] = pool[slots]
        _same(target, expected)


_KINDS = ("float32", "bfloat16", "cast", "int8")
#: Each value of each with each kind of rows; the others are slow.
_APPENDS = {
    (1, "float32", 1, 80), (2, "float32", 40, 16), (1, "bfloat16", 5, 16), (2, "bfloat16", 1, 80),
    (1, "cast", 40, 80), (2, "cast", 1, 16), (2, "int8", 5, 80), (1, "int8", 1, 16), (2, "int8", 40, 16),
}  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "kind", "tokens", "dim"),
    [
        pytest.param(*case, marks=[] if case in _APPENDS else pytest.mark.slow)
        for case in itertools.product((1, 2), _KINDS, (1, 5, 40), (16, 80))
    ],
)
def test_append(groups: int, kind: str, tokens: int, dim: int) -> None:
    """Decode and blocks, rows as models lay them out, a mask that re-states the history, nothing else touched."""
    layers, batch, heads, capacity, stored = 2, 2, 2, 70, 13
    generator = torch.Generator().manual_seed(tokens)
    dtype = torch.bfloat16 if kind in ("bfloat16", "cast") else torch.float32
    states = torch.randn((2, batch, tokens, heads, dim), generator=generator).transpose(2, 3)
    if kind != "cast":
        states = states.to(dtype)
    (key, key_scale), (value, value_scale) = (states[0], None), (states[1], None)
    if kind == "int8":
        (key, key_scale), (value, value_scale) = quantize_row(states[0]), quantize_row(states[1])
        dtype = torch.int8
    slots = layers * batch * groups * capacity
    table = torch.randperm(slots, generator=generator).int().view(layers, batch, groups, capacity)
    pool = torch.zeros((slots, 2, heads // groups, dim), dtype=dtype)
    scales = torch.zeros((slots, 2, heads // groups)) if kind == "int8" else None
    for mask_dtype in (None, torch.int64, torch.bool):
        valid = torch.ones((batch, capacity), dtype=torch.bool)
        mask = None
        if mask_dtype is not None:
            mask = (torch.rand((batch, stored + tokens), generator=generator) > 0.4).to(mask_dtype)
        length = torch.tensor([stored + 1, stored])
        state = (pool, scales, table, length, valid)
        there = [None if tensor is None else tensor.to(DEVICE, copy=True) for tensor in state]
        rows = (key, value, key_scale, value_scale, mask)
        appending.kv_append(*there, *(None if tensor is None else tensor.to(DEVICE) for tensor in rows), 1)
        append_reference(*state, *rows, 1)
        for ours, theirs in zip(there, state, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                _same(ours, theirs)
