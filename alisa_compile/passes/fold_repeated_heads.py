"""Normalise grouped-query attention: K and V repeated per query head become `enable_gqa=True` on the unrepeated ones.

transformers writes GQA in two ways: the flag, and `kv[:, :, None].expand(B, Hkv, n, T, D).reshape(B, Hkv * n, T, D)`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..config import AlisaConfig
from .base import PassResult, attention_nodes, example, is_call


def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    """Fold every attention whose K and V are both repeated."""
    result = PassResult("alisa_fold_repeated_heads")
    for node in attention_nodes(gm):
        if len(node.args) < 3:
            continue
        key, value = unrepeated(node.args[1]), unrepeated(node.args[2])
        if key is None or value is None:
            continue
        node.args = (node.args[0], key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        result.rewritten += 1
    return result


def unrepeated(node: Any) -> fx.Node | None:
    """The `[B, Hkv, T, D]` tensor behind a repeat_kv spelling; None if `node` is none."""
    if not is_call(node, "reshape", "view"):
        return None
    expand = node.args[0]
    if not is_call(expand, "expand"):
        return None
    insert = expand.args[0]
    if not is_call(insert, "getitem", "unsqueeze"):
        return None
    source = insert.all_input_nodes[0]
    before, wide, after = example(source), example(expand), example(node)
    if before.dim() != 4 or wide.dim() != 5 or after.dim() != 4 or example(insert).dim() != 5:
        return None
    batch, heads, tokens, head_dim = before.shape
    inserted_third = example(insert).shape == (batch, heads, 1, tokens, head_dim)
    repeated = after.shape == (batch, heads * wide.shape[2], tokens, head_dim)
    key = insert.args[1]
    full_slices = not isinstance(key, tuple) or all(part is None or part == slice(None) for part in key)
    return source if inserted_third and repeated and full_slices else None
