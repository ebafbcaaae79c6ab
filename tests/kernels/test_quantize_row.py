"""`alisa::quantize_row`: the error bound, the odd rows, the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from alisa_compile.kernels.quantize_row import dequantize_row
from alisa_compile.runtime.tiers import RowForm, RowShape
from tests.kernels.harness import ops

_ROUNDING = 1 + 1e-4  # the product with 1 / scale is rounded to float32: 127 units of 2**-24, of a half


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 999),
    st.sampled_from([1, 8, 63, 64, 128]),
    st.integers(-25, 25),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_error_is_at_most_half_a_scale(seed: int, width: int, exponent: int, dtype: torch.dtype) -> None:
    """|x - q s| <= s / 2 at every magnitude, s is the largest value over 127, and codes are symmetric."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn((2, 3, width), generator=generator) * 10.0**exponent).to(dtype)
    quantized, scale = ops.quantize_row(rows)
    assert quantized.dtype == torch.int8 and quantized.shape == rows.shape
    assert scale.dtype == torch.float32 and scale.shape == rows.shape[:-1]
    error = (rows.double() - quantized.double() * scale.double().unsqueeze(-1)).abs()
    assert bool((error <= scale.double().unsqueeze(-1) / 2 * _ROUNDING).all())
    torch.testing.assert_close(scale.double(), rows.double().abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert int(quantized.min()) >= -127


def test_zero_rows_decode_to_zeros() -> None:
    """Scale 0, codes 0, no division by zero."""
    quantized, scale = ops.quantize_row(torch.zeros((2, 16)))
    assert not bool(quantized.any()) and not bool(scale.any())
    assert torch.equal(dequantize_row(quantized, scale, torch.float32), torch.zeros((2, 16)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_without_a_finite_scale_decode_to_nan(bad: float) -> None:
    """An overflow upstream stays visible, and only in its own row."""
    rows = torch.ones((3, 8))
    rows[1, 2] = bad
    decoded = dequantize_row(*ops.quantize_row(rows), torch.float32)
    assert bool(decoded[1].isnan().all())
    assert torch.equal(decoded[[0, 2]], rows[[0, 2]])


def test_extremes_keep_their_value() -> None:
    """The largest value of a row survives, whatever its sign."""
    rows = torch.tensor([[0.1, -4.0, 2.0], [3.0, 1e-3, -0.5]])
    quantized, scale = ops.quantize_row(rows)
    assert quantized.tolist() == [[3, -127, 64], [127, 0, -21]]
    decoded = dequantize_row(quantized, scale, torch.float64)
    torch.testing.assert_close(decoded[0, 1].item(), -4.0, rtol=1e-6, atol=0)


def test_op_is_decomposed_when_traced() -> None:
    """No opaque call is left in a graph, so that Inductor can fuse the body with what made the row."""
    traced = make_fx(lambda rows: ops.quantize_row(rows))(torch.randn(2, 8))
    assert "alisa" not in traced.code


@pytest.mark.parametrize(("head_dim", "largest"), [(128, 0.53), (64, 0.57)])
@pytest.mark.parametrize("heads", [1, 8])
def test_bytes_of_an_int8_row_scales_included(heads: int, head_dim: int, largest: float) -> None:
    """The saving that `kv_dtype="int8"` promises over bfloat16."""
    plain = RowShape(heads, head_dim, torch.bfloat16, RowForm.KV)
    small = RowShape(heads, head_dim, torch.bfloat16, RowForm.KV_INT8)
    assert plain.bytes_per_row == 2 * heads * head_dim * 2
    assert small.bytes_per_row == 2 * heads * (head_dim + 4)
    assert small.bytes_per_row <= largest * plain.bytes_per_row
