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


class TierError(AlisaError, RuntimeError):
    """Rows could not be moved between the device, the host and the disk."""


class ProfileError(AlisaError, ValueError):
    """A machine profile cannot be read or holds something else."""


class InfeasibleError(AlisaError, ValueError):
    """No placement of the rows keeps within the budgets.

    smallest_budgets: by tier, the smallest budget in bytes that works while the others stay as they are; a tier that
    cannot help is absent. longest_context: the most tokens (prompt and new) that the given budgets allow.
    """

    def __init__(
        self,
        what: str,
        *,
        smallest_budgets: dict[str, int],
        longest_context: int,
        got: object = None,
        expected: object = None,
        fix: str = "",
    ) -> None:
        super().__init__(what, got=got, expected=expected, fix=fix)
        self.smallest_budgets, self.longest_context = smallest_budgets, longest_context


class GraphError(AlisaError, RuntimeError):
    """A graph breaks the rules of `alisa_compile.passes.spec`; raised by the checker, never by user input."""
