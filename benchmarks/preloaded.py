"""Imported once, before the rows' processes are split off: what each of them would otherwise wait two seconds for."""

from __future__ import annotations

import tabulate  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import transformers  # noqa: F401

from alisa_compile.kernels import native
from benchmarks import contenders, outcome  # noqa: F401

native.register_native()
