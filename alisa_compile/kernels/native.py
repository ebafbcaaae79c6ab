"""C++ kernels of the decode step on CPU: built at the first call that can use them, by torch's own toolchain.

Each op's folder has its `native.cpp`; together they are one library, which registers itself for CPU tensors below
Python, so later calls never come here. Torch's cache directory keeps the build. Where nothing can be built the
plain-torch references serve, with one warning. ALISA_NATIVE=0 in the environment forces the references; once the
kernels are registered they stay.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from alisa_compile.compat import load_cpp_library  # absolute: mypy also sees this folder as `kernels`

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_lock = threading.Lock()
_registered: bool | None = None  # None = not tried yet
_library: Any = None  # the `ctypes.CDLL`, once the kernels are registered


def native_first(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op for every device that registers the native kernels when CPU tensors first come by.

    name: with the overload's after a dot, unless it is the default one.
    """
    packet, _, overload = name.partition(".")

    def implementation(*args: Any) -> Any:
        tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
        if all(tensor.device.type == "cpu" for tensor in tensors) and register_native():
            return getattr(getattr(torch.ops.alisa, packet), overload or "default")(*args)
        return reference(*args)

    return implementation


def register_native() -> bool:
    """Build, load and register the kernels if that was not tried yet; whether they serve now."""
    global _registered
    if os.environ.get("ALISA_NATIVE") == "0" and not _registered:
        return False
    with _lock:
        if _registered is None:
            _registered = _try_register()
        return _registered


def tiers_calls() -> dict[str, Callable[[int], bytes | None]]:
    """The functions of `tiers.cpp` by name, once the kernels serve.

    Each takes the number of a store's state and returns the message of a transfer that failed.

    They are no ops: a dispatch mode (tracing) would get in the way of a state that is collected under it.
    """
    calls = {}
    for name in ("drain", "recover", "close"):
        calls[name] = getattr(_library, f"alisa_tiers_{name}")
        calls[name].argtypes, calls[name].restype = [ctypes.c_int64], ctypes.c_char_p
    return calls


def interval_calls() -> tuple[Callable[[int], None], Callable[[Any, int], int]] | None:
    """The functions of `tiers.cpp` that keep and hand over intervals; None while the kernels do not serve.

    The first takes 1 to start and 0 to end; the second a pointer to int64 `[N, 6]` and N, and returns how many came.
    """
    if _library is None:
        return None
    record, recorded = _library.alisa_tiers_record, _library.alisa_tiers_recorded
    record.argtypes, record.restype = [ctypes.c_int64], None
    recorded.argtypes, recorded.restype = [ctypes.POINTER(ctypes.c_int64), ctypes.c_int64], ctypes.c_int64
    return record, recorded


def native_source() -> str:
    """The C++ of all kernels as one text: the compile cache is keyed by the text, and would not see included files."""
    seen: set[Path] = set()

    def lines(file: Path) -> Iterator[str]:
        if file in seen:
            return
        seen.add(file)
        for line in file.read_text().splitlines():
            if line.startswith('#include "'):
                yield from lines((file.parent / line.split('"')[1]).resolve())
            elif not line.startswith("#pragma once"):
                yield line

    files = (*sorted(_FOLDER.glob("*/native.cpp")), _FOLDER / "tiers.cpp", _FOLDER / "register.cpp")
    return "\n".join(line for file in files for line in lines(file.resolve())) + "\n"


def _try_register() -> bool:
    global _library
    try:
        library = load_cpp_library(native_source())
        if library.alisa_register() != 0:
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
    _library = library
    return True
