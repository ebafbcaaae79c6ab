"""Where the Triton kernels run in a test (the GPU, or CPU tensors under Triton's interpreter), and in which memory;
and tests that need a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

#: Largest error, relative or absolute, of a result in this dtype against the reference in float64.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


_ROOT = Path(__file__).resolve().parents[3]


def run_tests(path: Path, marks: str, variables: dict[str, str]) -> None:
    """Run a file or folder of tests in a process with these environment variables; all pass, and none is skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counts = re.search(r"(\d+) passed", result.stdout)
    assert counts and int(counts[1]) > 0 and "skipped" not in result.stdout, result.stdout[-2000:]


def poison_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory from `torch.empty` hold NaN (integers: their largest value) until the end of the test."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
