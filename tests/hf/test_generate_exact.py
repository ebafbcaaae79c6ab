"""Sparsity 0 with the model's own dtype: generated tokens are those of stock transformers."""

from __future__ import annotations

import pytest
import torch

from tests.support import assert_same_tokens, compiled, left_padded, novel, passage, tiny_model

FAMILIES = ("llama", "qwen3", "opt", "neox", "mistral")


@pytest.mark.parametrize(
    ("family", "batch_size"),
    [
        *((family, 4) for family in FAMILIES),
        *(pytest.param(family, 1, marks=() if family == "llama" else pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_random_models(family: str, batch_size: int) -> None:
    """256 tokens, batch 1 and a left-padded batch of 4."""
    model = tiny_model(family)
    ids, mask = left_padded(batch_size, 19)
    assert_same_tokens(model, compiled(model, sparsity=0.0), ids, mask, 256)


@pytest.mark.parametrize("batch_size", (pytest.param(1, marks=pytest.mark.slow), 4))
def test_trained_model(batch_size: int) -> None:
    """The same on trained weights and real text, through Inductor."""
    model, tokenizer = novel()
    ids = torch.cat([passage(tokenizer, 48, start=100 * row) for row in range(batch_size)])
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        mask[row, : 5 * row] = 0
    assert_same_tokens(model, compiled(model, inner="inductor", sparsity=0.0), ids, mask, 256)


def test_dense_policy_is_exact_at_any_sparsity() -> None:
    """`policy="dense"` ignores the sparsity."""
    model = tiny_model("llama")
    ids, mask = left_padded(2, 15)
    assert_same_tokens(model, compiled(model, policy="dense", sparsity=0.8), ids, mask, 32)


def test_long_working_set_is_exact() -> None:
    """A sparse run that keeps every row attends like a dense one: selection, gather and mass change nothing.

    With 0.6 the two shares round to the whole context at every length; with one half both may round down.
    """
    model = tiny_model("llama")
    ids, mask = left_padded(4, 21)
    assert_same_tokens(model, compiled(model, sparsity=1e-9, local_fraction=0.6), ids, mask, 64)


def test_the_comparison_can_fail() -> None:
    """The rule reports a model whose tokens differ."""
    model = tiny_model("llama")
    ids, mask = left_padded(1, 21)
    with pytest.raises(AssertionError, match="the stock model was sure of it"):
        assert_same_tokens(model, compiled(model, sparsity=0.9, refresh=0, sinks=0), ids, mask, 64)
