"""Eager sparse attention over a store with tiers: large rows, which the worker thread moves."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from alisa_compile import AlisaCache, TierError
from alisa_compile.hf import attention as alisa_attention
from alisa_compile.kernels import tiers

BATCH, PROMPT, NEW = 8, 200, 14


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=256, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(alisa_attention.NAME)
    return model


@torch.no_grad()
def _logits(model: LlamaForCausalLM, drained: bool, **options: object) -> torch.Tensor:
    tokens = torch.randint(2, 128, (BATCH, PROMPT + NEW), generator=torch.Generator().manual_seed(1))
    cache = AlisaCache(model.config, policy="churn", sparsity=0.5, max_length=PROMPT + NEW, **options)
    out = [model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1]]
    for place in range(PROMPT, PROMPT + NEW):
        if drained and cache.stores[0].tiers is not None:
            tiers.drain(cache.stores[0].tiers)
        out.append(model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    assert cache.stores[0].is_tiered == bool(options)
    return torch.stack(out)


def test_a_step_waits_for_the_transfers_of_the_one_before(model: LlamaForCausalLM) -> None:
    """The same logits whether or not somebody waits between the steps, and those of a store on the device alone."""
    rows = BATCH * 2 * 2 * 2 * 256 * 4  # bytes of a position
    budgets = {"device_kv_budget": rows * 185, "host_kv_budget": rows * 200}
    expected = _logits(model, drained=True)
    for _ in range(3):
        torch.testing.assert_close(_logits(model, drained=False, **budgets), expected, rtol=1e-4, atol=1e-4)


def test_a_failing_disk_is_a_typed_error(model: LlamaForCausalLM) -> None:
    """Also in eager mode, in the step that fails; the cache works again after a reset."""
    rows = BATCH * 2 * 2 * 2 * 256 * 4
    cache = AlisaCache(
        model.config, policy="churn", sparsity=0.5, max_length=PROMPT + NEW, device_kv_budget=rows * 185,
        host_kv_budget=rows * 4, disk_kv_budget=rows * 300,
    )  # fmt: skip
    tokens = torch.randint(2, 128, (BATCH, PROMPT + NEW), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True).logits
        assert cache.stores[0].disk is not None
        os.ftruncate(cache.stores[0].disk.fileno(), 0)
        with pytest.raises(TierError):
            for place in range(PROMPT, PROMPT + NEW):
                model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache.reset()
        again = model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, first)


class _Names(TorchDispatchMode):
    """The alisa ops that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("alisa."):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_ops_of_an_eager_step_come_in_the_order_of_the_graph(model: LlamaForCausalLM) -> None:
    """Each layer waits before its token takes a slot; a race would show in few runs only."""
    rows = BATCH * 2 * 2 * 2 * 256 * 4
    cache = AlisaCache(model.config, max_length=PROMPT + NEW, device_kv_budget=rows * 185, host_kv_budget=rows * 200)
    tokens = torch.randint(2, 128, (BATCH, PROMPT + 1), generator=torch.Generator().manual_seed(1))
    model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True)
    with _Names() as seen:
        model(tokens[:, PROMPT:], past_key_values=cache, use_cache=True)
    layer = ["kv_wait", "kv_append", "swa_attention", "kv_select", "kv_offload", "kv_prefetch"]
    assert seen.names == layer * 2
