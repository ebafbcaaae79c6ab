"""Ways in and out: own caches, other routes to the backend, requests that stay dense, and who owns the storage."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import CompileConfig, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import alisa_compile
from alisa_compile import AlisaCache, CacheError, backend
from alisa_compile.hf import generate as hook
from alisa_compile.hf.cache import AlisaLayer
from tests import support
from tests.support import left_padded, recorded_compiles, tiny_model

NEW = 6
SPARSE = {"sparsity": 0.9, "sinks": 0, "refresh": 0}
LOGGER = "alisa_compile"


@pytest.fixture
def stock() -> Any:
    return tiny_model("llama", layers=1, seed=3)


@pytest.fixture
def ids() -> torch.Tensor:
    return left_padded(1, 40, seed=4)[0]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, LOGGER):
        yield caplog


def compiled(model: Any, **options: Any) -> Any:
    """Our backend with the rewritten graph run as it is, which compiles fastest."""
    return support.compiled(model, inner="eager", **options)


def generate(model: Any, ids: torch.Tensor, new_tokens: int = NEW, **options: Any) -> Any:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    """What our package warned about."""
    return [
        record.getMessage()
        for record in log.records
        if record.name.startswith(LOGGER) and record.levelno == logging.WARNING
    ]


# Entry routes


def test_model_compile_with_own_cache(stock: Any, ids: torch.Tensor) -> None:
    """`model.compile(backend="alisa")` and an allocated AlisaCache: right, and every attention rewritten."""
    expected = generate(stock, ids)
    stock.compile(backend="alisa", options={"inner_compiler": "eager", "sparsity": 0.0})
    cache = AlisaCache(stock.config, batch_size=1, sparsity=0.0, max_length=64)
    with recorded_compiles() as rows, torch.no_grad():
        assert torch.equal(generate(stock, ids, past_key_values=cache), expected)
    assert {row.stage for row in rows} == {"prefill", "decode"}
    assert all(row.rewritten == 1 and not row.skipped for row in rows)
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1


def test_model_compile_with_several_batch_sizes_models_and_scales() -> None:
    """Every one is rewritten: what Dynamo makes an unknown after a second value becomes a guard again."""
    for changes in ({}, {"hidden_size": 96}):
        model = tiny_model("llama", layers=1, **changes)
        stock = copy.deepcopy(model)
        model.compile(backend=backend.alisa, options={"inner_compiler": "eager", "sparsity": 0.0})
        for batch_size, scale in ((1, None), (2, None), (3, None), (3, 0.1), (3, 0.3)):
            if scale is not None:
                for one in (model, stock):
                    one.model.layers[0].self_attn.scaling = scale
            ids, mask = left_padded(batch_size, 20)
            cache = AlisaCache(model.config, batch_size=batch_size, sparsity=0.0)
            with recorded_compiles() as rows:
                out = generate(model, ids, attention_mask=mask, past_key_values=cache)
            assert torch.equal(out, generate(stock, ids, attention_mask=mask))
            assert all(row.rewritten == 1 for row in rows), rows


def test_model_compile_uses_the_options_of_the_cache(stock: Any, ids: torch.Tensor) -> None:
    """The cache says how sparse: the same tokens as with those options under torch.compile."""
    expected = generate(compiled(stock, **SPARSE), ids)
    assert not torch.equal(expected, generate(stock, ids))
    stock.compile(backend="alisa", options={"inner_compiler": "eager"})
    cache = AlisaCache(stock.config, batch_size=1, max_length=64, **SPARSE)
    assert torch.equal(generate(stock, ids, past_key_values=cache), expected)


def test_model_compile_with_a_dynamic_cache_stays_dense(
    stock: Any, ids: torch.Tensor, log: pytest.LogCaptureFixture
) -> None:
    """transformers' cache in a compiled model: right, dense, and the reason is in the skip list and the log."""
    expected = generate(stock, ids)
    stock.compile(backend="alisa", options={"inner_compiler": "eager", **SPARSE})
    with recorded_compiles() as rows:
        out = generate(stock, ids, past_key_values=DynamicCache(config=stock.config))
    assert torch.equal(out, expected)
    assert rows and all(row.rewritten == 0 and len(row.skipped) == 1 for row in rows)
    reason = rows[0].skipped[0].reason
    assert "AlisaCache" in reason
    assert any(reason in record.getMessage() for record in log.records)


def test_compile_config_of_transformers(stock: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CompileConfig(backend="alisa")` with its default mode on a static cache: the mode arrives, nothing fails."""
    modes: list[Any] = []

    def inner(gm: Any, example_inputs: Any, config: Any, mode: Any) -> Any:
        modes.append(mode)
        return gm.forward

    monkeypatch.setattr(backend, "_compile", inner)
    expected = generate(stock, ids)
    config = CompileConfig(backend="alisa")
    assert config.mode == "reduce-overhead"
    config._compile_all_devices = True
    with recorded_compiles() as rows:
        out = generate(stock, ids, cache_implementation="static", compile_config=config)
    assert torch.equal(out, expected)
    assert rows and set(modes) == {"reduce-overhead"}


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_modes_are_accepted(mode: str) -> None:
    """`mode=` goes to Inductor: a plain module compiles with it and computes the same."""
    module, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="alisa", mode=mode)(x), module(x))


@torch.no_grad()
def test_plain_forward_with_own_cache(stock: Any, ids: torch.Tensor) -> None:
    """Prefill, single tokens and a chunk through `om(ids, past_key_values=AlisaCache(...))`: stock's logits."""
    model, cache = compiled(stock, sparsity=0.0), AlisaCache(stock.config, batch_size=1, sparsity=0.0, max_length=64)
    reference, start = DynamicCache(config=stock.config), 0
    with recorded_compiles() as rows:
        for width in (20, 1, 1, 1, 7, 1):
            piece = ids[:, start : start + width]
            expected = stock(piece, past_key_values=reference).logits
            torch.testing.assert_close(model(piece, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)
            start += width
            assert cache.get_seq_length() == start
    assert {row.stage for row in rows} == {"prefill", "decode", "extend"}
    assert all(row.rewritten == 1 for row in rows)


@torch.no_grad()
def test_plain_forward_without_a_cache(stock: Any, ids: torch.Tensor) -> None:
    """`om(ids)` is dense, whatever the sparsity, and says why."""
    with recorded_compiles() as rows:
        torch.testing.assert_close(compiled(stock, **SPARSE)(ids, use_cache=False).logits, stock(ids).logits)
    assert [row.rewritten for row in rows] == [0]
    assert "AlisaCache" in rows[0].skipped[0].reason


def test_graph_break_between_layers(ids: torch.Tensor) -> None:
    """A model that Dynamo has to break (a hook that prints) still gives stock's tokens."""
    stock = tiny_model("llama", layers=2, seed=3)
    expected = generate(stock, ids)

    def breaks(*args: Any) -> None:
        torch._dynamo.graph_break()

    stock.model.layers[1].register_forward_pre_hook(breaks)
    assert torch.equal(generate(compiled(stock, sparsity=0.0), ids), expected)


# Requests that stay dense


STAY_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "dynamic": ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
}


@pytest.mark.parametrize("case", STAY_OUT)
def test_staying_out(case: str, ids: torch.Tensor, log: pytest.LogCaptureFixture) -> None:
    """Right, with no attention rewritten at a visible sparsity, and one warning that names the reason."""
    options, reason = STAY_OUT[case]
    changes = {"attn_implementation": "eager"} if case == "attentions" else {}
    stock = tiny_model("llama", layers=1, seed=3, **changes)
    expected = generate(stock, ids, 4, **options)
    model = compiled(stock, **SPARSE)
    with recorded_compiles() as rows:
        out = [generate(model, ids, 4, **options) for _ in range(2)]
    if case == "attentions":
        assert all(one.attentions[0][0].shape == expected.attentions[0][0].shape for one in out)
        out, expected = [one.sequences for one in out], expected.sequences
    assert all(torch.equal(one, expected) for one in out)
    assert rows and not any(row.rewritten for row in rows)
    told = warnings_of(log)
    assert len(told) == 1 and reason in told[0], told


def test_a_given_dynamic_cache_is_used(stock: Any, ids: torch.Tensor, log: pytest.LogCaptureFixture) -> None:
    """`past_key_values=DynamicCache` is filled, not replaced; one warning in two turns."""
    expected, cache = generate(stock, ids), DynamicCache(config=stock.config)
    model = compiled(stock, **SPARSE)
    out = generate(model, ids, 3, past_key_values=cache)
    assert torch.equal(generate(model, out, NEW - 3, past_key_values=cache), expected)
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1
    assert len(warnings_of(log)) == 1 and "DynamicCache" in warnings_of(log)[0]


def test_encoder_decoder(log: pytest.LogCaptureFixture) -> None:
    """A T5 works as before, with one warning."""
    config = hf.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    stock = hf.AutoModelForSeq2SeqLM.from_config(config).eval()
    ids, mask = left_padded(1, 9, vocab=90)
    expected = generate(stock, ids, 4, attention_mask=mask)
    model = compiled(stock, **SPARSE)
    assert torch.equal(generate(model, ids, 4, attention_mask=mask), expected)
    assert torch.equal(generate(model, ids, 4, attention_mask=mask), expected)
    assert len(warnings_of(log)) == 1 and "encoder-decoder" in warnings_of(log)[0]


def test_sliding_window_only_stays_out(ids: torch.Tensor, log: pytest.LogCaptureFixture) -> None:
    """A model whose layers are all sliding has nothing for us: right, with one warning, in generate."""
    stock = tiny_model("mistral", layers=1, sliding_window=8)
    expected = generate(stock, ids, 12)
    model = compiled(stock, **SPARSE)
    with recorded_compiles() as rows:
        assert torch.equal(generate(model, ids, 12), expected)
        assert torch.equal(generate(model, ids, 12), expected)
    assert rows and not any(row.rewritten for row in rows)
    assert len(warnings_of(log)) == 1 and "DynamicSlidingWindowLayer" in warnings_of(log)[0]
    with pytest.raises(CacheError, match=r"no full-attention layer.*SlidingWindowLayer.*transformers' own cache"):
        AlisaCache(stock.config)


def test_latent_attention_stays_out(log: pytest.LogCaptureFixture) -> None:
    """Multi-head latent attention does not fit a row of our store: right, with one warning."""
    config = hf.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    stock = hf.AutoModelForCausalLM.from_config(config).eval()
    ids, _ = left_padded(1, 9, vocab=60)
    expected = generate(stock, ids)
    assert torch.equal(generate(compiled(stock, **SPARSE), ids), expected)
    assert len(warnings_of(log)) == 1 and "deepseek_v3" in warnings_of(log)[0]


def test_no_attention_at_all() -> None:
    """A Mamba has no KV cache: a typed error from generate that names another backend."""
    config = hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    stock = hf.AutoModelForCausalLM.from_config(config).eval()
    ids, _ = left_padded(1, 5, vocab=60)
    with pytest.raises(CacheError, match="no attention layer") as caught:
        generate(compiled(stock), ids, 2)
    message = str(caught.value)
    assert "got: model type 'mamba'" in message and "expected: a model with at least one" in message
    assert "to fix: compile it with another backend" in message
    assert vars(stock).get("_compiled_call_impl") is None
    with pytest.raises(CacheError, match="no attention layer"):
        AlisaCache(config)


def test_other_layer_kinds_keep_their_classes() -> None:
    """Gemma 3 alternates: its sliding layers stay transformers', its full ones are ours, the tokens are stock's."""
    config = hf.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    stock = hf.AutoModelForCausalLM.from_config(config).eval()
    cache = AlisaCache(config)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, AlisaLayer]
    ids, mask = left_padded(1, 12)
    with recorded_compiles() as rows:
        support.assert_same_tokens(stock, compiled(stock, sparsity=0.0), ids, mask, 12)
    assert {row.stage for row in rows} >= {"prefill", "decode"}
    assert all(row.rewritten == 1 for row in rows)


# What generate can do besides greedy search


def test_sampling_with_a_seed(stock: Any, ids: torch.Tensor) -> None:
    """The same seed samples the same tokens, also several sequences per prompt."""
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(7)
    expected = generate(stock, ids, 12, **options)
    torch.manual_seed(7)
    out = generate(compiled(stock, sparsity=0.0), ids, 12, **options)
    assert out.shape == (3, ids.shape[1] + 12)
    assert torch.equal(out, expected)


def test_streaming(stock: Any, ids: torch.Tensor) -> None:
    """A streamer gets the prompt and then each token, once."""

    class Collect(hf.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.reshape(-1))

        def end(self) -> None:
            self.ended += 1

    streamer = Collect()
    out = generate(compiled(stock, sparsity=0.0), ids, streamer=streamer)
    assert len(streamer.pieces) == 1 + NEW and streamer.ended == 1
    assert torch.equal(torch.cat(streamer.pieces), out[0])


# Who owns the storage


def test_returned_cache_is_left_alone(stock: Any, ids: torch.Tensor) -> None:
    """A cache out of `return_dict_in_generate` can be continued although other calls ran in between."""
    model = compiled(stock, sparsity=0.0)
    expected = generate(stock, ids, 12)
    first = generate(model, ids, 5, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, AlisaCache)
    kept = first.past_key_values.stores[0].pool.data_ptr()
    for seed in range(2):
        generate(model, left_padded(1, 44, seed=seed)[0], 9)
        session = hook.session_of(model)
        assert session is not None and session.stores[0].pool.data_ptr() != kept
    out = generate(model, first.sequences, 7, past_key_values=first.past_key_values)
    assert torch.equal(out, expected)


def test_storage_is_reused_when_nobody_holds_it(stock: Any, ids: torch.Tensor) -> None:
    """The next call of the same batch size takes the same storage, emptied."""
    model = compiled(stock, sparsity=0.0, max_length=64)
    addresses = set()
    for seed in range(3):
        prompt = left_padded(1, 30, seed=seed)[0]
        assert torch.equal(generate(model, prompt), generate(stock, prompt))
        session = hook.session_of(model)
        assert session is not None
        addresses.add(session.stores[0].pool.data_ptr())
    assert len(addresses) == 1
    assert alisa_compile.report(model).steps == NEW


def test_storage_of_a_cache_with_other_options_is_not_reused(stock: Any, ids: torch.Tensor) -> None:
    """After a call with a user's own sparse cache, the next call is what the model was compiled for."""
    model = compiled(stock, sparsity=0.0)
    expected = generate(stock, ids)
    sparse = generate(model, ids, past_key_values=AlisaCache(stock.config, **SPARSE))
    assert not torch.equal(sparse, expected)
    assert torch.equal(generate(model, ids), expected)


def test_release_frees_the_storage(stock: Any, ids: torch.Tensor) -> None:
    """After release nothing holds the pool, and the next generate allocates again, without compiling."""
    model = compiled(stock, sparsity=0.0)
    out = generate(model, ids)
    session = hook.session_of(model)
    assert session is not None
    store, pool = weakref.ref(session.stores[0]), weakref.ref(session.stores[0].pool)
    del session
    alisa_compile.release(model)
    assert store() is None and pool() is None
    with recorded_compiles() as rows:
        assert torch.equal(generate(model, ids), out)
    assert not rows
    alisa_compile.release(torch.nn.Linear(1, 1))


def test_copies_of_a_cache_continue_independently(stock: Any, ids: torch.Tensor) -> None:
    """deepcopy: two ways on from one prompt, neither disturbs the other; and an empty cache can be copied."""
    model, options = compiled(stock, sparsity=0.5), {"sparsity": 0.5}
    cache = AlisaCache(stock.config, **options)
    out = generate(model, ids, 3, past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert alisa_compile.report(copied).budget_bytes == alisa_compile.report(cache).budget_bytes is not None
    assert copied.get_seq_length() == cache.get_seq_length() == ids.shape[1] + 2
    other = torch.cat([out, ids[:, :9]], dim=1)
    expected = generate(model, other, past_key_values=copy.deepcopy(cache))
    straight = generate(model, out, 5, past_key_values=cache)
    assert torch.equal(generate(model, other, past_key_values=copied), expected)
    assert not torch.equal(straight[:, -5:], expected[:, -5:])
    assert copied.stores[0].pool.data_ptr() != cache.stores[0].pool.data_ptr()
    assert not copy.deepcopy(AlisaCache(stock.config, **options)).is_allocated


def test_reset_empties_a_cache(stock: Any, ids: torch.Tensor) -> None:
    """After reset a cache starts over in the same storage, with the tokens of a new one."""
    model, cache = compiled(stock, **SPARSE), AlisaCache(stock.config, max_length=64, **SPARSE)
    first = generate(model, ids, past_key_values=cache)
    address = cache.stores[0].pool.data_ptr()
    with recorded_compiles() as rows:
        for prompt in (ids.flip(1), ids):
            cache.reset()
            assert cache.get_seq_length() == 0
            out = generate(model, prompt, past_key_values=cache)
    assert torch.equal(out, first)
    assert cache.stores[0].pool.data_ptr() == address
    assert not rows
