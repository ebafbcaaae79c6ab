"""Normalise grouped-query attention: K and V repeated per query head become `enable_gqa=True` on the unrepeated ones.

transformers writes GQA in two ways: the flag, and `kv[:, :, None].expand(B, Hkv, n, T, D).reshape(B, Hkv * n, T, D)`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..config import AlisaConfig
from ..runtime.report import SkipRow
from .base import PassResult, Refusal, Writes, attention_nodes, example, is_call, model_layer


def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    """Fold every attention whose K and V are both repeated."""
    result = PassResult("alisa_fold_repeated_heads")
    writes = Writes(gm.graph)
    for node in attention_nodes(gm):
        if len(node.args) < 3:
            continue
        key, value = (_unwritten(argument, node, writes) for argument in node.args[1:3])
        if key is None or value is None or example(key).shape[1] != example(value).shape[1]:
            continue
        if example(node.args[0]).shape[1] != example(node.args[1]).shape[1]:
            continue  # one query head broadcast over all
        layer = model_layer(node, None)
        try:
            with result.rewrite(gm.graph, "repeated heads", layer):
                node.args = (node.args[0], key, value, *node.args[3:])
                node.kwargs = {**node.kwargs, "enable_gqa": True}
        except Refusal as refusal:
            result.skipped.append(SkipRow(node.name, layer, str(refusal)))
    return result


def _unwritten(node: Any, user: fx.Node, writes: Writes) -> fx.Node | None:
    """`unrepeated`, unless the copy or its source is changed in place before it is used."""
    source = unrepeated(node)
    if source is None or writes.between(source, source, user) or writes.between(node, source, user):
        return None
    return source


def unrepeated(node: Any) -> fx.Node | None:
    """The `[B, Hkv, T, D]` tensor behind a repeat_kv spelling; None if `node` is none."""
    if not is_call(node, "reshape", "view"):
        return None
    expand = node.args[0]
    if not is_call(expand, "expand"):
        return None
    insert = expand.args[0]
    if not is_call(insert, "getitem", "unsqueeze") or not _only_views(insert):
        return None
    source = insert.all_input_nodes[0]
    before, wide, after = example(source), example(expand), example(node)
    if before.dim() != 4 or wide.dim() != 5 or after.dim() != 4 or example(insert).dim() != 5:
        return None
    batch, heads, tokens, head_dim = before.shape
    inserted_third = example(insert).shape == (batch, heads, 1, tokens, head_dim)
    repeated = after.shape == (batch, heads * wide.shape[2], tokens, head_dim)
    same_dtype = before.dtype == after.dtype  # view() also reinterprets bytes
    return source if inserted_third and repeated and same_dtype else None


def _only_views(insert: fx.Node) -> bool:
    """Indexing with `None` and full slices keeps every element in its place; the shape tells the rest."""
    if is_call(insert, "unsqueeze"):
        return True
    key = insert.args[1]
    return isinstance(key, tuple) and all(part is None or part == slice(None) for part in key)
