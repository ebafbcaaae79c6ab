"""Triton kernels of the ops for CUDA tensors: found at the first call, and the references where they cannot serve.

An op's folder has `triton.py`: plain `@triton.jit` functions, and one function with the reference's name and signature
that launches them. It reads nothing from the device on the host, so that a CUDA graph can hold it. The package never
imports Triton before a CUDA tensor comes by: CPU users need none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alisa_compile.errors import NotAvailableError  # absolute: mypy also sees this folder as `kernels`

logger = logging.getLogger(__name__)

_reported: set[tuple[str, str]] = set()


class UnsupportedError(Exception):
    """Raised by a launch function, before it has written anything, with the reason why the reference must serve."""


@functools.cache
def is_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return importlib.util.find_spec("triton") is not None


def launch_function(reference: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """Finds, when called, the function of the same name in the `triton.py` beside `reference`."""

    @functools.cache
    def find() -> Callable[..., Any]:
        module = importlib.import_module(reference.__module__.rpartition(".")[0] + ".triton")
        function: Callable[..., Any] = getattr(module, reference.__name__)
        return function

    return find


def triton_first(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op for CUDA tensors: the Triton function beside `reference`, or else `reference`."""
    launch = launch_function(reference)

    def implementation(*args: Any) -> Any:
        if not is_installed():
            return _fall_back(reference, "Triton is not installed", *args)
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda)
        try:
            with torch.cuda.device(device):
                return launch()(*args)
        except UnsupportedError as reason:
            return _fall_back(reference, str(reason), *args)

    return implementation


def _fall_back(reference: Callable[..., Any], reason: str, *args: Any) -> Any:
    name = reference.__name__
    if torch.cuda.is_current_stream_capturing():
        raise NotAvailableError(
            f"alisa::{name} cannot be captured in a CUDA graph: its plain-torch version waits for values from the GPU",
            got=reason,
            fix="compile without mode='reduce-overhead' and without options={'triton.cudagraphs': True}",
        )
    if (name, reason) not in _reported:
        _reported.add((name, reason))
        logger.warning("alisa::%s uses its slower plain-torch version on this GPU: %s.", name, reason)
    return reference(*args)


def require(condition: bool, reason: str) -> None:
    """Leave the call to the reference unless `condition` holds."""
    if not condition:
        raise UnsupportedError(reason)


def rows_with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where its last dimension is strided: kernels read rows of adjacent elements."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for CPU tensors (Triton's interpreter) few, so that programs are long."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def tuned(key: Sequence[str], fits: Callable[..., bool], *configs: dict[str, int]) -> Callable[[Any], Any]:
    """`triton.autotune` over a few configurations: constants of the kernel, `num_warps` and `num_stages`.

    The first call with new values of the arguments named in `key`, or with other dtypes, measures them on the GPU; it
    must not happen inside a capture. The interpreter takes the first. fits: called with `config`, the GPU's compute
    `capability` (80 = 8.0) and the kernel's arguments; whether the configuration is one for them.
    """
    import triton  # only modules that have imported it already come here

    def fitting(candidates: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
        capability = triton.runtime.driver.active.get_current_target().arch
        arguments = {**named, **constants}
        return [config for config in candidates if fits(config=config, capability=capability, **arguments)]

    listed = [
        triton.Config(
            {name: value for name, value in config.items() if name not in ("num_warps", "num_stages")},
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        for config in (configs[:1] if triton.knobs.runtime.interpret else configs)
    ]
    tuner: Callable[[Any], Any] = triton.autotune(listed, list(key), prune_configs_by={"early_config_prune": fitting})
    return tuner
