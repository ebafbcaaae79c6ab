"""At most so many rewrites: to find the one that breaks a model (`ALISA_FUEL=n`, `alisa bisect`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import AlisaError

#: The reason of what stays dense when the fuel is used up.
OUT_OF_FUEL = "out of fuel"

_used = 0
_limits: list[int | None] = []


def limit() -> int | None:
    """How many rewrites are allowed since the process, or the innermost `limited` block, began; None = any number."""
    if _limits:
        return _limits[-1]
    text = os.environ.get("ALISA_FUEL", "")
    if not text:
        return None
    if not text.isdecimal():
        raise AlisaError("ALISA_FUEL is not a number of rewrites", got=repr(text), expected="an integer >= 0")
    return int(text)


def used() -> int:
    """Rewrites so far."""
    return _used


def take() -> int | None:
    """The number of the next rewrite, from 1; None if there is no fuel left for it."""
    global _used
    allowed = limit()
    if allowed is not None and _used >= allowed:
        return None
    _used += 1
    return _used


@contextlib.contextmanager
def limited(rewrites: int | None) -> Iterator[None]:
    """Inside, at most so many rewrites, counted from 1; None = any number. For one thread at a time."""
    global _used
    outside = _used
    _limits.append(rewrites)
    _used = 0
    try:
        yield
    finally:
        _limits.pop()
        _used = outside
