"""Runs each file of `interpreted/` in a process with Triton's interpreter on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.triton.running import run_tests

_FOLDER = Path(__file__).parent / "interpreted"
_FILES = sorted(path.name for path in _FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", _FILES)
def test_numerics(name: str) -> None:
    """Every kernel against its reference."""
    run_tests(_FOLDER / name, "not slow", {"TRITON_INTERPRET": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("name", _FILES)
def test_more_numerics(name: str) -> None:
    """The same over more shapes, and those that the interpreter is slow for."""
    run_tests(_FOLDER / name, "slow", {"TRITON_INTERPRET": "1"})
