"""One fingerprint for everything of ours that shapes generated code, so that torch's caches never serve stale code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import fx

from ..compat import CustomGraphPass

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = ("*.py", "*.cpp", "*.h")


def package_fingerprint(root: Path = _PACKAGE, extra: Iterable[str] = ()) -> str:
    """SHA-256 over the package's sources, in order of path, and `extra`.

    Lowerings, decompositions and kernels are not part of torch's own keys: without this, an edited lowering would be
    served from the cache as it was before the edit.
    """
    digest = hashlib.sha256()
    paths = sorted({path for pattern in _SOURCES for path in root.rglob(pattern)})
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for text in extra:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def source_digest(function: Callable[..., object]) -> str:
    """SHA-256 of the file that defines a function; its code and constants where there is no file. Empty for functions
    of this package, which `package_fingerprint` covers."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    path = Path(code.co_filename)
    if path.is_relative_to(_PACKAGE):
        return ""
    content = path.read_bytes() if path.is_file() else code.co_code + repr(code.co_consts).encode()
    return hashlib.sha256(content).hexdigest()


class FingerprintPass(CustomGraphPass):
    """A post-grad pass that changes nothing: its uuid carries the fingerprint into Inductor's cache key."""

    def __init__(self, pass_names: Iterable[str]) -> None:
        self._uuid = package_fingerprint(extra=pass_names)

    def __call__(self, graph: fx.Graph) -> None:
        return None

    def uuid(self) -> str:
        return self._uuid
