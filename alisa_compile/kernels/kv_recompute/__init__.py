"""See `op.py` for the contract and `reference.py` for the meaning."""

from __future__ import annotations

from . import op, reference

__all__ = ["op", "reference"]
