"""The `alisa::` operator namespace.

`Library.define` + `impl` dispatches in a few microseconds a call; `torch.library.custom_op` costs about ten times as
much, which a decode step would pay twice per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .native import native_first

LIBRARY = torch.library.Library("alisa", "DEF")

# An op that reads a length on the host has to run outside the capture of a CUDA graph.
_READS_ON_HOST = (torch.Tag.cudagraph_unsafe,)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    native: bool = False,
    cuda: Callable[..., Any] | None = None,
    capturable: bool = False,
) -> None:
    """Define one op for every device: `schema` without the namespace, its implementation and its shape function.

    native: `native.cpp` has a kernel of it for CPU tensors. cuda: the implementation for CUDA tensors, if it has one.
    capturable: that one reads nothing on the host, so that a CUDA graph may hold it.
    """
    name = schema.split("(", 1)[0]
    if native:
        implementation = native_first(name, implementation)
    LIBRARY.define(schema, tags=() if capturable else _READS_ON_HOST)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"alisa::{name}", fake, lib=LIBRARY)


def define_decomposed(schema: str, implementation: Callable[..., Any]) -> None:
    """Define an op that AOTAutograd replaces by its body, so that Inductor fuses it with its neighbours."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
