"""`attn_implementation="alisa"`: sparse window attention in eager mode, through transformers' own registries.

A custom attention registered without a mask function silently gets no mask at all, so both are registered together.
Under torch.compile both step aside for `sdpa`, whose graph the passes rewrite.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import AlisaError, CacheError, NotAvailableError
from .cache import AlisaLayer, failures_of, refuse_gradients

NAME = "alisa"


def alisa_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The 2-D padding mask as it is (eager), or `sdpa`'s 4-D mask (compiled, for the passes to prove and drop)."""
    if torch.compiler.is_dynamo_compiling():
        mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    return kwargs.get("attention_mask")


def alisa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query [B, Hq, T, D]` over an AlisaCache; returns `[B, T, Hq, D]` and no weights."""
    if kwargs.get("s_aux") is not None:
        raise NotAvailableError(
            f"attn_implementation='{NAME}' is not available for attention sinks",
            got="a model that adds a learned score to each softmax (s_aux)",
            fix="load the model with attn_implementation='eager'",
        )
    layer: AlisaLayer | None = getattr(key, "alisa_layer", None)
    if layer is None and getattr(key, "alisa_dense", None):
        raise CacheError(
            "this AlisaCache would be dense, although the model's eager attention is sparse",
            got="a cache built from a config without attn_implementation='alisa'",
            expected="the config of the model as it is now",
            fix="build it as AlisaCache(model.config, ...) after attn_implementation is set",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_dynamo_compiling() or layer is None:
        mask = attention_mask
        is_bare = mask is None and (softcap or (sliding_window and not torch.compiler.is_dynamo_compiling()))
        if is_bare or (mask is not None and mask.dim() == 2):
            mask = _dense_mask(mask, query, key, sliding_window)
        if softcap:  # which torch's attention does not have
            attend_capped = torch.ops.alisa.capped_attention.default
            capped = attend_capped(query, key, value, mask, scale=scale, soft_cap=softcap)
            return capped.transpose(1, 2).contiguous(), None
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if dropout != 0.0:
        raise AlisaError("AlisaCache is for inference", got="attention dropout", fix="call model.eval() first")
    assert layer.store is not None
    with torch.no_grad(), failures_of(layer.store):
        out_heads = attend(layer, query, key, value, attention_mask, scale, softcap or 0.0)
    if torch.is_grad_enabled() and query.requires_grad:
        out_heads = refuse_gradients(out_heads, query)
    return out_heads.transpose(1, 2).contiguous(), None


def attend(
    layer: AlisaLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding_mask: torch.Tensor | None,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """The ops that the rewrite puts into a graph, called one by one."""
    ops, store, index = torch.ops.alisa, layer.store, layer.index
    assert store is not None
    new_tokens = query.shape[2]
    total = int(store.length[index])
    if padding_mask is not None and index == 0:
        width = padding_mask.shape[1]
        store.valid[:, :width] = padding_mask[:, :total] != 0
    valid = store.valid if padding_mask is not None or store.host_length else None
    stored = (
        query, store.pool, store.scales, store.table, store.length, valid, store.rows, store.counts, index,
    )  # fmt: skip
    tiered = store.is_tiered
    if new_tokens == 1:
        store.note_sparse_layers(int(bool(store.spec)))
        decode = ops.swa_attention.tiered if tiered else ops.swa_attention.default
        out, mass = decode(*stored, scale, *store.ticket_argument, soft_cap)
    elif total == new_tokens:
        block = (query, key, value, padding_mask, store.groups, store.spec)
        out, mass = ops.prefill_attention(*block, scale, soft_cap)
    else:
        extend = ops.extend_attention.tiered if tiered else ops.extend_attention.default
        out, mass = extend(*stored, store.spec, scale, *store.ticket_argument, soft_cap)
    if store.spec:
        state = (store.scores, store.rows, store.counts, mass, store.length, store.origin, valid)
        if new_tokens == 1:
            ops.kv_select(*state, index, store.spec)
        else:
            ops.kv_seed(*state, new_tokens, index, store.spec)
    if tiered:
        rows = (store.pool, store.scales, store.table, store.length)
        ops.kv_offload(*rows, store.ticket, index, store.spec)
        ops.kv_prefetch(*rows, store.rows, store.counts, store.ticket, index)
    layer.finish_eager_step(new_tokens)
    result: torch.Tensor = out
    return result


def _dense_mask(
    padding_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, sliding_window: int | None
) -> torch.Tensor:
    """A 4-D causal mask from a 2-D one, for K and V of the latest tokens that are not from an AlisaCache."""
    queries, keys = query.shape[2], key.shape[2]
    columns = torch.arange(keys, device=query.device)
    positions = torch.arange(keys - queries, keys, device=query.device)
    attended = (columns <= positions[:, None])[None, None]
    if sliding_window is not None:
        attended = attended & (columns > positions[:, None] - sliding_window)
    return attended if padding_mask is None else attended & (padding_mask[:, None, None, -keys:] != 0)


def register() -> None:
    """Make `attn_implementation="alisa"` known to transformers."""
    AttentionInterface.register(NAME, alisa_attention)
    AttentionMaskInterface.register(NAME, alisa_mask)
