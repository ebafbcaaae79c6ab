"""Runs `generated/` in a process that has been told of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.triton.running import run_tests

_FOLDER = Path(__file__).parent / "generated"


def test_generated_code() -> None:
    """What Inductor writes for a decode graph on a GPU."""
    run_tests(_FOLDER, "not slow", {"ALISA_TEST_GENERATED": "1"})


@pytest.mark.slow
def test_more_generated_code() -> None:
    """The same for more kinds of GPU."""
    run_tests(_FOLDER, "slow", {"ALISA_TEST_GENERATED": "1"})
