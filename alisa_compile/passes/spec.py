"""The legal graph after the passes, as a checker. Runs under ALISA_CHECK=1 and in tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from ..errors import GraphError
from ..runtime.report import SkipRow
from .base import attention_nodes, example, is_op

ops = torch.ops.alisa
_ATTENTION = (ops.swa_attention.default, ops.prefill_attention.default, ops.extend_attention.default)
_SCORING = (ops.kv_select.default, ops.kv_seed.default)
_LAYER = {
    ops.kv_append.default: 10,
    ops.swa_attention.default: 8,
    ops.extend_attention.default: 6,
    ops.kv_select.default: 6,
    ops.kv_seed.default: 7,
    ops.kv_read.default: 10,
}


def check(gm: fx.GraphModule, skipped: Sequence[SkipRow]) -> None:
    """Raise `GraphError` unless all rules hold.

    1. Every `alisa::` node that returns something knows its value (`meta["val"]` or Dynamo's `example_value`).
    2. One append per layer and store, before that layer's attention, which is before its selection.
    3. A dense read survives only where an attention was skipped, and every attention left dense has a reason.
    4. Selection follows attention exactly where rows are selected; without sparsity the graph only appends and attends.
    """
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target).startswith("alisa.")]
    for node in nodes:
        if node.target._schema.returns and example(node) is None:
            raise GraphError(
                f"node {node.name} has no recorded value", fix="set meta['val'] where it is inserted"
            )
    _check_appends(nodes, order)
    dense = [n for n in nodes if is_op(n, ops.kv_read.default) and n.users]
    left = {row.node for row in skipped}
    for node in attention_nodes(gm):
        if node.name not in left:
            raise GraphError(f"attention {node.name} is dense without a reason in the skip list")
    if dense and not left:
        raise GraphError(f"{dense[0].name} is used although no attention was skipped")
    selects = any(is_op(n, *_SCORING) for n in nodes)
    attends = [n for n in nodes if is_op(n, *_ATTENTION)]
    scored = sum(is_op(n, *_SCORING) for n in nodes)
    if selects and scored != len(attends):
        raise GraphError(
            "not every attention is followed by its selection", got=scored, expected=len(attends)
        )


def _check_appends(nodes: list[fx.Node], order: dict[fx.Node, int]) -> None:
    appends = [n for n in nodes if is_op(n, ops.kv_append.default)]
    counts = Counter((n.args[0], n.args[_LAYER[ops.kv_append.default]]) for n in appends)
    for (pool, layer), count in counts.items():
        if count != 1:
            raise GraphError(
                f"layer {layer} of {pool} is appended to {count} times in one step", expected="once"
            )
    place = {n.args[_LAYER[ops.kv_append.default]]: order[n] for n in appends}
    for node in nodes:
        if is_op(node, ops.swa_attention.default, ops.extend_attention.default, *_SCORING):
            layer = node.args[_LAYER[node.target]]  # type: ignore[index]
            if layer not in place or order[node] < place[layer]:
                raise GraphError(f"{node.name} reads layer {layer} before its append")
