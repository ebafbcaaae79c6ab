"""What transformers does to a cache between steps: crop, reorder, repeat, select. AlisaCache against DynamicCache.

Sequences that go their own way afterwards must be what they would have been alone, sparse state included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from alisa_compile import AlisaCache, CacheError
from alisa_compile.hf import attention as alisa_attention
from tests.hf.modes import generate
from tests.kernels.harness import Driver, Heads, random_block, stored_rows
from tests.support import compiled, left_padded, tiny_model

_OPTIONS: list[dict[str, Any]] = [
    {"sparsity": 0.0},
    {"sparsity": 0.0, "kv_dtype": "int8"},
    {"sparsity": 0.8, "refresh": 3},
    {"sparsity": 0.8, "paper": True},
    {"sparsity": 0.5, "policy": "h2o"},
    {"sparsity": 0.5, "head_mode": "per_kv_head"},
]


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_model("llama", layers=2, seed=3)


@pytest.fixture(scope="module")
def sparse() -> Any:
    """The same model, whose eager attention is sparse over an AlisaCache."""
    model = tiny_model("llama", layers=2, seed=3)
    model.set_attn_implementation(alisa_attention.NAME)
    return model


@torch.no_grad()
def _forward(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    result = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    logits: torch.Tensor = result.logits
    return logits


def _tokens(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 128, (count, length), generator=torch.Generator().manual_seed(seed))


_OPERATIONS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder, a permutation": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "reorder, duplicates": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    "reorder, all one": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 2])), [2, 2, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select fewer": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select more": (lambda cache: cache.batch_select_indices(torch.tensor([0, 2, 1, 2])), [0, 2, 1, 2]),
}


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("options", _OPTIONS[:2], ids=str)
def test_as_dynamic_cache(stock: Any, options: dict[str, Any], operation: str) -> None:
    """The same call on both caches, then further turns and steps: equal logits."""
    run, index = _OPERATIONS[operation]
    ids, mask = left_padded(3, 15)
    ours, theirs = AlisaCache(stock.config, **options), DynamicCache(config=stock.config)
    for cache in (ours, theirs):
        _forward(stock, cache, ids, mask)
        run(cache)
    mask = mask[index]
    bound = 1e-4 if "kv_dtype" not in options else 0.3
    for step in range(4):
        tokens = _tokens(len(index), 3 if step == 1 else 1, step)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        torch.testing.assert_close(
            _forward(stock, ours, tokens, mask), _forward(stock, theirs, tokens, mask), rtol=0, atol=bound
        )
        run_again = [(place + step) % len(index) for place in range(len(index))]
        for cache in (ours, theirs):
            cache.reorder_cache(torch.tensor(run_again))
        mask = mask[run_again]


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("options", _OPTIONS[2:], ids=str)
def test_sparse_sequences_are_what_they_would_be_alone(sparse: Any, options: dict[str, Any], operation: str) -> None:
    """Sparse decode before and after: each sequence equals a batch of its own history, which was never moved."""
    run, index = _OPERATIONS[operation]
    ids, mask = left_padded(3, 30)
    together = AlisaCache(sparse.config, **options)
    alone = [AlisaCache(sparse.config, **options) for _ in index]
    _forward(sparse, together, ids, mask)
    for cache, source in zip(alone, index, strict=True):
        _forward(sparse, cache, ids[[source]], mask[[source]])
    for step in range(8):
        if step == 4:
            run(together)
            mask = mask[index]
        tokens = _tokens(3, 1, step) if step < 4 else _tokens(len(index), 5 if step == 6 else 1, step)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        got = _forward(sparse, together, tokens, mask)
        for place, (cache, source) in enumerate(zip(alone, index, strict=True)):
            own = source if step < 4 else place
            expected = _forward(sparse, cache, tokens[[own]], mask[[own]])
            if step >= 4:
                torch.testing.assert_close(got[[place]], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", _OPTIONS[:2], ids=str)
@pytest.mark.parametrize("removed", [1, 3, 9])
def test_crop_as_dynamic_cache(stock: Any, options: dict[str, Any], removed: int) -> None:
    """Drafts rejected, other tokens in their place."""
    ids, mask = left_padded(2, 15)
    ours, theirs = AlisaCache(stock.config, **options), DynamicCache(config=stock.config)
    bound = 1e-4 if "kv_dtype" not in options else 0.3
    for cache in (ours, theirs):
        _forward(stock, cache, ids, mask)
        _forward(stock, cache, _tokens(2, 9, 7), torch.cat([mask, torch.ones((2, 9), dtype=torch.int64)], dim=1))
        cache.crop(-removed)
        assert cache.get_seq_length() == 24 - removed
    mask = torch.cat([mask, torch.ones((2, 9 - removed), dtype=torch.int64)], dim=1)
    for step in range(3):
        tokens = _tokens(2, 4 if step == 0 else 1, step)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        torch.testing.assert_close(
            _forward(stock, ours, tokens, mask), _forward(stock, theirs, tokens, mask), rtol=0, atol=bound
        )


@pytest.mark.parametrize("options", _OPTIONS[2:], ids=str)
def test_crop_of_a_sparse_cache(sparse: Any, options: dict[str, Any]) -> None:
    """The next working set holds the coming position and nothing that was forgotten, at its proper size."""
    ids, mask = left_padded(2, 40)
    cache = AlisaCache(sparse.config, **options)
    _forward(sparse, cache, ids, mask)
    for step in range(20):
        new = 6 if step % 3 == 2 else 1
        mask = torch.cat([mask, torch.ones((2, new), dtype=torch.int64)], dim=1)
        _forward(sparse, cache, _tokens(2, new, step), mask)
        if new == 6:
            cache.crop(-(1 + step % 5))
            mask = mask[:, : cache.get_seq_length()]
            store = cache.stores[0]
            assert store.rows is not None and store.counts is not None and store.selection is not None
            for layer in range(2):
                for sequence in range(2):
                    count = int(store.counts[layer, sequence, 0])
                    if count < 0:
                        continue
                    real = int(mask[sequence].sum()) + 1
                    proper = int(store.selection.local_rows(real) + store.selection.dynamic_rows(real))
                    # What a rejected draft made H2O drop is gone for good.
                    assert count == proper or (options.get("policy") == "h2o" and proper // 2 <= count < proper)
                    chosen = store.rows[layer, sequence, 0, :count]
                    assert int(chosen[-1]) == store.host_length and bool((chosen.diff() > 0).all())
                    assert bool(torch.cat([mask[sequence], torch.ones(1)])[chosen.long()].all())
    assert cache.stores[0].effective_sparsity() > 0.1


@pytest.mark.parametrize("rank", ["decay", "sum"])
def test_crop_undoes_the_fading(rank: str) -> None:
    """A step that is cropped leaves every other token's score as it was, but for what the step itself added."""
    heads, generator = Heads(4, 2, 8), torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"window": 2, "refresh": 0} if rank == "decay" else {"policy": "h2o"}
    driver = Driver(heads, capacity=80, dtype=torch.float64, sparsity=0.5, **options)
    store = driver.store
    driver.forward(random_block(generator, heads, 20, dtype=torch.float64))
    for _ in range(40):  # across the rescaling of the scores, which comes every 32 steps
        assert store.selection is not None and store.scores is not None
        unit = 1.0
        if rank == "decay":
            unit = store.selection.decay ** store.selection.decay_exponent(store.host_length)
        before = store.scores[0, 0, 0, 0, : store.host_length].clone() * unit
        driver.forward(random_block(generator, heads, 1, dtype=torch.float64))
        store.crop(store.host_length - 1)
        after = store.scores[0, 0, 0, 0, : store.host_length] * unit
        added = after - before
        added[after.isinf()] = 0
        decay = store.selection.decay if rank == "decay" else 1.0
        assert bool((added >= -1e-12).all()) and float(added.sum()) <= 4 / decay + 1e-9  # four heads' attention
        driver.forward(random_block(generator, heads, 1, dtype=torch.float64))


def test_crop_to_nothing_and_of_nothing(stock: Any) -> None:
    """All tokens: empty, as after reset. None: unchanged. A positive number is the length to keep."""
    ids, mask = left_padded(1, 9)
    cache = AlisaCache(stock.config, sparsity=0.5)
    cache.crop(0)
    first = _forward(stock, cache, ids, mask)
    cache.crop(0)
    assert cache.get_seq_length() == 9
    cache.crop(7)
    assert cache.get_seq_length() == 7
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and not cache.stores[0].has_history
    torch.testing.assert_close(_forward(stock, cache, ids, mask), first)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_sequence_owns_its_slots(data: st.DataObject) -> None:
    """Any sequence of selections: contents follow, and no two sequences share a slot."""
    heads = Heads(4, 2, 8)
    batch = data.draw(st.integers(1, 4))
    options = data.draw(st.sampled_from(_OPTIONS))
    driver = Driver(heads, capacity=24, batch=batch, layers=2, dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    driver.permute_slots(generator)
    driver.forward(random_block(generator, heads, 9, batch=batch, layers=2, dtype=torch.float32))
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.sampled_from([batch, batch, data.draw(st.integers(1, 5))]))
        index = data.draw(st.lists(st.integers(0, batch - 1), min_size=size, max_size=size))
        before = [[stored_rows(driver, layer, sequence) for sequence in range(batch)] for layer in range(2)]
        driver.store.select_sequences(index)
        batch = size
        assert driver.store.table.unique().numel() == driver.store.table.numel()
        assert driver.store.pool.alisa_store() is driver.store  # type: ignore[attr-defined]
        for layer in range(2):
            for target, source in enumerate(index):
                for mine, theirs in zip(stored_rows(driver, layer, target), before[layer][source], strict=True):
                    assert torch.equal(mine, theirs)
        driver.forward(random_block(generator, heads, 1, batch=batch, layers=2, dtype=torch.float32))


# transformers' own expectations of a cache, here of a compiled `generate`


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"paper": True}, marks=pytest.mark.slow),
        pytest.param({"sparsity": 0.8, "refresh": 5}, marks=pytest.mark.slow),
        pytest.param({"policy": "h2o"}, marks=pytest.mark.slow),
        pytest.param({"policy": "strided"}, marks=pytest.mark.slow),
        pytest.param({"policy": "churn"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_extra_left_padding_changes_nothing(options: dict[str, Any]) -> None:
    """At any policy, a row's tokens are those it has alone: refresh steps and scores ignore padding."""
    stock = tiny_model("llama", layers=2, seed=3)
    model = compiled(stock, inner="eager", **options)
    ids, mask = left_padded(3, 30)
    together = generate(model, ids, mask, max_new_tokens=40)
    for row in range(3):
        own = ids[row : row + 1, mask[row] == 1]
        assert torch.equal(generate(model, own, max_new_tokens=40)[0, own.shape[1] :], together[row, 30:])
        pad = torch.zeros((1, 11), dtype=torch.int64)
        more = generate(model, torch.cat([pad, own], 1), torch.cat([pad, torch.ones_like(own)], 1), max_new_tokens=40)
        assert torch.equal(more[0, 11 + own.shape[1] :], together[row, 30:])


def test_int8_needs_less_memory_than_dynamic_cache() -> None:
    """Everything the cache holds, tables included, against the K and V of transformers' own, after the same tokens."""
    stock = tiny_model("llama", layers=2, hidden_size=512)
    ids, mask = left_padded(2, 400)
    ours, theirs = AlisaCache(stock.config, sparsity=0.0, kv_dtype="int8"), DynamicCache(config=stock.config)
    for cache, model in ((ours, compiled(stock, inner="eager", sparsity=0.0, kv_dtype="int8")), (theirs, stock)):
        generate(model, ids, mask, max_new_tokens=8, past_key_values=cache)
    dynamic = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.nbytes < 0.35 * dynamic  # int8 instead of float32, scales and tables included


@pytest.mark.parametrize(
    "chunk", [pytest.param(8, marks=pytest.mark.slow), 13, pytest.param(64, marks=pytest.mark.slow)]
)
def test_a_prompt_in_chunks_is_dense_to_its_end(chunk: int) -> None:
    """Sparse decode, but the first token comes from dense attention however short the last chunk is, even one token."""
    stock = tiny_model("llama", layers=2, seed=3)
    options = {"sparsity": 0.9, "refresh": 0}
    for length in (64 + 8, 65):
        ids, mask = left_padded(2, length)
        chunked, whole = (
            compiled(stock, inner="eager", **options).generate(
                ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True, **more,
            ).logits[0]
            for more in ({"prefill_chunk_size": chunk}, {})
        )  # fmt: skip
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)


def test_rejected_drafts_do_not_repeat_refreshes() -> None:
    """Each refresh comes once, though ten rejected drafts pass it every time."""
    heads, generator = Heads(4, 2, 8), torch.Generator().manual_seed(0)
    driver = Driver(heads, capacity=400, layers=2, dtype=torch.float32, sparsity=0.8, refresh=8)
    store = driver.store
    driver.forward(random_block(generator, heads, 40, layers=2, dtype=torch.float32))
    dense = []
    for _ in range(64):
        assert store.counts is not None
        dense.append((store.counts[:, 0, 0] < 0).tolist())
        driver.forward(random_block(generator, heads, 11, layers=2, dtype=torch.float32))
        store.crop(store.host_length - 10)
    assert [sum(layer) for layer in zip(*dense, strict=True)] == [8, 8]


def test_a_cache_of_another_config_is_not_taken_for_sparse(sparse: Any) -> None:
    """Eager attention is sparse, but the cache was built from a config that does not say so."""
    config = tiny_model("llama", layers=2).config
    with pytest.raises(CacheError, match=r"would be dense.*got: a cache built from a config without attn_impl"):
        cache = AlisaCache(config, sparsity=0.8)
        for tokens in (_tokens(1, 20, 0), _tokens(1, 1, 1)):
            _forward(
                sparse, cache, tokens, torch.ones((1, cache.get_seq_length() + tokens.shape[1]), dtype=torch.int64)
            )
