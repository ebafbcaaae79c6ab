"""Mistakes with caches: each is a typed error with what, got, expected and what to do, and the cache survives it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaConfig

import alisa_compile
from alisa_compile import AlisaCache, AlisaError, CacheError, ConfigError, NotAvailableError, backend
from alisa_compile.hf import generate as hook
from tests import support
from tests.support import left_padded, recorded_compiles, tiny_model

NEW = 4


@pytest.fixture
def stock() -> Any:
    return tiny_model("llama", layers=2, seed=3)


@pytest.fixture
def ids() -> torch.Tensor:
    return left_padded(1, 20, seed=4)[0]


def compiled(model: Any, **options: Any) -> Any:
    return support.compiled(model, inner="eager", **options)


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


# Options


def test_bad_options_from_generate(stock: Any, ids: torch.Tensor) -> None:
    """generate raises our own error, not one of torch's around it, and leaves the model as it was."""
    before = set(vars(stock))
    for options, kind, text in (
        ({"sparsty": 0.5}, ConfigError, "unknown option 'sparsty'.*did you mean 'sparsity'"),
        ({"sparsity": 1.0}, ConfigError, r"got: 1\.0; expected: a number in \[0, 1\)"),
    ):
        model = torch.compile(stock, backend="alisa", options=options)
        with pytest.raises(kind, match=text) as caught:
            generate(model, ids)
        assert type(caught.value) is kind
    assert set(vars(stock)) - before <= {"_is_torch_compile"}
    assert not hook._installed and hook._current.get() is None


def test_bad_options_from_plain_forward() -> None:
    """There torch wraps what a backend raises; our error is inside it and its whole text is in the message."""
    module = torch.compile(torch.nn.Linear(2, 2), backend="alisa", options={"kv_dtyp": "int8"})
    text = r"ConfigError: unknown option 'kv_dtyp'.*did you mean 'kv_dtype'"
    with pytest.raises(BackendCompilerFailed, match=text) as caught:
        module(torch.ones(1, 2))
    assert type(caught.value.inner_exception) is ConfigError


@pytest.mark.parametrize("options", ({"sparsity": -0.1}, {"sparsty": 0.5}, {"policy": "h3o"}))
def test_bad_options_of_a_cache(options: dict[str, Any]) -> None:
    """AlisaCache checks its options when it is built."""
    with pytest.raises(AlisaError, match=next(iter(options))):
        AlisaCache(LlamaConfig(), **options)


# Caches of the wrong shape


def other_batch(stock: Any) -> AlisaCache:
    return AlisaCache(stock.config, batch_size=2, sparsity=0.0)


def fewer_layers(stock: Any) -> AlisaCache:
    return AlisaCache(tiny_model("llama", layers=1).config, batch_size=1, sparsity=0.0)


def more_layers(stock: Any) -> AlisaCache:
    return AlisaCache(tiny_model("llama", layers=3).config, batch_size=1, sparsity=0.0)


def other_heads(stock: Any) -> AlisaCache:
    return AlisaCache(tiny_model("llama", num_key_value_heads=4).config, batch_size=1, sparsity=0.0)


def other_head_dim(stock: Any) -> AlisaCache:
    return AlisaCache(tiny_model("llama", head_dim=32).config, batch_size=1, sparsity=0.0)


WRONG: dict[Callable[[Any], AlisaCache], tuple[str, str]] = {
    # in generate, which looks before it starts; in a forward pass, layer by layer
    other_batch: (
        "another batch size; got: batch size 1; expected: batch size 2; to fix: make a new AlisaCache",
        "another batch size; got: batch size 1; expected: batch size 2; to fix: make a new AlisaCache",
    ),
    fewer_layers: (
        r"another config; got: 1 layers, .*= \(2, 16\); expected: 2 layers, .*; to fix: build it as AlisaCache",
        "fewer layers; got: layer 1; expected: at most 0; to fix: build the cache from the config",
    ),
    more_layers: ("another config; got: 3 layers, .*; expected: 2 layers, .*; to fix: build it as AlisaCache", ""),
    other_heads: (
        r"another config; got: 2 layers, .*\(4, 16\); expected: 2 layers, .*\(2, 16\); to fix: build it as AlisaCache",
        "does not fit this AlisaCache; got: 2 heads of head_dim 16; expected: 4 heads of head_dim 16; to fix: build",
    ),
    other_head_dim: (
        r"another config; got: 2 layers, .*\(2, 32\); expected: 2 layers, .*\(2, 16\); to fix: build it as AlisaCache",
        "does not fit this AlisaCache; got: 2 heads of head_dim 16; expected: 2 heads of head_dim 32; to fix: build",
    ),
}


@pytest.mark.parametrize("build", WRONG, ids=lambda build: build.__name__)
def test_wrong_cache_in_generate(build: Callable[[Any], AlisaCache], stock: Any, ids: torch.Tensor) -> None:
    """A cache that does not fit is refused before the first token, and left as it was."""
    cache = build(stock)
    with recorded_compiles() as rows, pytest.raises(CacheError, match=WRONG[build][0]) as caught:
        generate(compiled(stock), ids, past_key_values=cache)
    assert type(caught.value) is CacheError and isinstance(caught.value, RuntimeError)
    assert not rows and cache.get_seq_length() == 0
    assert not hook._installed and hook._current.get() is None


@torch.no_grad()
@pytest.mark.parametrize("run", ("compiled", "eager"))
@pytest.mark.parametrize("build", [b for b in WRONG if WRONG[b][1]], ids=lambda build: build.__name__)
def test_wrong_cache_in_forward(build: Callable[[Any], AlisaCache], run: str, stock: Any, ids: torch.Tensor) -> None:
    """The same in a forward pass, compiled or eager: our type, nothing of torch's around it."""
    model = compiled(stock, sparsity=0.0) if run == "compiled" else stock
    with pytest.raises(CacheError, match=WRONG[build][1]) as caught:
        model(ids, past_key_values=build(stock))
    assert type(caught.value) is CacheError


def test_cache_reused_with_another_batch_size(stock: Any, ids: torch.Tensor) -> None:
    """A cache that served a batch of 1 refuses a batch of 3, and still continues the batch of 1."""
    model, cache = compiled(stock, sparsity=0.0), AlisaCache(stock.config, sparsity=0.0)
    expected = generate(stock, torch.cat([generate(stock, ids), ids], dim=1))
    out = generate(model, ids, past_key_values=cache)
    with pytest.raises(CacheError, match="another batch size; got: batch size 3; expected: batch size 1"):
        generate(model, ids.expand(3, -1), past_key_values=cache)
    with pytest.raises(CacheError, match="another batch size; got: batch size 2; expected: batch size 1"):
        generate(model, ids, past_key_values=cache, num_return_sequences=2, num_beams=2)
    assert torch.equal(generate(model, torch.cat([out, ids], dim=1), past_key_values=cache), expected)


def test_allocation() -> None:
    """Allocating twice, or for no sequence at all, is refused."""
    cache = AlisaCache(LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4), batch_size=1)
    with pytest.raises(CacheError, match=r"already has storage; to fix: call reset\(\)"):
        cache.allocate(1)
    with pytest.raises(CacheError, match="batch_size is out of range; got: 0; expected: an integer >= 1"):
        AlisaCache(LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4), batch_size=0)


# Caches used at the wrong time


@torch.no_grad()
def test_unallocated_cache_in_a_compiled_forward(stock: Any, ids: torch.Tensor) -> None:
    """A compiled forward cannot allocate: our type, and the error names every way out."""
    model, cache = compiled(stock, sparsity=0.0), AlisaCache(stock.config, sparsity=0.0)
    with pytest.raises(CacheError, match=r"without storage.*batch_size=.*cache\.allocate.*generate\(\)") as caught:
        model(ids, past_key_values=cache)
    assert type(caught.value) is CacheError


@torch.no_grad()
def test_unallocated_cache_allocated_after_the_error(stock: Any, ids: torch.Tensor) -> None:
    """The way out that the error names works with the same compiled model (Dynamo now breaks its graph there)."""
    model, cache = compiled(stock, sparsity=0.0), AlisaCache(stock.config, sparsity=0.0)
    with pytest.raises(CacheError):
        model(ids, past_key_values=cache)
    cache.allocate(1)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", ({"sparsity": 0.0}, {"sparsity": 0.5}))
def test_full_cache(options: dict[str, Any], ids: torch.Tensor) -> None:
    """More tokens than fit in a plain forward: refused before anything is written; what fits still works."""
    stock = tiny_model("llama", layers=1, seed=3)
    model = compiled(stock, **options)
    cache = AlisaCache(stock.config, batch_size=1, max_length=24, **options)
    model(ids[:, :18], past_key_values=cache)
    twin = copy.deepcopy(cache)
    text = r"is full; got: 18 tokens stored and 20 new ones; expected: at most 24 in all; to fix: .*reserve\(38\)"
    with pytest.raises(CacheError, match=text) as caught:
        model(ids, past_key_values=cache)
    assert type(caught.value) is CacheError
    assert cache.get_seq_length() == 18
    for mine, theirs in zip(cache.stores[0].tensors(), twin.stores[0].tensors(), strict=True):
        assert torch.equal(mine, theirs)
    for token in (ids[:, 18:19], ids[:, 19:20]):
        torch.testing.assert_close(
            model(token, past_key_values=cache).logits, model(token, past_key_values=twin).logits, rtol=0, atol=0
        )
    cache.reserve(38)
    model(ids[:, :18], past_key_values=cache)
    assert cache.get_seq_length() == 38


def test_gradients_are_refused_by_name(stock: Any, ids: torch.Tensor) -> None:
    """With gradients enabled attention over an AlisaCache stays dense, right, and the reason is named."""
    model, cache = compiled(stock, sparsity=0.5), AlisaCache(stock.config, batch_size=1, sparsity=0.5)
    with recorded_compiles() as rows:
        got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, stock(ids).logits, rtol=1e-4, atol=1e-4)
    assert rows[0].rewritten == 0 and len(rows[0].skipped) == 2
    assert all("gradients are enabled" in skip.reason and "torch.no_grad()" in skip.reason for skip in rows[0].skipped)


def test_gradients_are_never_silently_wrong(stock: Any, ids: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """Backward through an AlisaCache is an error, compiled and eager, and the compiled model said so before."""
    backend._warn_once.cache_clear()
    model, cache = compiled(stock, sparsity=0.0), AlisaCache(stock.config, batch_size=1, sparsity=0.0)
    with caplog.at_level(logging.WARNING, logger="alisa_compile"):
        for piece in (ids, ids[:, :1]):
            assert not model(piece, past_key_values=cache).logits.requires_grad
    assert sum("gradients cannot flow" in record.getMessage() for record in caplog.records) == 1
    for name in ("sdpa", "alisa"):
        stock.set_attn_implementation(name)
        cache = AlisaCache(stock.config, sparsity=0.0)
        stock(ids, past_key_values=cache)
        loss = stock(ids[:, :1], past_key_values=cache).logits.sum()
        with pytest.raises(CacheError, match=r"gradients cannot flow.*torch\.no_grad"):
            loss.backward()
    assert not any(tensor.requires_grad for tensor in cache.stores[0].tensors())


@torch.no_grad()
def test_training_mode_is_refused_by_name(ids: torch.Tensor) -> None:
    """Attention dropout in training mode stays as it is, and the reason is named."""
    stock = tiny_model("llama", layers=1, attention_dropout=0.5).train()
    cache = AlisaCache(stock.config, batch_size=1)
    with recorded_compiles() as rows:
        compiled(stock)(ids, past_key_values=cache)
    assert rows[0].rewritten == 0
    assert "dropout (training mode)" in rows[0].skipped[0].reason


def test_operations_that_are_not_there_yet(stock: Any) -> None:
    """transformers' layer-wise offloading: NotAvailableError with a way out."""
    cache = AlisaCache(stock.config, batch_size=1, sparsity=0.0)
    for operation in (cache.layers[0].offload, cache.layers[0].prefetch):
        with pytest.raises(NotAvailableError, match=r"offloading is not available yet.*to fix: use transformers' own"):
            operation()


def test_operations_on_one_layer(stock: Any) -> None:
    """The layers share a store, so what concerns all of them is refused on one."""
    layer, nothing = AlisaCache(stock.config, batch_size=1, sparsity=0.0).layers[0], torch.zeros(1, dtype=torch.int64)
    for name, argument in (
        ("crop", -1), ("reorder_cache", nothing), ("batch_repeat_interleave", 2), ("batch_select_indices", nothing)
    ):  # fmt: skip
        with pytest.raises(CacheError, match=rf"{name} of a single layer.*to fix: call {name} of the cache itself"):
            getattr(layer, name)(argument)


def test_sequences_that_are_not_there(stock: Any) -> None:
    """An index past the batch is refused before anything moves."""
    cache = AlisaCache(stock.config, batch_size=2, sparsity=0.0)
    with pytest.raises(CacheError, match=r"no such sequence.*got: indices \[0, 2\].*expected: each from 0 to 1"):
        cache.reorder_cache(torch.tensor([0, 2]))


# Reports


def test_report_of_nothing(stock: Any) -> None:
    """A report before the first generate, of another model, or of something else says what to do."""
    for thing in (compiled(stock), stock, torch.nn.Linear(1, 1)):
        with pytest.raises(AlisaError, match=r"nothing to report.*got: .*expected: .*to fix: call generate\(\) first"):
            alisa_compile.report(thing)
    for thing in (AlisaCache(stock.config), 3):
        with pytest.raises(AlisaError, match=r"nothing to report.*expected: an AlisaCache"):
            alisa_compile.report(thing)
