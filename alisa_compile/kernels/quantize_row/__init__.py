"""INT8 rows: one symmetric scale per token and KV head."""

from __future__ import annotations

from . import op
from .op import dequantize_row, quantize_row

__all__ = ["dequantize_row", "op", "quantize_row"]
