"""Model family x generation mode against stock transformers, sparsity 0. `make test-all` writes the table of results.

By default: every mode on Llama. Slow: all others, and Llama, OPT, GPT-NeoX and Qwen3 under Inductor.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import alisa_compile
from alisa_compile import CacheError
from tests.hf import test_families as families
from tests.hf.modes import MODES
from tests.support import compiled

_DEFAULT = "Llama"
_INDUCTOR = ("Llama", "OPT", "GPT-NeoX / Pythia", "Qwen3")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Instead of the one in conftest.py: modes of a family run one after the other and share its graphs."""
    alisa_compile.enable()


@functools.lru_cache(maxsize=1)
def _pair(family: str, inner: str) -> tuple[Any, Any]:
    torch._dynamo.reset()
    make = (families.REWRITTEN.get(family) or families.REFUSED[family])[0]
    stock = families._model(make)
    return stock, compiled(stock, inner, sparsity=0.0)


def _cases() -> list[Any]:
    cases = [(family, "aot_eager") for family in (*families.REWRITTEN, *families.REFUSED)]
    cases += [(family, "inductor") for family in _INDUCTOR]
    return [
        pytest.param(
            family,
            inner,
            mode,
            id=f"{family}-{inner}-{mode}",
            marks=() if (family, inner) == (_DEFAULT, "aot_eager") else (pytest.mark.slow,),
        )
        for family, inner in cases
        for mode in MODES
    ]


@pytest.mark.parametrize(("family", "inner", "mode"), _cases())
def test_mode(family: str, inner: str, mode: str, record_property: Any) -> None:
    """Equal to stock; or equal and left dense with a reason; or no AlisaCache of this model, by a typed error."""
    row = f"{family} (Inductor)" if inner == "inductor" else family
    record_property("support", (row, mode, "dense" if family in families.REFUSED else "yes"))
    try:
        MODES[mode](*_pair(family, inner))
    except CacheError as error:
        if family not in families.REFUSED or "no full-attention layer that AlisaCache could hold" not in error.what:
            raise
        record_property("support", (row, mode, "no cache"))
