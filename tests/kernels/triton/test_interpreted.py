"""Runs each file of `interpreted/` in a process with Triton's interpreter on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent / "interpreted"
_ROOT = Path(__file__).resolve().parents[3]
_FILES = sorted(path.name for path in _FOLDER.glob("test_*.py"))


def _run(name: str, marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(_FOLDER / name)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counts = re.search(r"(\d+) passed", result.stdout)
    assert counts and int(counts[1]) > 0 and "skipped" not in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("name", _FILES)
def test_numerics(name: str) -> None:
    """Every kernel against its reference."""
    _run(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", _FILES)
def test_more_numerics(name: str) -> None:
    """The same over more shapes, and those that the interpreter is slow for."""
    _run(name, "slow")
