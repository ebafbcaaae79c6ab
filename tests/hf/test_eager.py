"""AlisaCache without torch.compile: dense under `sdpa`, sparse under `attn_implementation="alisa"`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma3TextConfig, GptOssConfig

from alisa_compile import AlisaCache, AlisaError, NotAvailableError
from tests import support
from tests.support import assert_same_tokens, left_padded, tiny_model

SPARSE: tuple[dict[str, Any], ...] = (
    {"sparsity": 0.8},
    {"sparsity": 0.8, "paper": True},
    {"sparsity": 0.8, "head_mode": "per_kv_head", "refresh": 5},
    {"sparsity": 0.8, "kv_dtype": "int8"},
)


class Eager:
    """A model that generates with a new AlisaCache for every call."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options
        self.cache: AlisaCache | None = None

    def generate(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        self.cache = AlisaCache(self.model.config, **self.options)
        return self.model.generate(ids, past_key_values=self.cache, **kwargs)


def sparse_model(**changes: Any) -> Any:
    """The same weights as `tiny_model("llama", **changes)`, with our attention."""
    return tiny_model("llama", attn_implementation="alisa", **changes)


def tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return out


@pytest.mark.parametrize("batch_size", (1, 3))
def test_sdpa_is_dense(batch_size: int) -> None:
    """Under `sdpa` the cache is a dense one at any sparsity: stock's tokens, also left-padded."""
    stock = tiny_model("llama")
    ids, mask = left_padded(batch_size, 15)
    assert_same_tokens(stock, Eager(stock, sparsity=0.8), ids, mask, 48)


@torch.no_grad()
@pytest.mark.parametrize("attention", ("sdpa", "alisa"))
def test_turns_with_growth(attention: str) -> None:
    """Four turns on one cache that starts with 8 tokens' room: stock's logits, and the store grows by doubling."""
    stock, model = tiny_model("llama"), tiny_model("llama", attn_implementation=attention)
    cache, reference = AlisaCache(model.config, sparsity=0.0, max_length=8), DynamicCache(config=stock.config)
    generator = torch.Generator().manual_seed(1)
    seen = 0
    for width in (7, 1, 1, 30, 1, 1, 2, 1):
        ids = torch.randint(2, 128, (1, width), generator=generator)
        expected = stock(ids, past_key_values=reference).logits
        got = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
        seen += width
        assert cache.get_seq_length() == seen
        assert cache.stores[0].capacity > seen
    assert cache.stores[0].capacity == 2 * 39


def test_conversation_past_the_initial_capacity() -> None:
    """Two turns of generate that outgrow the default start of 256 tokens: stock's tokens."""
    stock = tiny_model("llama", layers=1)
    cache, reference = AlisaCache(stock.config, sparsity=0.0), DynamicCache(config=stock.config)
    ids = left_padded(1, 200)[0]
    for turn in range(2):
        mask = torch.ones_like(ids)
        options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
        expected = stock.generate(ids, past_key_values=reference, **options)
        out = stock.generate(ids, past_key_values=cache, **options)
        assert torch.equal(out, expected)
        if turn == 0:
            assert cache.stores[0].capacity == 256
        ids = torch.cat([out, left_padded(1, 20, seed=1)[0]], dim=1)
    assert cache.stores[0].capacity == 512
    assert cache.get_seq_length() == 200 + 40 + 20 + 40 - 1


@pytest.mark.parametrize("batch_size", (1, 3))
def test_alisa_attention_at_sparsity_zero(batch_size: int) -> None:
    """`attn_implementation="alisa"` with sparsity 0: stock's tokens, batch 1 and left-padded."""
    ids, mask = left_padded(batch_size, 15)
    assert_same_tokens(tiny_model("llama"), Eager(sparse_model(), sparsity=0.0), ids, mask, 48)


@pytest.mark.parametrize(("options", "batch_size"), (*((options, 3) for options in SPARSE), (SPARSE[0], 1)), ids=str)
def test_alisa_attention_equals_the_compiled_model(options: dict[str, Any], batch_size: int) -> None:
    """80 % sparsity: eager mode gives the compiled model's tokens, which are not the dense ones."""
    stock = tiny_model("llama")
    ids, mask = left_padded(batch_size, 21)
    eager = Eager(sparse_model(), **options)
    compiled = support.compiled(stock, inner="eager", **options)
    out = tokens(eager, ids, mask, 40)
    assert torch.equal(out, tokens(compiled, ids, mask, 40))
    assert not torch.equal(out, tokens(stock, ids, mask, 40))
    # One of the two layers may be due for a refresh.
    assert eager.cache is not None and eager.cache.stores[0].effective_sparsity() > 0.3


@pytest.mark.parametrize("sparsity", (0.0, 0.8))
def test_padding_is_never_attended(sparsity: float) -> None:
    """What stands at masked positions does not matter, and a padded row has the tokens of the row alone.

    Without refresh: its dense steps come at lengths of the batch, which are others for the row alone.
    """
    model = Eager(sparse_model(), sparsity=sparsity, refresh=0)
    ids, mask = left_padded(2, 20)
    out = tokens(model, ids, mask, 24)
    other = torch.where(mask == 0, 77, ids)
    assert torch.equal(tokens(model, other, mask, 24)[:, 20:], out[:, 20:])
    alone = tokens(model, ids[1:, 3:], mask[1:, 3:], 24)
    assert torch.equal(alone[0, 17:], out[1, 20:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ("sdpa", "alisa"))
def test_int8(attention: str) -> None:
    """int8 rows: not stock's logits, but near them, after a prefill, a chunk and single tokens."""
    stock, model = tiny_model("llama"), tiny_model("llama", attn_implementation=attention)
    cache = AlisaCache(model.config, sparsity=0.0, kv_dtype="int8")
    reference = DynamicCache(config=stock.config)
    generator = torch.Generator().manual_seed(1)
    for width in (20, 1, 9, 1, 1):
        ids = torch.randint(2, 128, (1, width), generator=generator)
        expected = stock(ids, past_key_values=reference).logits
        got = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert not torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.stores[0].pool.dtype == torch.int8


@torch.no_grad()
@pytest.mark.parametrize("padded", (False, True))
def test_alisa_attention_without_our_cache(padded: bool) -> None:
    """With no cache, or transformers' own, our attention is dense and respects 2-D masks."""
    stock, model = tiny_model("llama"), sparse_model()
    ids, mask = left_padded(3, 15)
    mask = mask if padded else torch.ones_like(mask)
    expected = stock(ids, attention_mask=mask, use_cache=False).logits
    got = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens(model, ids, mask, 12), tokens(stock, ids, mask, 12))


def test_alisa_attention_refuses_dropout() -> None:
    """Attention dropout with an AlisaCache is a typed error that says what to do."""
    model = sparse_model(layers=1, attention_dropout=0.5).train()
    ids, _ = left_padded(1, 5)
    with torch.no_grad(), pytest.raises(AlisaError, match=r"for inference; got: attention dropout; .*model\.eval\(\)"):
        model(ids, past_key_values=AlisaCache(model.config))


_SMALL: dict[str, Any] = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def _of(config: Any) -> Any:
    """A random model with scores far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(3.0)
    return model


@pytest.mark.parametrize(
    ("config", "prompt", "batch_size"),
    [(Gemma2Config, 7, 1), (Gemma2Config, 40, 2), (Gemma3TextConfig, 40, 2)],
)
def test_sliding_layers_and_soft_capped_scores(config: Any, prompt: int, batch_size: int) -> None:
    """Stock's tokens, over an AlisaCache, over transformers' own cache, and compiled; prompts beyond the window too."""
    changes = {"attn_logit_softcapping": 3.0} if config is Gemma2Config else {}
    stock = _of(config(**_SMALL, **changes))
    ours = _of(config(**_SMALL, **changes, attn_implementation="alisa"))
    ids, mask = left_padded(batch_size, prompt)
    for model in (Eager(ours, sparsity=0.0), ours, support.compiled(ours, inner="eager", sparsity=0.0)):
        assert_same_tokens(stock, model, ids, mask, 16)


def test_attention_sinks_are_refused() -> None:
    """By a typed error; they would be left out."""
    options = {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "alisa"}
    ids, mask = left_padded(1, 5)
    with pytest.raises(NotAvailableError, match=r"attention sinks; got: .*s_aux.*attn_implementation='eager'"):
        tokens(Eager(_of(GptOssConfig(**options))), ids, mask, 2)
