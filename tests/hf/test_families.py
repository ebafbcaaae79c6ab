"""Model families: attention is rewritten and exact, or refused by name and exact. Small random configurations.

A few cases run by default; all of them under `make test-all`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from tests.support import assert_same_tokens, compiled, left_padded, recorded_compiles

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": 128}
_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
_GQA = {"num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}
_BASE: dict[str, Any] = {**_TOKENS, **_SIZES}
_LLAMA: dict[str, Any] = {**_BASE, **_GQA}
_GPT2: dict[str, Any] = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_SLIDING: dict[str, Any] = {
    **_LLAMA,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MOE = {"num_experts_per_tok": 2}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _rope(**parameters: Any) -> Callable[[], Any]:
    return lambda: hf.LlamaConfig(**_LLAMA, rope_parameters={"rope_theta": 10000.0, **parameters})


#: Family -> (config, layers whose attention must be rewritten).
REWRITTEN: dict[str, tuple[Callable[[], Any], int]] = {
    "OPT": (lambda: hf.OPTConfig(**_BASE, ffn_dim=96, word_embed_proj_dim=64, num_hidden_layers=2), 2),
    "Llama": (lambda: hf.LlamaConfig(**_LLAMA), 2),
    "Llama, linear RoPE": (_rope(rope_type="linear", factor=2.0), 2),
    "Llama, YaRN": (_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128), 2),
    "Llama, LongRoPE": (
        _rope(
            rope_type="longrope",
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            original_max_position_embeddings=64,
            factor=8.0,
        ),
        2,
    ),
    "Llama 3 RoPE": (
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        2,
    ),
    "GPT-NeoX / Pythia": (lambda: hf.GPTNeoXConfig(**_BASE, intermediate_size=96, num_hidden_layers=2), 2),
    "Mistral": (lambda: hf.MistralConfig(**_LLAMA, sliding_window=None), 2),
    "Qwen2": (lambda: hf.Qwen2Config(**_LLAMA), 2),
    "Qwen3": (lambda: hf.Qwen3Config(**_LLAMA, head_dim=24), 2),
    "Phi-3": (lambda: hf.Phi3Config(**_LLAMA), 2),
    "Falcon, multi-query": (
        lambda: hf.FalconConfig(
            **_BASE, num_hidden_layers=2, multi_query=True, new_decoder_architecture=False, alibi=False
        ),
        2,
    ),
    "Falcon, new decoder": (
        lambda: hf.FalconConfig(
            **_BASE, num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=2, alibi=False
        ),
        2,
    ),
    "GPT-2": (lambda: hf.GPT2Config(**_GPT2), 2),
    "OLMo 2": (lambda: hf.Olmo2Config(**_LLAMA), 2),
    "SmolLM3": (lambda: hf.SmolLM3Config(**{**_LLAMA, "num_hidden_layers": 4}), 4),
    "Mixtral": (lambda: hf.MixtralConfig(**_LLAMA, **_MOE, num_local_experts=4, sliding_window=None), 2),
    "Qwen3-MoE": (
        lambda: hf.Qwen3MoeConfig(**_LLAMA, **_MOE, head_dim=16, num_experts=4, moe_intermediate_size=32),
        2,
    ),
    "Gemma 3, full layers": (lambda: hf.Gemma3TextConfig(**_SLIDING), 2),
    "Gemma 3n, full layers with their own KV": (
        lambda: hf.Gemma3nTextConfig(
            **_SLIDING, num_kv_shared_layers=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=16
        ),
        2,
    ),
}

#: Family -> (config, the reason that must be given). Attention stays dense, and the tokens are stock's.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "GPT-J": (lambda: hf.GPTJConfig(**_GPT2, rotary_dim=8), "attn_implementation='eager'"),
    "BLOOM (ALiBi)": (lambda: hf.BloomConfig(**_TOKENS, hidden_size=64, n_layer=2, n_head=4), "='eager'"),
    "Gemma 2 (soft-cap)": (lambda: hf.Gemma2Config(**_LLAMA, head_dim=16, sliding_window=16), "='eager'"),
    "GPT-OSS (sinks)": (
        lambda: hf.GptOssConfig(**_LLAMA, **_MOE, head_dim=16, num_local_experts=4, sliding_window=16),
        "='eager'",
    ),
    "DeepSeek-V3 (MLA)": (
        lambda: hf.DeepseekV3Config(**{**_LLAMA, "num_key_value_heads": 4}, **_MOE, **_MLA),
        "no layer of 'deepseek_v3' is plain full attention",
    ),
    "Llama, dynamic NTK RoPE": (_rope(rope_type="dynamic", factor=2.0), "its mask was prepared outside the graph"),
}

_BY_DEFAULT = ("Falcon, multi-query", "GPT-2", "GPT-J", "Llama, dynamic NTK RoPE")


def _cases(families: dict[str, Any]) -> list[Any]:
    marks = {name: () if name in _BY_DEFAULT else (pytest.mark.slow,) for name in families}
    return [pytest.param(name, marks=marks[name], id=name) for name in families]


def _model(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(make()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(3.0)
    return model


@pytest.mark.parametrize("family", _cases(REWRITTEN))
def test_rewritten(family: str) -> None:
    """Prefill and decode graphs hold one rewritten attention per full-attention layer; a padded batch is exact."""
    make, layers = REWRITTEN[family]
    model = _model(make)
    ids, mask = left_padded(2, 13)
    with recorded_compiles() as rows:
        assert_same_tokens(model, compiled(model, sparsity=0.0), ids, mask, 24)
    stages = {row.stage: row.rewritten for row in rows}
    assert stages == {"prefill": layers, "decode": layers}


@pytest.mark.parametrize("family", _cases(REFUSED))
def test_refused(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Dense, exact, and the reason is in a warning."""
    make, reason = REFUSED[family]
    from alisa_compile import backend

    backend._warn_once.cache_clear()
    model = _model(make)
    ids, mask = left_padded(2, 13)
    with recorded_compiles() as rows, caplog.at_level(logging.WARNING, logger="alisa_compile"):
        assert_same_tokens(model, compiled(model, sparsity=0.0), ids, mask, 24)
    assert rows and all(row.rewritten == 0 for row in rows)
    assert any(reason in record.getMessage() for record in caplog.records)
