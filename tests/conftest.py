"""Each test starts without compiled code of another, and with the generate hook in place."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ALISA_CHECK", "1")  # every graph of every test goes through passes/spec.py
os.environ.setdefault("TORCH_WARM_POOL", "0")  # Inductor's pool compiles Triton alone; each process imports torch

import alisa_compile
from alisa_compile.kernels import native

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, for long if the machine is busy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    alisa_compile.enable()
    yield


@pytest.fixture
def built() -> None:
    """Skips where no compiler is: native kernels can then be neither compared nor measured."""
    if not native.register_native():
        pytest.skip("the native kernels cannot be built here")
