"""`alisa::capped_attention`: attention with soft-capped scores as one node; AOTAutograd inlines its body.

`F.scaled_dot_product_attention` has no soft-cap, so this stands for such attention between the passes, and where it is
left dense.
"""

from __future__ import annotations

import torch

from ..library import define_decomposed


def soft_capped(logits: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """`soft_cap * tanh(logits / soft_cap)` (Gemma 2, arXiv 2408.00118, section 2); a cap of 0 changes nothing."""
    return (logits / soft_cap).tanh() * soft_cap if soft_cap else logits


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float,
    soft_cap: float,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` with scores `soft_capped(query @ key^T * scale) + attn_mask`.

    query: `[B, Hq, T, D]`; key, value: `[B, Hkv, S, D]`; attn_mask: bool (True = attended) or added, of a shape that
    broadcasts to `[B, Hq, T, S]`; a row that may attend to nothing becomes 0. enable_gqa: as torch's, and without
    effect, since the shapes tell. Scores are float32 at least.
    """
    batch_size, query_heads, length, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    packed = query.reshape(batch_size, kv_heads, query_heads // kv_heads * length, head_dim)
    logits = (packed @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    logits = soft_capped(logits, soft_cap).reshape(batch_size, query_heads, length, tokens)
    if attn_mask is None:
        weights = logits.softmax(-1)
    elif attn_mask.dtype == torch.bool:
        weights = logits.masked_fill(~attn_mask, float("-inf")).softmax(-1)
        weights = weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0)
    else:
        weights = (logits + attn_mask).softmax(-1)
    out = weights.to(query.dtype).reshape(*packed.shape[:3], tokens) @ value
    return out.reshape(batch_size, query_heads, length, value.shape[3])


define_decomposed(
    "capped_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, float scale, float soft_cap, "
    "bool enable_gqa=False) -> Tensor",
    capped_attention,
)
