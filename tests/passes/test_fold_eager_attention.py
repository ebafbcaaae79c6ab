"""Attention written out in single operations: folded where it is plain attention, else left alone with a reason."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama

import alisa_compile
from tests.passes.graphs import Capture, captures
from tests.support import compiled, left_padded, tiny_model

Attend = Callable[..., torch.Tensor]


def _model(attend: Attend, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose eager attention is `attend(query, key, value, mask, scale, training) -> [B, H, T, D]`."""

    def forward(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, dropout: float = 0.0, **_: Any
    ) -> tuple[torch.Tensor, None]:
        key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
        value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
        out = attend(query, key, value, mask, scaling)
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", forward)
    return tiny_model("llama", attn_implementation="eager").to(dtype)


def _logits(model: Any) -> torch.Tensor:
    ids, mask = left_padded(2, 9)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, **options)
    return torch.stack(out.logits)


def _check_equal(model: Any, sparsity: float = 0.0) -> list[Capture]:
    """Logits of every step equal stock's; returns the graphs."""
    expected = _logits(model)
    with captures() as found:
        got = _logits(compiled(model, inner="eager", sparsity=sparsity))
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    return found


def _as_llama(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=False), v)


def _as_gptj(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / math.sqrt(q.shape[-1])
    weights = F.softmax(scores + mask, dim=-1).to(v.dtype)
    return torch.matmul(F.dropout(weights, 0.3, False), v)


def _with_operators(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return (mask + 0.5 * (q @ k.permute(0, 1, 3, 2) * (2 * scale))).softmax(-1) @ v


def _in_place(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1)
    scores /= 4.0
    scores += mask
    return torch.softmax(scores, 3).type_as(v).matmul(v)


def _scaled_query(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return torch.matmul(F.softmax(torch.matmul(q * scale, k.transpose(3, 2)) + mask, -1), v)


def _dropout_of_nothing(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) * scale + mask, dim=-1)
    return torch.matmul(F.dropout(weights, 0.0, True), v)


def _as_gemma2(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * scale / 0.5) * 0.5
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _capped_in_float32(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = (-0.7) * (torch.matmul(q, k.transpose(2, 3)).float() * (-scale / 0.7)).tanh()
    return torch.matmul(F.softmax(scores + mask, dim=-1).to(v.dtype), v)


CAPPED: tuple[Attend, ...] = (_as_gemma2, _capped_in_float32)
FOLDED: tuple[Attend, ...] = (
    _as_llama, _as_gptj, _with_operators, _in_place, _scaled_query, _dropout_of_nothing, *CAPPED,
)  # fmt: skip


@pytest.mark.parametrize("attend", FOLDED, ids=lambda function: function.__name__.strip("_"))
def test_spellings_of_attention_are_folded(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers of both graphs are rewritten; scale, mask and dtypes are those of the spelling."""
    found = _check_equal(_model(attend, monkeypatch))
    assert [capture.stage for capture in found] == ["prefill", "decode"]
    for capture in found:
        assert capture.outcome.rewritten == 2 and not capture.outcome.skipped
        assert not [n for n in capture.after.graph.nodes if "softmax" in str(n.target)]


@pytest.mark.parametrize("attend", (_as_llama, _as_gptj), ids=("llama", "gptj"))
def test_half_precision(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts around float32 scores are looked through, those of the query and the keys too."""
    found = _check_equal(_model(attend, monkeypatch, torch.bfloat16))
    assert [capture.outcome.rewritten for capture in found] == [2, 2]


def _other_dim(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-2), v)


def _over_heads(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=1), v)


def _capped_with_its_mask(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.tanh((torch.matmul(q, k.transpose(2, 3)) * scale + mask) / 2.0) * 2.0
    return torch.matmul(F.softmax(scores, dim=-1), v)


def _capped_twice(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.tanh(torch.tanh(torch.matmul(q, k.transpose(2, 3)) * scale / 2.0) * 2.0)
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _with_sinks(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scale + mask
    weights = F.softmax(torch.cat([scores, torch.ones_like(scores[..., :1])], dim=-1), dim=-1)
    return torch.matmul(weights[..., :-1], v)


def _with_bias(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    bias = torch.arange(k.shape[2], dtype=q.dtype) * 0.1
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + bias + mask, dim=-1), v)


def _scaled_mask(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return torch.matmul(F.softmax((torch.matmul(q, k.transpose(2, 3)) + mask) * scale, dim=-1), v)


def _scale_of_the_graph(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.abs().mean()
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _clamped(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = (torch.matmul(q, k.transpose(2, 3)) * scale).relu()
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _weights_returned(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-1)
    return torch.matmul(weights, v) + weights.amax(-1, keepdim=True)


def _rounded(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)).to(torch.bfloat16).to(torch.float32) * scale
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _query_written_to(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    q.mul_(2.0)
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _untransposed(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = torch.matmul(q, k.reshape(*k.shape[:2], k.shape[3], k.shape[2])) * scale
    return torch.matmul(F.softmax(scores + mask, dim=-1), v)


def _values_from_keys(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, v.transpose(2, 3)) * scale + mask, dim=-1), k)


def _not_causal(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask * 1e-9, dim=-1), v)


def _unmasked_mean(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    return q + v.mean(2, keepdim=True) * k.mean(2, keepdim=True)


REFUSED: dict[Attend, str] = {
    _other_dim: "its softmax is not over the last of four dimensions",
    _over_heads: "its softmax is not over the last of four dimensions",
    _capped_with_its_mask: "its mask is scaled together with its scores",
    _capped_twice: "its scores are soft-capped twice",
    _with_sinks: "attention sinks",
    _with_bias: "more than a mask is added to its scores",
    _scaled_mask: "its mask is scaled together with its scores",
    _scale_of_the_graph: "its scale is computed in the graph",
    _clamped: "its scores go through 'relu'",
    _weights_returned: "used elsewhere too (output_attentions)",
    _rounded: "it rounds torch.float32 to torch.bfloat16",
    _query_written_to: "which it attends with",
    _untransposed: "not the product of queries and transposed keys",
    _values_from_keys: "its K and V are swapped",
    _not_causal: "its mask uses 'mul'",
    _unmasked_mean: "what the model does with its K and V is not recognised",
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda function: function.__name__.strip("_"))
def test_other_attention_stays_as_it_is(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with the reason for each layer, and the model's own results, although steps see the whole capacity."""
    found = _check_equal(_model(attend, monkeypatch))
    assert [capture.stage for capture in found] == ["prefill"], "the later steps are eager"
    outcome = found[0].outcome
    assert outcome.rewritten == 0
    assert [row.layer for row in outcome.skipped] == [0, 1]
    assert all(REFUSED[attend] in row.reason for row in outcome.skipped), outcome.skipped


@pytest.mark.parametrize(
    "attend", (pytest.param(_as_llama, marks=pytest.mark.slow, id="llama"), pytest.param(_as_gemma2, id="gemma2"))
)
def test_rows_below_the_device(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with tiers: the same tokens as with everything on the device, and rows that moved."""
    model = _model(attend, monkeypatch)
    ids, mask = left_padded(2, 200)
    tokens = []
    for budgets in ({}, {"device_kv_budget": 130 * 1024, "host_kv_budget": "1MiB"}):
        ours = compiled(model, inner="eager", policy="churn", max_rows=None, **budgets)
        tokens.append(ours.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0))
        report = alisa_compile.report(ours).to_dict()
        assert report["rewritten"] == {"prefill": 2, "decode": 2}
    assert torch.equal(*tokens)
    assert report["bytes_moved"]["host_to_device"] > 0


def _with_dropout(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-1)
    return torch.matmul(F.dropout(weights, p=0.5, training=True), v)


def test_dropout_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Dropout that is on is not plain attention."""
    with captures() as found, caplog.at_level(logging.WARNING, logger="alisa_compile"):
        _logits(compiled(_model(_with_dropout, monkeypatch), inner="eager"))
    assert {row.reason for row in found[0].outcome.skipped} == {"it uses dropout (training mode)"}
    assert found[0].outcome.rewritten == 0
    assert "it uses dropout" in caplog.text


@pytest.mark.parametrize("attend", CAPPED, ids=lambda function: function.__name__.strip("_"))
def test_the_cap_reaches_the_ops(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a positive number, with the scale that the scores have before it."""
    caps = {_as_gemma2: 0.5, _capped_in_float32: 0.7}
    for capture in _check_equal(_model(attend, monkeypatch)):
        for node in capture.calls(torch.ops.alisa.prefill_attention.default, torch.ops.alisa.swa_attention.default):
            assert node.args[-2:] == pytest.approx((16**-0.5, caps[attend]))


@pytest.mark.parametrize("attend", (_as_gptj, _as_gemma2), ids=("gptj", "gemma2"))
def test_sparse_selection_follows(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is folded is scored and selected like any other attention."""
    with captures() as found:
        _logits(compiled(_model(attend, monkeypatch), inner="eager", sparsity=0.5))
    for capture in found:
        assert capture.outcome.rewritten == 2
        assert len(capture.calls(torch.ops.alisa.kv_select.default, torch.ops.alisa.kv_seed.default)) == 2


def test_attention_without_a_cache() -> None:
    """A module of its own keeps its attention, and the skip list says why."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.5, dim=-1), v)

    inputs = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    with captures() as found:
        out = torch.compile(attend, backend="alisa", options={"inner_compiler": "eager"})(*inputs)
    torch.testing.assert_close(out, attend(*inputs))
    (row,) = found[0].outcome.skipped
    assert (row.layer, row.reason) == (None, "its K and V do not come from an AlisaCache")
