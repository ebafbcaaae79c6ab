"""Triton kernels as part of the code that Inductor generates, in the place of a call of the op that launches them.

While AOTAutograd traces a graph for a GPU, an op's launch function runs on the traced tensors, and the kernels that it
launches enter the graph: as `triton_kernel_wrapper_functional` nodes, whose arguments Inductor may change in place. So
Inductor schedules and times them with its own kernels, plans their scratch memory, writes their source into the code
that it caches, and calls them without Python of ours. An op that a graph calls itself stays one call of Python: what a
kernel cannot hold, and graphs of a whole prompt, where a call's microseconds do not count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from alisa_compile import compat  # absolute: mypy also sees this folder as `kernels`

from .triton_launch import UnsupportedError, is_installed, launch_function

_is_tracing = ContextVar("alisa_is_tracing", default=False)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    token = _is_tracing.set(True)
    try:
        yield
    finally:
        _is_tracing.reset(token)


def traceable(kernel: Any) -> Any:
    """A kernel in the form to launch it in: as a node while a graph is traced, else as it is."""
    return torch.library.wrap_triton(kernel) if _is_tracing.get() else kernel


def layer_code(layer: int) -> int:
    """2 * layer + 3: the form in which kernels get a layer's number. Inductor makes another kernel for an argument that
    is 1, and for one that 16 divides, whatever `do_not_specialize` says; this one is never either."""
    return 2 * layer + 3


def is_tracing() -> bool:
    """Whether a launch function runs to be traced."""
    return _is_tracing.get()


def inline_kernels(library: torch.library.Library, name: str, reference: Callable[..., Any]) -> None:
    """Let `alisa::name` of CUDA tensors enter graphs as the kernels of the `triton.py` beside its reference."""
    launch = launch_function(reference)

    def trace(mode: Any, call_op: Callable[[], Any], *args: Any) -> Any:
        if not is_installed() or not any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args):
            return call_op()
        try:
            with mode, _tracing():
                return launch()(*args)
        except UnsupportedError:
            return call_op()

    compat.trace_op_as(library, f"alisa::{name}", trace)
