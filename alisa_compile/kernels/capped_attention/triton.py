"""The soft-cap of scores inside Triton kernels; `op.soft_capped` says what it computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_capped(logit, CAP: tl.constexpr):
    """`CAP * tanh(logit / CAP)`, both in the same unit."""
    ratio = logit / CAP
    faded = tl.exp2(tl.abs(ratio) * -2.8853900817779268)  # exp(-2 |ratio|)
    capped = (1.0 - faded) / (1.0 + faded) * CAP
    return tl.where(ratio < 0.0, -capped, capped)
