"""Where the Triton kernels run in a test (the GPU, or CPU tensors under Triton's interpreter), and in which memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

#: Largest error, relative or absolute, of a result in this dtype against the reference in float64.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def poison_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory from `torch.empty` hold NaN (integers: their largest value) until the end of the test."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
