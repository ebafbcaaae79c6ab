"""The `alisa::` operator namespace.

`Library.define` + `impl` dispatches in a few microseconds a call; `torch.library.custom_op` costs about ten times as
much, which a decode step would pay twice per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .inlining import inline_kernels
from .native import native_first

LIBRARY = torch.library.Library("alisa", "DEF")

# A call of an op runs outside the capture of a CUDA graph: it may read a length on the host. What Inductor gets of an
# op in its place, the kernels of `inlining.py` and decomposed ones, may be captured.
_READS_ON_HOST = (torch.Tag.cudagraph_unsafe,)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    native: bool = False,
    cuda: Callable[..., Any] | None = None,
    inlined: bool = False,
) -> None:
    """Define one op for every device: `schema` without the namespace, its implementation and its shape function.

    native: `native.cpp` has a kernel of it for CPU tensors. cuda: the implementation for CUDA tensors, if it has one.
    inlined: in a graph for CUDA tensors, Inductor gets the Triton kernels in the place of a call of the op.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=_READS_ON_HOST)
    if inlined:
        inline_kernels(LIBRARY, name, implementation)
    if native:
        implementation = native_first(name, implementation)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"alisa::{name}", fake, lib=LIBRARY)


def define_decomposed(schema: str, implementation: Callable[..., Any]) -> None:
    """Define an op that AOTAutograd replaces by its body, so that Inductor fuses it with its neighbours."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
