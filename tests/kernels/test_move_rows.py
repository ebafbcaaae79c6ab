"""`alisa::gather_rows` and `alisa::scatter_rows` against indexing, with every dtype that rows have."""

from __future__ import annotations

import random

import pytest
import torch

from alisa_compile import kernels  # noqa: F401  (registers the ops)

ops = torch.ops.alisa

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)


def _slots(kind: str, rows: int) -> torch.Tensor:
    draw = random.Random(kind)
    if kind == "runs":
        starts = draw.sample(range(0, rows - 40, 41), 12)
        return torch.cat([torch.arange(start, start + draw.randint(1, 40)) for start in starts])
    if kind == "descending":
        return torch.arange(rows - 1, -1, -1)
    if kind == "none":
        return torch.empty(0, dtype=torch.int64)
    return torch.tensor(draw.sample(range(rows), 333))


@pytest.mark.parametrize("kind", ["runs", "scattered", "descending", "none"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(700, 2, 3, 5), (700, 2, 1)])
def test_against_indexing(shape: tuple[int, ...], dtype: torch.dtype, index: torch.dtype, kind: str) -> None:
    """Packed rows are the pool's; scattered back elsewhere they leave every other row as it was."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(-100, 100, shape, generator=generator).to(dtype)
    slots = _slots(kind, 700)
    packed = ops.gather_rows(pool, slots.to(index))
    assert packed.dtype == dtype and packed.is_contiguous() and torch.equal(packed, pool[slots])
    target = torch.full(shape, 7, dtype=dtype)
    elsewhere = slots.flip(0)
    ops.scatter_rows(target, elsewhere.to(index), packed)
    expected = torch.full(shape, 7, dtype=dtype)
    expected[elsewhere] = pool[slots]
    assert torch.equal(target, expected)


def test_rows_of_ids_are_views_of_nothing() -> None:
    """What was gathered is a copy: the pool may change after it."""
    pool = torch.arange(20.0).view(10, 2)
    packed = ops.gather_rows(pool, torch.tensor([3, 4]))
    pool.zero_()
    assert packed.tolist() == [[6, 7], [8, 9]]


@pytest.mark.parametrize("slot", [-1, 10])
def test_a_slot_outside_the_pool_is_refused(slot: int) -> None:
    """Nothing is read or written out of bounds."""
    pool = torch.zeros(10, 2)
    slots = torch.tensor([3, slot])
    with pytest.raises((RuntimeError, IndexError), match=r"slot|index"):
        ops.gather_rows(pool, slots)
    with pytest.raises((RuntimeError, IndexError), match=r"slot|index"):
        ops.scatter_rows(pool, slots, torch.ones(2, 2))
    assert not bool(pool.any())


def test_opcheck() -> None:
    """Schema, mutation, shapes, AOT."""
    pool, slots = torch.rand(10, 2, 1, 4), torch.tensor([3, 1])
    torch.library.opcheck(ops.gather_rows.default, (pool, slots))
    torch.library.opcheck(ops.scatter_rows.default, (pool, slots, torch.rand(2, 2, 1, 4)))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_strided_slots(index: torch.dtype) -> None:
    """A column of a residency table, as a store with one token hands it over when it grows."""
    pool = torch.arange(40.0).view(20, 2)
    slots = torch.arange(20, dtype=index).view(4, 5)[:, 1]
    assert not slots.is_contiguous()
    packed = ops.gather_rows(pool, slots)
    assert torch.equal(packed, pool[slots.long()])
    target = torch.zeros(20, 2)
    ops.scatter_rows(target, slots, packed)
    assert torch.equal(target[slots.long()], packed) and int((target != 0).any(1).sum()) == 4
