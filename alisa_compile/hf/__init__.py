"""Everything that knows transformers: the cache, the generate hook, the attention and mask functions."""

from __future__ import annotations


def install() -> None:
    """Register the attention implementation and the `generate` hook."""
    from . import attention, generate

    attention.register()
    generate.enable()
