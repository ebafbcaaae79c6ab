"""C++ kernels of the decode step on CPU: built at the first call that can use them, by torch's own toolchain.

Each op's folder has its `native.cpp`; together they are one library, which registers itself for CPU tensors below
Python, so later calls never come here. Torch's cache directory keeps the build. Where nothing can be built the
plain-torch references serve, with one warning. ALISA_NATIVE=0 in the environment forces the references; once the
kernels are registered they stay.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alisa_compile.compat import load_cpp_library  # absolute: mypy also sees this folder as `kernels`

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_lock = threading.Lock()
_registered: bool | None = None  # None = not tried yet


def native_first(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op for every device that registers the native kernels when CPU tensors first come by."""

    def implementation(*args: Any) -> Any:
        tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
        if all(tensor.device.type == "cpu" for tensor in tensors) and register_native():
            return getattr(torch.ops.alisa, name).default(*args)
        return reference(*args)

    return implementation


def register_native() -> bool:
    """Build, load and register the kernels if that was not tried yet; whether they serve now."""
    global _registered
    if os.environ.get("ALISA_NATIVE") == "0":
        return False
    with _lock:
        if _registered is None:
            _registered = _try_register()
        return _registered


def native_source() -> str:
    """The C++ of all kernels as one text: the compile cache is keyed by the text, and would not see included files."""
    files = (_FOLDER / "native.h", *sorted(_FOLDER.glob("*/native.cpp")), _FOLDER / "register.cpp")
    lines = (line for file in files for line in file.read_text().splitlines())
    return "\n".join(line for line in lines if not line.startswith(('#include "', "#pragma once"))) + "\n"


def _try_register() -> bool:
    try:
        status = load_cpp_library(native_source()).alisa_register()
        if status != 0:
            raise RuntimeError("torch refused to register the kernels")
    except Exception as error:  # whatever a broken toolchain may raise must not stop a model that can run without it
        reason = str(error).strip().splitlines() or [""]
        logger.warning(
            "CPU kernels could not be built, so the slower plain-torch versions are used (%s: %s). A C++ compiler "
            "on the PATH or in CXX makes decoding several times faster; ALISA_NATIVE=0 silences this.",
            type(error).__name__,
            reason[0],
        )
        return False
    return True
