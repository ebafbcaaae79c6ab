"""Attention whose scores are soft-capped, as torch's own cannot be."""

from __future__ import annotations

from . import op
from .op import capped_attention, soft_capped

__all__ = ["capped_attention", "op", "soft_capped"]
