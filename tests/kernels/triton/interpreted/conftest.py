"""Numerics of the Triton kernels, on the GPU if there is one, else in Triton's interpreter.

The interpreter has to be switched on before Triton is imported, so `../test_interpreted.py` runs these files in
processes of their own. By hand: `TRITON_INTERPRET=1 pytest tests/kernels/triton/interpreted`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if _INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_in_the_interpreter() -> Iterator[None]:
    """The interpreter keeps bfloat16 as uint16 (seen in 3.7.1): its `dot` multiplies those integers, its casts from
    integers write them, and its casts from float32 cut off instead of rounding. Here these three go through float32."""
    if not _INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        source = widened(source)
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.atleast_1d(source.data.astype(np.float32))).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield
