"""Regressions found by review: more than one batch size or model in a process, and interrupted forward passes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import alisa_compile
from alisa_compile import AlisaCache
from tests.support import compiled, left_padded, tiny_model


@torch.no_grad()
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_batch_size_is_rewritten(padded: bool) -> None:
    """Dynamo must not turn the batch size into an unknown at the second one: attention would stay dense."""
    candidate = compiled(tiny_model("llama"), "eager")
    for batch_size in (1, 2, 3, 2):
        ids = torch.full((batch_size, 12), 7)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :2] = 0
        candidate.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert alisa_compile.report(candidate).skipped == ()


@torch.no_grad()
def test_every_head_dim_is_rewritten() -> None:
    """Dynamo remembers sizes per source line, so one model's shapes must not become unknowns of the next model."""
    for family in ("llama", "qwen3", "llama"):
        candidate = compiled(tiny_model(family, layers=3 if family == "qwen3" else 2), "eager")
        candidate.generate(torch.full((1, 12), 7), max_new_tokens=4, do_sample=False, pad_token_id=0)
        report = alisa_compile.report(candidate).to_dict()
        assert report["skipped"] == []
        assert all(report["rewritten"].values())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "alisa"])
def test_an_interrupted_eager_step_is_forgotten(attention: str) -> None:
    """The layers that had run hold a row too many; the next step must not attend to it."""
    model = tiny_model("llama")
    prompt, lost, token = torch.full((1, 12), 7), torch.tensor([[3]]), torch.tensor([[4]])
    stock = DynamicCache(config=model.config)
    model(prompt, past_key_values=stock)
    expected = model(token, past_key_values=stock).logits
    model.set_attn_implementation(attention)
    cache = AlisaCache(model.config, sparsity=0)
    model(prompt, past_key_values=cache)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(lost, past_key_values=cache)
    hook.remove()
    assert torch.allclose(model(token, past_key_values=cache).logits, expected, atol=1e-4)


@torch.no_grad()
def test_a_turn_of_one_token_may_restate_the_mask_of_its_history() -> None:
    """The mask of a continued turn counts in full, also when only one token is new."""
    model = tiny_model("llama")
    prompt = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    outputs = []
    for runner, cache in (
        (model, DynamicCache(config=model.config)),
        (compiled(model, "eager", sparsity=0), AlisaCache(model.config, sparsity=0)),
    ):
        first = runner.generate(prompt, max_new_tokens=8, past_key_values=cache, do_sample=False, pad_token_id=0)
        mask = torch.ones_like(first)
        mask[0, -6:-2] = 0
        outputs.append(
            runner.generate(
                first, attention_mask=mask, max_new_tokens=8, past_key_values=cache, do_sample=False, pad_token_id=0
            )
        )
    assert torch.equal(*outputs)


def test_report_counts_sparse_layers_only() -> None:
    """Layers that were left dense do not count as sparse, nor does eager attention that reads everything."""
    stock = tiny_model("llama")
    prompt, mask = left_padded(1, 40)
    model = compiled(stock, "eager", sparsity=0.8, refresh=0)
    model.generate(prompt, attention_mask=mask, max_new_tokens=6)
    assert 0.75 < alisa_compile.report(model).effective_sparsity < 0.85
    torch._dynamo.reset()
    with torch._inductor.config.patch(disabled_passes="alisa_rewrite_attention"):
        dense = compiled(stock, "eager", sparsity=0.8, refresh=0)
        dense.generate(prompt, attention_mask=mask, max_new_tokens=6)
    assert alisa_compile.report(dense).effective_sparsity == 0.0
    cache = AlisaCache(stock.config, sparsity=0.8)
    stock.generate(prompt, attention_mask=mask, max_new_tokens=6, past_key_values=cache)
    assert alisa_compile.report(cache).effective_sparsity == 0.0


@torch.no_grad()
def test_decode_step_may_mask_history() -> None:
    """A plain forward of one token whose mask leaves out history that was visible before equals stock."""
    stock = tiny_model("llama")
    ids, _ = left_padded(1, 12)
    cache = AlisaCache(stock.config, batch_size=1, sparsity=0.0)
    model, expected = compiled(stock, "eager", sparsity=0.0), DynamicCache(config=stock.config)
    for start, end, hidden in ((0, 11, 0), (11, 12, 4)):
        mask = torch.ones(1, end, dtype=torch.int64)
        mask[:, 2 : 2 + hidden] = 0
        inputs = {"attention_mask": mask, "position_ids": torch.arange(start, end)[None]}
        got = model(ids[:, start:end], past_key_values=cache, **inputs).logits
        want = stock(ids[:, start:end], past_key_values=expected, **inputs).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
