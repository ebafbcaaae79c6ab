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

import alisa_compile
from alisa_compile import backend
from alisa_compile.hf.generate import session_of
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
    "Llama, eager attention": (lambda: hf.LlamaConfig(**_LLAMA, attn_implementation="eager"), 2),
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
    "Llama, dynamic NTK RoPE": (_rope(rope_type="dynamic", factor=2.0), 2),
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
    "Falcon, multi-query, eager attention": (
        lambda: hf.FalconConfig(
            **_BASE,
            num_hidden_layers=2,
            multi_query=True,
            new_decoder_architecture=False,
            alibi=False,
            attn_implementation="eager",
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
    "GPT-2, eager attention": (lambda: hf.GPT2Config(**_GPT2, attn_implementation="eager"), 2),
    "GPT-J": (lambda: hf.GPTJConfig(**_GPT2, rotary_dim=8), 2),
    "OLMo 2": (lambda: hf.Olmo2Config(**_LLAMA), 2),
    "SmolLM3": (lambda: hf.SmolLM3Config(**{**_LLAMA, "num_hidden_layers": 4}), 4),
    "Mixtral": (lambda: hf.MixtralConfig(**_LLAMA, **_MOE, num_local_experts=4, sliding_window=None), 2),
    "Qwen3-MoE": (
        lambda: hf.Qwen3MoeConfig(**_LLAMA, **_MOE, head_dim=16, num_experts=4, moe_intermediate_size=32),
        2,
    ),
    "Gemma 2 (soft-cap), full layers": (lambda: hf.Gemma2Config(**_SLIDING, attn_logit_softcapping=3.0), 2),
    "Gemma 3, full layers": (lambda: hf.Gemma3TextConfig(**_SLIDING), 2),
    "Gemma 3, full layers, eager attention": (
        lambda: hf.Gemma3TextConfig(**_SLIDING, attn_implementation="eager"),
        2,
    ),
    "Gemma 3n, full layers with their own KV": (
        lambda: hf.Gemma3nTextConfig(
            **_SLIDING, num_kv_shared_layers=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=16
        ),
        2,
    ),
}

#: Family -> (config, the reason that must be given). Attention stays dense, and the tokens are stock's.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "BLOOM (ALiBi)": (
        lambda: hf.BloomConfig(**_TOKENS, hidden_size=64, n_layer=2, n_head=4),
        "a bias is added to the scores (ALiBi)",
    ),
    "Falcon (ALiBi)": (
        lambda: hf.FalconConfig(
            **_BASE, num_hidden_layers=2, multi_query=True, new_decoder_architecture=False, alibi=True
        ),
        "its mask differs between heads",
    ),
    "GPT-OSS (sinks)": (
        lambda: hf.GptOssConfig(**_LLAMA, **_MOE, head_dim=16, num_local_experts=4, sliding_window=16),
        "attention sinks",
    ),
    "GPT-Neo (its window is cut from a table by the number of keys)": (
        lambda: hf.GPTNeoConfig(
            **_TOKENS,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=512,
        ),
        "its scores go through 'where'",
    ),
    "DeepSeek-V3 (MLA)": (
        lambda: hf.DeepseekV3Config(**{**_LLAMA, "num_key_value_heads": 4}, **_MOE, **_MLA),
        "no layer of 'deepseek_v3' is plain full attention",
    ),
}

#: Compiled by Inductor; the others by aot_eager, which takes a fraction of the time.
_INDUCTOR = ("OPT", "Llama", "GPT-NeoX / Pythia", "Qwen3")

_BY_DEFAULT = (
    "BLOOM (ALiBi)",
    "DeepSeek-V3 (MLA)",
    "Falcon, multi-query",
    "GPT-2",
    "GPT-J",
    "GPT-Neo (its window is cut from a table by the number of keys)",
    "Llama, eager attention",
)


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
    """Prefill and decode graphs hold one rewritten attention per full-attention layer; a padded batch is exact.

    Every other attention layer has a reason, once in each graph and in the report.
    """
    make, layers = REWRITTEN[family]
    model = _model(make)
    candidate = compiled(model, inner="inductor" if family in _INDUCTOR else "aot_eager", sparsity=0.0)
    ids, mask = left_padded(2, 13)
    with recorded_compiles() as rows:
        assert_same_tokens(model, candidate, ids, mask, 24)
    stages = {row.stage: row.rewritten for row in rows}
    assert stages == {"prefill": layers, "decode": layers}
    left = _attention_layers(model) - layers
    assert [len(row.skipped) for row in rows] == [left] * len(rows)
    assert len(alisa_compile.report(candidate).to_dict()["skipped"]) == left


@pytest.mark.parametrize("family", _cases(REFUSED))
def test_refused(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Dense, exact, and the reason is in a warning, and in a row for each attention layer; also in the next call."""
    make, reason = REFUSED[family]
    backend._warn_once.cache_clear()
    model = _model(make)
    candidate = compiled(model, sparsity=0.0)
    ids, mask = left_padded(2, 13)
    layers = _attention_layers(model)
    with recorded_compiles() as rows, caplog.at_level(logging.WARNING, logger="alisa_compile"):
        for _ in range(2):
            assert_same_tokens(model, candidate, ids, mask, 24)
    assert any(reason in record.getMessage() for record in caplog.records)
    assert all(row.rewritten == 0 and len(row.skipped) == layers for row in rows)
    assert {row.stage for row in rows} <= {"prefill", "other"}  # no AlisaCache in a decode graph
    session = session_of(candidate)
    assert session is not None and not session.stores
    assert len(session.left_out) == layers and all(reason in row.reason for row in session.left_out)
    assert [row["reason"] for row in alisa_compile.report(candidate).to_dict()["skipped"]] == [
        row.reason for row in session.left_out
    ]


def _attention_layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def test_first_call_of_a_refused_model(caplog: pytest.LogCaptureFixture) -> None:
    """The prompt's graph tells; the rest of that call is eager over its AlisaCache, which the report describes."""
    model = _model(REFUSED["BLOOM (ALiBi)"][0])
    candidate = compiled(model, sparsity=0.0)
    ids, mask = left_padded(2, 13)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    with recorded_compiles() as rows:
        assert torch.equal(candidate.generate(ids, attention_mask=mask, **options), expected)
    assert [row.stage for row in rows] == ["prefill"]
    report = alisa_compile.report(candidate).to_dict()
    assert [row["layer"] for row in report["skipped"]] == [0, 1]
    assert (report["steps"], report["tokens"]) == (24, 36)


def test_one_token_prompt_of_a_refused_model() -> None:
    """A prompt of one token would be a decode graph, which shows the whole capacity: not compiled at first."""
    model = _model(REFUSED["BLOOM (ALiBi)"][0])
    candidate = compiled(model, sparsity=0.0)
    ids = torch.tensor([[5]])
    with recorded_compiles() as rows:
        assert_same_tokens(model, candidate, ids, torch.ones_like(ids), 12)
    assert not rows


@pytest.mark.slow
def test_layers_that_share_rows_select_once() -> None:
    """A second layer over the same rows would see the working set that the first has chosen for the coming step."""
    model = _model(REWRITTEN["Gemma 3n, full layers with their own KV"][0])
    candidate = compiled(model, inner="eager", sparsity=0.5)
    ids, mask = left_padded(2, 13)
    candidate.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=3, pad_token_id=0)
    reasons = {row["layer"]: row["reason"] for row in alisa_compile.report(candidate).to_dict()["skipped"]}
    assert "another layer attends to its rows of the cache first" in reasons[3]  # 1 owns the rows that 3 reads
    assert 1 not in reasons
