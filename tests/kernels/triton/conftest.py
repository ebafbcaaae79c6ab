"""Nothing here is collected where Triton is not installed; `interpreted/` needs the interpreter or a GPU besides."""

from __future__ import annotations

from alisa_compile.kernels.triton_launch import is_installed

collect_ignore_glob = [] if is_installed() else ["*"]
