"""The prefill kernels against the plain-torch reference: output and seeding mass, with padding and without."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from alisa_compile.kernels.prefill_attention import triton as kernel
from alisa_compile.kernels.prefill_attention.reference import prefill_attention as reference
from alisa_compile.kernels.selection import SelectionSpec
from tests.kernels.triton.running import BOUNDS, DEVICE, poison_scratch

_SPECS = {
    "ring": SelectionSpec(Fraction(1, 4), Fraction(1, 4), "ring").encode(),
    "decay": SelectionSpec(Fraction(1, 10), Fraction(1, 10), window=9, sinks=4).encode(),
    "sum": SelectionSpec(Fraction(1, 10), Fraction(1, 10), "sum").encode(),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads, tokens and dtype of a prompt; `groups` index sets."""

    query: int = 4
    kv: int = 2
    dim: int = 32
    tokens: int = 63
    batch: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.float32
    soft_cap: float = 0.0


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)


def _mask(batch: int, tokens: int) -> torch.Tensor:
    """By turns left padded, right padded, with holes (the first token among them), and with one real token."""
    mask = torch.ones((batch, tokens), dtype=torch.int64)
    for sequence in range(batch):
        kind = sequence % 4
        if kind == 0:
            mask[sequence, : tokens // 3] = 0
        elif kind == 1:
            mask[sequence, tokens - tokens // 3 :] = 0
        elif kind == 2:
            mask[sequence, ::3] = 0
        else:
            mask[sequence, : tokens - 1] = 0
    return mask


def _check(shape: Shape, spec: str, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        states = torch.randn((shape.batch, shape.tokens, heads, shape.dim), generator=generator)
        return states.to(shape.dtype).transpose(1, 2)  # as models make them

    query, key, value = draw(shape.query), draw(shape.kv), draw(shape.kv)
    mask = _mask(shape.batch, shape.tokens) if padded else None
    tail: tuple[Any, ...] = (shape.groups, _SPECS[spec], 1 / math.sqrt(shape.dim), shape.soft_cap)
    expected, expected_mass = reference(query.double(), key.double(), value.double(), mask, *tail)
    if mask is not None:
        # Keys of padding are read by nobody; its values by rows with nothing else to attend to.
        key = key.masked_fill(mask[:, None, :, None] == 0, float("nan"))
    given = (part.to(DEVICE) for part in (query, key, value))
    out, mass = kernel.prefill_attention(*given, None if mask is None else mask.to(DEVICE), *tail)
    bound = BOUNDS[shape.dtype]
    assert out.dtype == shape.dtype and out.is_contiguous()
    torch.testing.assert_close(out.double().cpu(), expected, rtol=bound, atol=bound)
    assert mass.dtype == torch.float32 and mass.shape == expected_mass.shape and mass.is_contiguous()
    torch.testing.assert_close(mass.double().cpu(), expected_mass, rtol=bound, atol=bound * shape.query)


_PROMPTS = {
    "one token": Shape(tokens=1, batch=3),
    "four masks": Shape(tokens=19, batch=4, groups=2, dim=80, dtype=torch.float16),
    "two groups": Shape(query=2, groups=2, dim=16, tokens=37),
    "one KV head": Shape(query=3, kv=1, dim=64, tokens=63, dtype=torch.bfloat16),
    "soft-capped": Shape(tokens=37, dim=16, soft_cap=0.7),
}
#: Each shape with and without padding, each kind of mass with two shapes or more; the others are slow.
_QUICK = {
    ("one token", "decay", True), ("one token", "sum", False), ("four masks", "ring", True),
    ("four masks", "sum", True), ("four masks", "decay", False), ("two groups", "ring", False),
    ("two groups", "decay", True), ("two groups", "sum", False), ("one KV head", "decay", True),
    ("one KV head", "ring", False), ("soft-capped", "ring", True), ("soft-capped", "sum", False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "spec", "padded"),
    [
        pytest.param(*case, marks=[] if case in _QUICK else pytest.mark.slow)
        for case in itertools.product(_PROMPTS, _SPECS, (False, True))
    ],
)
def test_against_reference(prompt: str, spec: str, padded: bool) -> None:
    """Every row, padding rows too; scratch is NaN, and so are the keys of padding."""
    _check(_PROMPTS[prompt], spec, padded)


def test_without_selection_there_is_no_mass() -> None:
    """An empty spec stands for a store that never selects."""
    states = torch.randn((1, 2, 5, 16), device=DEVICE)
    out, mass = kernel.prefill_attention(states, states, states, None, 1, "", 0.25)
    expected, _ = reference(states, states, states, None, 1, "", 0.25)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert mass.shape == (1, 1, 0, 5)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spec", ["ring", "decay", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [Shape(tokens=111, batch=4, dim=128), Shape(tokens=257, query=4, kv=4, dim=96), Shape(tokens=130, kv=1, dim=256)],
    ids=str,
)
def test_more_shapes(shape: Shape, dtype: torch.dtype, spec: str, padded: bool) -> None:
    """Longer prompts, wider heads."""
    _check(dataclasses.replace(shape, dtype=dtype), spec, padded)
