"""`alisa::quantize_row`: the body is the reference; AOTAutograd inlines it, so Inductor fuses it into its producer."""

from __future__ import annotations

import torch

from ..library import define_decomposed

_LARGEST = 127


def quantize_row(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 along the last dimension.

    rows: `[..., D]`, any float dtype. Returns `[..., D]` int8 and `[...]` float32 scales with
    |rows - int8 * scale| <= scale / 2. Zero rows get scale 0 and decode to zeros. Rows with an infinity or NaN have no
    finite scale; they decode to NaN rather than to a plausible wrong value.
    """
    values = rows.float()
    scale = values.abs().amax(-1) / _LARGEST
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    quantized = (values * inverse.unsqueeze(-1)).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return quantized, scale


def dequantize_row(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `quantize_row`: `[..., D]` int8 and `[...]` float32 to `[..., D]` of `dtype`."""
    return (quantized.float() * scale.unsqueeze(-1)).to(dtype)


define_decomposed("quantize_row(Tensor rows) -> (Tensor, Tensor)", quantize_row)
