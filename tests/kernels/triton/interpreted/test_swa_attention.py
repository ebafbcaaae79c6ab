"""The decode kernel against the plain-torch reference: shapes, dtypes, poisoned rows and scratch, shuffled slots."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from alisa_compile.kernels.quantize_row import quantize_row
from alisa_compile.kernels.swa_attention import triton as kernel
from alisa_compile.kernels.swa_attention.reference import swa_attention as reference
from alisa_compile.kernels.triton_launch import UnsupportedError
from tests.kernels.triton.running import BOUNDS, DEVICE, poison_scratch


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a store and a query look like; `groups` index sets of `kv // groups` heads each."""

    query: int = 8
    kv: int = 2
    dim: int = 64
    groups: int = 1
    batch: int = 1
    tokens: int = 111
    dtype: torch.dtype = torch.float32
    int8: bool = False
    soft_cap: float = 0.0


@dataclasses.dataclass
class Case:
    """Arguments of the op as the reference and as the kernel get them, and how many entries each group attends to."""

    expected: tuple[Any, ...]
    given: tuple[Any, ...]
    entries: torch.Tensor


_LAYERS, _LAYER = 2, 1


def _case(shape: Shape, mode: str, *, seed: int = 0) -> Case:
    """A store with random rows in shuffled slots. All that must not be read is NaN (int8: its scale is), and entries
    past the count name positions never written. mode: `sparse`, `refresh` or `dense`; `+padding` behind it."""
    generator = torch.Generator().manual_seed(seed)
    kind, _, padding = mode.partition("+")
    batch, groups, tokens = shape.batch, shape.groups, shape.tokens
    capacity, width = tokens + 7, tokens // 2 + 5
    slots = _LAYERS * batch * groups * capacity
    order = torch.randperm(slots, generator=generator).view(_LAYERS, batch, groups, capacity)
    length = torch.tensor([tokens + 3, tokens])
    valid = torch.ones((batch, capacity), dtype=torch.bool)
    if padding:
        valid[0, : tokens // 3] = False
        valid[-1, (tokens - 1) // 2] = tokens == 1  # the current token is always real
    every = torch.arange(capacity) < tokens
    attended = (every & valid)[:, None].expand(batch, groups, capacity).clone()
    rows = counts = None
    if kind != "dense":
        rows = torch.full((_LAYERS, batch, groups, width), capacity - 1, dtype=torch.int32)
        counts = torch.full((_LAYERS, batch, groups), -1, dtype=torch.int32)
    if kind == "sparse":
        attended.zero_()
        for sequence in range(batch):
            for group in range(groups):
                count = 1 + (7 * (sequence + 2 * group) + tokens // 3) % min(width, tokens)  # ragged
                others = torch.randperm(tokens - 1, generator=generator)[: count - 1]
                chosen = torch.cat((others, torch.tensor([tokens - 1]))).sort().values
                rows[_LAYER, sequence, group, :count] = chosen.int()
                counts[_LAYER, sequence, group] = count
                attended[sequence, group, chosen] = True
    states = torch.randn((slots, 2, shape.kv // groups, shape.dim), generator=generator)
    pool, scales = quantize_row(states) if shape.int8 else (states.to(shape.dtype), None)
    # The reference reads padding rows and hides them, so it gets a store without NaN.
    poisoned, poisoned_scales = pool.clone(), None if scales is None else scales.clone()
    unread = torch.ones(slots, dtype=torch.bool)
    unread[order[_LAYER][attended]] = False
    if poisoned_scales is None:
        poisoned[unread] = float("nan")
    else:
        poisoned[unread], poisoned_scales[unread] = 127, float("nan")
    query = torch.randn((batch, 1, shape.query, shape.dim), generator=generator).to(shape.dtype).transpose(1, 2)
    table = order.int()
    tail = (length, valid if padding else None, rows, counts, _LAYER, 1 / math.sqrt(shape.dim), shape.soft_cap)
    entries = torch.full((batch, groups), tokens) if kind != "sparse" else counts[_LAYER]
    given = tuple(
        value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for value in (query, poisoned, poisoned_scales, table, *tail)
    )
    return Case((query, pool, scales, table, *tail), given, entries)


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)


def _check(shape: Shape, mode: str) -> None:
    case = _case(shape, mode)
    out, mass = kernel.swa_attention(*case.given)
    expected, expected_mass = reference(*(_double(value) for value in case.expected))
    bound = BOUNDS[shape.dtype]
    assert out.dtype == shape.dtype and out.is_contiguous() and out.shape == case.expected[0].shape
    torch.testing.assert_close(out.double().cpu(), expected.double(), rtol=bound, atol=bound)
    assert mass.dtype == torch.float32 and mass.shape == expected_mass.shape
    if mode.startswith("dense"):
        return
    kept = torch.arange(mass.shape[-1]) < case.entries[..., None]
    torch.testing.assert_close(mass.double().cpu()[kept], expected_mass.double()[kept], rtol=bound, atol=bound)
    heads = torch.full((shape.batch, shape.groups), shape.query / shape.groups, dtype=torch.float64)
    torch.testing.assert_close(mass.double().cpu().where(kept, 0).sum(-1), heads, rtol=1e-5, atol=1e-5)


def _double(value: Any) -> Any:
    """The reference in float64 has no rounding of its own; int8 rows stay codes."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


_MODES = ["sparse", "refresh", "refresh+padding", "dense", "dense+padding"]
_SHAPES = [
    Shape(),
    Shape(tokens=1, dim=32),
    Shape(tokens=63, dtype=torch.bfloat16, batch=3),
    Shape(dim=80, dtype=torch.float16, tokens=63),
    Shape(dim=128, int8=True, dtype=torch.bfloat16, tokens=63),
    Shape(query=4, kv=2, groups=2, dim=32, int8=True, batch=3, tokens=37),
    Shape(dim=32, tokens=37, soft_cap=0.7),
]


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_against_reference(shape: Shape, mode: str) -> None:
    """Output, and mass of each entry; whatever a step does not attend to is NaN."""
    _check(shape, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(query=8, kv=8, dim=32, tokens=111, batch=3),
        Shape(query=4, kv=4, dim=128, groups=4, tokens=63),
        Shape(query=6, kv=1, dim=256, tokens=1000),
        Shape(query=16, kv=4, dim=80, tokens=1000),
        Shape(query=8, kv=2, dim=96, groups=2, tokens=111),
        Shape(query=40, kv=1, dim=64, tokens=111),
    ],
    ids=str,
)
def test_more_shapes(shape: Shape, dtype: torch.dtype, int8: bool, mode: str) -> None:
    """Multi-head, grouped and multi-query attention, up to a thousand rows."""
    _check(dataclasses.replace(shape, dtype=dtype, int8=int8), mode)


def test_result_does_not_depend_on_slots_nor_capacity() -> None:
    """The same rows in other slots, and in a larger store, give the same bits."""
    case = _case(Shape(), "sparse")
    query, pool, scales, table, *tail = case.given
    slots = pool.shape[0]
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(9)).to(pool.device)
    moved = torch.empty_like(pool)
    moved[order] = pool
    larger = torch.cat((order[table.long()].int(), torch.zeros_like(table)), dim=-1)
    out, mass = kernel.swa_attention(query, pool, scales, table, *tail)
    again, mass_again = kernel.swa_attention(query, moved, scales, larger, *tail)
    assert torch.equal(out, again)
    for sequence, group in case.entries.nonzero().tolist():
        count = case.entries[sequence, group]
        assert torch.equal(mass[sequence, group, :count], mass_again[sequence, group, :count])


def test_a_strided_query_and_an_empty_working_set() -> None:
    """A query whose rows are strided is read right; a sequence without rows has output 0."""
    case = _case(Shape(dim=32), "sparse")
    query, *rest = case.given
    strided = torch.stack((query, torch.full_like(query, float("nan"))), dim=-1)[..., 0]
    assert strided.stride(-1) == 2
    assert torch.equal(kernel.swa_attention(strided, *rest)[0], kernel.swa_attention(query, *rest)[0])
    counts = rest[6]
    counts[_LAYER] = 0
    out, _ = kernel.swa_attention(query, *rest)
    assert bool((out == 0).all())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float64}, "float64"), ({"dim": 300}, "head_dim is 300"), ({"query": 300, "kv": 1}, "300 query")],
)
def test_what_the_kernel_cannot_hold_is_left_to_the_reference(changes: dict[str, Any], reason: str) -> None:
    """With the reason, and before anything is launched."""
    case = _case(dataclasses.replace(Shape(), **changes), "sparse")
    with pytest.raises(UnsupportedError, match=reason):
        kernel.swa_attention(*case.given)
