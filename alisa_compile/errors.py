"""The errors a user can meet. Every message says what happened, what was given, what was expected and what to do."""

from __future__ import annotations


class AlisaError(Exception):
    """Base class of every error raised on purpose by alisa."""

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str = "") -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        parts = [what]
        if got is not None:
            parts.append(f"got: {got}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"to fix: {fix}")
        super().__init__("; ".join(parts))


class ConfigError(AlisaError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class NotAvailableError(AlisaError, NotImplementedError):
    """An option or operation exists in the design but is not available yet; it is refused, never ignored."""


class CacheError(AlisaError, RuntimeError):
    """A cache is used in a way that its contents do not allow (other batch size, other model, no room left)."""


class GraphError(AlisaError, RuntimeError):
    """A graph breaks the rules of `alisa_compile.passes.spec`; raised by the checker, never by user input."""
