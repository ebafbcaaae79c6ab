"""`validate=N`: dense twins of the first decode steps, beside which nothing changes."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import alisa_compile
from alisa_compile import AlisaCache, NotAvailableError
from alisa_compile.hf.generate import session_of
from alisa_compile.hf.validate import Shadow
from alisa_compile.runtime.report import UNSAFE_KL, ValidatedStep, Validation
from tests.support import NOVEL, compiled, left_padded, novel, passage, recorded_compiles, tiny_model

PROMPT, NEW, N = 300, 20, 12
LOGGER = "alisa_compile.hf.validate"


@pytest.fixture(scope="module")
def short() -> Any:
    """A layer of the embedded model: its attention is real, and it compiles in little time."""
    return AutoModelForCausalLM.from_pretrained(NOVEL, dtype=torch.float32, num_hidden_layers=1).eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return passage(novel()[1], PROMPT, start=2000)


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **settings
    )
    return tokens


@torch.no_grad()
def dense_divergence(model: Any, ids: torch.Tensor, tokens: torch.Tensor, sparse: list[torch.Tensor]) -> Validation:
    """The slow way: one dense forward pass over all tokens, without any cache. sparse: logits of each decode step."""
    logits = model(tokens).logits[0, ids.shape[1] :].double().log_softmax(-1)
    same, divergence = 0, 0.0
    for step, got in enumerate(sparse):
        expected, found = logits[step], got[0].double().log_softmax(-1)
        same += int(expected.argmax() == found.argmax())
        divergence += float((expected.exp() * (expected - found)).sum())
    return Validation(len(sparse), len(sparse), same / len(sparse), divergence / len(sparse))


def test_unsafe_setting(caplog: pytest.LogCaptureFixture) -> None:
    """The embedded model, which keeps the most recent 5 % of its tokens and nothing else: there is a warning.

    The numbers are those of a dense model from the prompt on, and not of dense steps over rows that sparse steps have
    made: the error adds up, as it does for a user.
    """
    stock, tokenizer = novel()
    ids = passage(tokenizer, 600)
    model = compiled(stock, inner="eager", policy="local", sparsity=0.95, validate=24)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, LOGGER):
        out = run(model, ids, max_new_tokens=26, do_sample=True, output_logits=True, return_dict_in_generate=True)
    found = alisa_compile.report(model).validation
    expected = dense_divergence(stock, ids, out.sequences[:, :-1], list(out.logits[1:25]))
    assert (found.steps, found.tokens, found.agreement) == (24, 24, expected.agreement)
    assert found.kl == pytest.approx(expected.kl, rel=1e-3)
    assert found.kl > 1.5 * UNSAFE_KL
    (record,) = caplog.records
    assert "unsafe for this model" in record.getMessage() and f"above {UNSAFE_KL}" in record.getMessage()


def test_dense_is_equal_to_dense(short: Any, prompt: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(short, inner="eager", sparsity=0.0, validate=N)
    with caplog.at_level(logging.INFO, LOGGER):
        run(model, prompt)
    found = alisa_compile.report(model).to_dict()["validation"]
    assert (found["steps"], found["agreement"]) == (N, 1.0) and abs(found["kl"]) < 1e-8
    assert "12 steps beside dense" in str(alisa_compile.report(model))
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2  # what it takes, what it has shown


def test_tokens_state_and_graphs_are_the_same(short: Any) -> None:
    """Padded batch, int8 rows, sampled tokens: neither the store nor the random numbers notice; no graph more."""
    ids, mask = left_padded(2, 40, vocab=4000)
    outputs, compiles, scores, states = [], [], [], []
    for validate in (0, 8):
        torch._dynamo.reset()
        model = compiled(short, inner="eager", sparsity=0.8, validate=validate, kv_dtype="int8")
        torch.manual_seed(3)
        with recorded_compiles() as rows:
            outputs.append(run(model, ids, mask, do_sample=True))
        compiles.append([row.stage for row in rows])
        report = alisa_compile.report(model).to_dict()
        scores.append(report["validation"])
        (store,) = session_of(model).stores
        states.append([store.host_length, *store.tensors()])
        assert report["steps"] == NEW and report["recompiles"] == 0
    assert torch.equal(*outputs) and compiles[0] == compiles[1]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*states, strict=True))
    assert scores[0] is None and (scores[1]["steps"], scores[1]["tokens"]) == (8, 16)


def test_shadow_goes_after_n_steps(
    short: Any, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It holds memory for N steps only, and the eager model runs N times only; a trace shows them apart."""
    shadows: list[Shadow] = []
    calls: list[int] = []
    real_end, forward = Shadow.end, short.forward

    def end(self: Shadow) -> None:
        real_end(self)
        shadows.append(self)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("past_key_values"), DynamicCache) and kwargs["past_key_values"].get_seq_length():
            calls.append(kwargs["past_key_values"].get_seq_length())
        return forward(*args, **kwargs)

    monkeypatch.setattr(Shadow, "end", end)
    monkeypatch.setattr(short, "forward", counted)
    with alisa_compile.trace(tmp_path / "out.json"):
        run(compiled(short, inner="eager", validate=5), prompt)
    assert calls == list(range(PROMPT, PROMPT + 5))
    assert shadows[0] is shadows[-1] and shadows[0]._dense is None
    events = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["traceEvents"]
    lanes = [event["cat"] for event in events if event["ph"] == "X"]
    assert (lanes.count("validate"), lanes.count("compute")) == (5, NEW)


def test_short_generation(short: Any, prompt: torch.Tensor) -> None:
    """Fewer steps than asked for count all the same."""
    model = compiled(short, inner="eager", validate=50)
    run(model, prompt, max_new_tokens=4, min_new_tokens=4)
    assert alisa_compile.report(model).validation.steps == 3
    run(model, prompt, max_new_tokens=1, min_new_tokens=1)
    assert alisa_compile.report(model).validation is None


def test_ended_sequences_do_not_count(short: Any) -> None:
    """What comes after the end of a text is padding, about which models say anything."""
    tokenizer = novel()[1]
    ids = torch.cat([passage(tokenizer, 60, start) for start in (0, 5000)])
    free = run(short, ids)[:, 60:].tolist()
    token = next(token for row in free for token in row[2:8] if row.index(token) >= 2)
    model = compiled(short, inner="eager", sparsity=0.0, validate=10)
    run(model, ids, min_new_tokens=0, eos_token_id=token)
    expected = sum(min(10, row.index(token)) if token in row else 10 for row in free)
    assert alisa_compile.report(model).validation.tokens == expected < 20


def test_other_layers_and_later_turns(prompt: torch.Tensor) -> None:
    """Sliding layers keep caches of transformers' own; a second turn starts from what the cache holds."""
    stock = tiny_model("qwen3", layers=2, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    stock.config.layer_types = ["full_attention", "sliding_attention"]
    model = compiled(stock, inner="eager", sparsity=0.0)
    cache = AlisaCache(stock.config, batch_size=1, max_length=200, sparsity=0.0, validate=6)
    tokens = prompt[:, :50] % 120 + 2
    for turn in (1, 2):
        tokens = run(model, tokens, past_key_values=cache, max_new_tokens=8, min_new_tokens=8)
        found = alisa_compile.report(cache).validation
        assert (found.steps, found.agreement) == (6 * turn, 1.0) and abs(found.kl) < 1e-6


@pytest.mark.parametrize(
    ("options", "settings", "text"),
    (
        ({}, {"num_beams": 2}, "beam search.*num_beams=1"),
        ({"device_kv_budget": 220_000}, {}, "needs all K and V on the device.*got: a cache with rows below"),
        ({"device_kv_budget": 500_000}, {}, r"once more.*got: 488 KiB, of which .*expected: \d+ KiB or more"),
    ),
)
def test_refused(short: Any, prompt: torch.Tensor, options: Any, settings: Any, text: str) -> None:
    """Before the first token, and what was refused runs without the option."""
    with recorded_compiles() as rows, pytest.raises(NotAvailableError, match=f"'validate' .*{text}"):
        run(compiled(short, inner="eager", validate=3, **options), prompt, **settings)
    assert not rows
    if not settings:
        run(compiled(short, inner="eager", **options), prompt, max_new_tokens=2, min_new_tokens=2)


def test_never_ignored(short: Any, prompt: torch.Tensor) -> None:
    """Where no `generate` sees to it, the option is refused."""
    model = copy.deepcopy(short)
    model.set_attn_implementation("alisa")
    with pytest.raises(NotAvailableError, match="'validate' works in generate"), torch.no_grad():
        model(prompt, past_key_values=AlisaCache(model.config, validate=2), use_cache=True)


def test_summary() -> None:
    assert Validation.of([]) is None and Validation.of([ValidatedStep(0, 0, 0.0)]) is None
    found = Validation.of([ValidatedStep(2, 1, 0.3), ValidatedStep(1, 1, 0.0)])
    assert found is not None and (found.steps, found.tokens, found.is_unsafe) == (2, 3, False)
    assert (found.agreement, found.kl) == (2 / 3, pytest.approx(0.1))
    assert Validation.of([ValidatedStep(1, 1, math.nextafter(0.1, 1))]).is_unsafe  # type: ignore[union-attr]
