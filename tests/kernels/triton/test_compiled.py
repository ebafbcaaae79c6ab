"""Every kernel, in every configuration that its autotuner may try, compiled for GPUs of four generations."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch

from alisa_compile.kernels.prefill_attention import triton as prefill
from alisa_compile.kernels.selection import SelectionSpec
from alisa_compile.kernels.swa_attention import triton as swa
from tests.kernels.triton.compiling import SHARED_MEMORY, check_fits, compile_launches


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads and dtype of a model; rows are int8 where `int8`."""

    query: int = 32
    kv: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False
    soft_cap: float = 0.0


_LLAMA = Shape()
_GEMMA2 = Shape(query=16, kv=8, dim=256, soft_cap=50.0)  # of 9B
_MORE = [
    Shape(int8=True),
    Shape(dtype=torch.float16),
    Shape(dtype=torch.float32),
    Shape(dim=64),
    Shape(dim=32, int8=True),
    Shape(dim=80, dtype=torch.float16, kv=32),
    Shape(dim=96, int8=True),
    Shape(dim=256, query=16),
    Shape(dim=256, query=16, int8=True, dtype=torch.float16),
    Shape(dim=256, query=16, dtype=torch.float32),
    Shape(dim=64, query=71, kv=1),
    Shape(dim=128, query=48, kv=1),
    Shape(dim=64, query=71, kv=1, dtype=torch.float32),
    _GEMMA2,
    dataclasses.replace(_GEMMA2, int8=True),
    dataclasses.replace(_GEMMA2, dtype=torch.float32),
]


def _decode(shape: Shape, *, sparse: bool = True, padded: bool = True, groups: int = 1) -> None:
    layers, batch, capacity = 2, 3, 100
    slots = layers * batch * groups * capacity
    row = (slots, 2, shape.kv // groups)
    lists = (layers, batch, groups)
    swa.swa_attention(
        torch.zeros((batch, shape.query, 1, shape.dim), dtype=shape.dtype),
        torch.zeros((*row, shape.dim), dtype=torch.int8 if shape.int8 else shape.dtype),
        torch.zeros(row) if shape.int8 else None,
        torch.zeros((*lists, capacity), dtype=torch.int32),
        torch.zeros(layers, dtype=torch.int64),
        torch.zeros((batch, capacity), dtype=torch.bool) if padded else None,
        torch.zeros((*lists, 20), dtype=torch.int32) if sparse else None,
        torch.zeros(lists, dtype=torch.int32) if sparse else None,
        0,
        0.1,
        shape.soft_cap,
    )


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_decode_attention(capability: int) -> None:
    """Both kernels for the heads of Llama 3: no spills, and room in shared memory."""
    check_fits(compile_launches(capability, lambda: _decode(_LLAMA)))


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("shape", _MORE, ids=str)
def test_decode_attention_of_other_models(shape: Shape, capability: int) -> None:
    """Other head sizes, groups and dtypes, each in its hardest form."""
    check_fits(compile_launches(capability, lambda: _decode(shape)))


def test_soft_capped_decode_attention() -> None:
    """The heads of Gemma 2, on one GPU; the slow tests have the others."""
    check_fits(compile_launches(90, lambda: _decode(_GEMMA2)))


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_decode_attention_in_other_modes(capability: int) -> None:
    """Dense, without padding, one index set a head."""
    check_fits(compile_launches(capability, lambda: _decode(_LLAMA, sparse=False, padded=False)))
    check_fits(compile_launches(capability, lambda: _decode(_LLAMA, padded=False, groups=8)))


# The launch function leaves float32 to torch, and rows are int8 only once they are stored.
_PROMPTS = [shape for shape in _MORE if not shape.int8 and shape.dtype != torch.float32]


def _prefill(shape: Shape, rank: str, *, padded: bool = True, groups: int = 1) -> None:
    spec = SelectionSpec(Fraction(1, 10), Fraction(1, 10), rank).encode() if rank else ""
    heads = (shape.query, shape.kv, shape.kv)
    states = (torch.zeros((2, 50, count, shape.dim), dtype=shape.dtype).transpose(1, 2) for count in heads)
    prefill.prefill_attention(*states, torch.ones((2, 50)) if padded else None, groups, spec, 0.1, shape.soft_cap)


@pytest.mark.parametrize(
    "capability", [pytest.param(each, marks=[] if each in (75, 90) else pytest.mark.slow) for each in SHARED_MEMORY]
)
def test_prefill_attention(capability: int) -> None:
    """Attention, and the mass of the last rows or of all, for the heads of Llama 3."""
    check_fits(compile_launches(capability, lambda: _prefill(_LLAMA, "ring")))
    check_fits(compile_launches(capability, lambda: _prefill(_LLAMA, "sum")))


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("shape", _PROMPTS, ids=str)
def test_prefill_attention_of_other_models(shape: Shape, capability: int) -> None:
    """Other head sizes, groups and dtypes."""
    if capability < 80 and shape.soft_cap:
        return  # the launch function leaves older GPUs to torch, and 24 bytes would be spilled
    check_fits(compile_launches(capability, lambda: _prefill(shape, "ring")))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])  # the launch function leaves older GPUs to torch
@pytest.mark.parametrize("shape", [_LLAMA, Shape(dim=256, query=16), Shape(dim=64), _GEMMA2], ids=str)
def test_prefill_attention_in_other_modes(shape: Shape, capability: int) -> None:
    """Without padding, one index set a head; the mass of all rows; no mass."""
    check_fits(compile_launches(capability, lambda: _prefill(shape, "ring", padded=False, groups=shape.kv)))
    check_fits(compile_launches(capability, lambda: _prefill(shape, "sum")))
    check_fits(compile_launches(capability, lambda: _prefill(shape, "", padded=False)))
