"""The legal graph after the passes, as a checker. Runs under ALISA_CHECK=1 and in tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from ..errors import GraphError
from ..runtime.report import SkipRow
from .base import attention_nodes, example, is_call, is_op
from .rewrite_attention import APPENDS, DECODES, EXTENDS, READS

ops = torch.ops.alisa
_OFFLOADS = (ops.kv_offload.default, ops.kv_offload.recomputing)
_STORED = (*DECODES, *EXTENDS)
_ATTENTION = (*_STORED, ops.prefill_attention.default)
_SCORING = (ops.kv_select.default, ops.kv_seed.default)
_MASS = 3  # argument of the scoring ops
_LENGTH_AND_LAYER = {  # arguments that say which store and which of its layers
    **dict.fromkeys(APPENDS, (3, 10)),
    **dict.fromkeys(_STORED, (4, 8)),
    **dict.fromkeys(_OFFLOADS, (3, 5)),
    ops.kv_prefetch.default: (3, 7),
    ops.hidden_append.default: (2, 4),
    ops.kv_select.default: (4, 7),
    ops.kv_seed.default: (4, 8),
}


def check(gm: fx.GraphModule, skipped: Sequence[SkipRow]) -> None:
    """Raise `GraphError` unless all rules hold.

    1. Every `alisa::` node that returns something knows its value (`meta["val"]` or Dynamo's `example_value`).
    2. One append per layer and store, before that layer's attention, which is before its selection.
    3. A dense read survives only where an attention was skipped, and every attention left dense has a reason.
    4. Selection follows attention exactly where rows are selected; without sparsity the graph only appends and attends.
    5. In a store with tiers each rewritten layer waits once, before its append, and after its attention and selection
       starts one offload, then one prefetch. No other store waits or moves anything.
    6. In a store that deletes rows each append follows one save of its layer's input, and in each rewritten layer one
       recomputation follows the prefetch, so that it runs while rows are fetched.
    """
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target).startswith("alisa.")]
    for node in nodes:
        if node.target._schema.returns and example(node) is None:
            raise GraphError(f"node {node.name} has no recorded value", fix="set meta['val'] where it is inserted")
    _check_appends(nodes, order)
    dense = [n for n in nodes if is_op(n, *READS) and n.users]
    left = {row.node for row in skipped}
    for node in attention_nodes(gm):
        if node.name not in left:
            raise GraphError(f"attention {node.name} is dense without a reason in the skip list")
    if dense and not left:
        raise GraphError(f"{dense[0].name} is used although no attention was skipped")
    _check_scoring(nodes)
    _check_movement(nodes, order)
    _check_recomputation(nodes, order)


def _site(node: fx.Node) -> tuple[object, object]:
    length, layer = _LENGTH_AND_LAYER[node.target]  # type: ignore[index]
    return node.args[length], node.args[layer]


def _check_appends(nodes: list[fx.Node], order: dict[fx.Node, int]) -> None:
    appends = [n for n in nodes if is_op(n, *APPENDS)]
    for (length, layer), count in Counter(map(_site, appends)).items():
        if count != 1:
            raise GraphError(f"layer {layer} of {length} is appended to {count} times in one step", expected="once")
    place = {_site(n): order[n] for n in appends}
    for node in nodes:
        if is_op(node, *_STORED, *_SCORING):
            site = _site(node)
            if site not in place or order[node] < place[site]:
                raise GraphError(f"{node.name} reads layer {site[1]} before its append")


def _check_scoring(nodes: list[fx.Node]) -> None:
    attends = [n for n in nodes if is_op(n, *_ATTENTION)]
    scoring = [n for n in nodes if is_op(n, *_SCORING)]
    if scoring and len(scoring) != len(attends):
        raise GraphError("not every attention is followed by its selection", got=len(scoring), expected=len(attends))
    for node in scoring:
        mass = node.args[_MASS]
        source = mass.args[0] if is_call(mass, "getitem") and mass.args[1] == 1 else None
        if not is_op(source, *_ATTENTION):
            raise GraphError(f"{node.name} does not take the attention mass of an attention")
        if source.target in _LENGTH_AND_LAYER and _site(source) != _site(node):
            raise GraphError(
                f"{node.name} selects with the attention mass of another layer",
                got=f"layer {_site(source)[1]}",
                expected=f"layer {_site(node)[1]}",
            )


def _check_movement(nodes: list[fx.Node], order: dict[fx.Node, int]) -> None:
    waits = {(n.args[1], n.args[3]): n for n in nodes if is_op(n, ops.kv_wait.default)}
    if len(waits) != sum(is_op(n, ops.kv_wait.default) for n in nodes):
        raise GraphError("a layer waits for its transfers more than once in a step", expected="once")
    starts = {}
    for name, variants, ticket in (("kv_offload", _OFFLOADS, 4), ("kv_prefetch", (ops.kv_prefetch.default,), 6)):
        found = [n for n in nodes if is_op(n, *variants)]
        starts[name] = {(n.args[ticket], _site(n)[1]): n for n in found}
        if len(starts[name]) != len(found) or starts[name].keys() != waits.keys():
            raise GraphError(
                f"{name} does not come once for each layer that waits", got=len(found), expected=len(waits)
            )
    appends = {_site(n): n for n in nodes if is_op(n, *APPENDS)}
    latest: dict[tuple[object, object], fx.Node] = {}
    for node in nodes:
        if is_op(node, *_STORED, *_SCORING):
            latest[_site(node)] = node
    for key, wait in waits.items():
        offload, prefetch = starts["kv_offload"][key], starts["kv_prefetch"][key]
        site = _site(offload)
        append = appends.get(site)
        ends = latest.get(site, append)
        if (
            append is None
            or ends is None
            or not (order[wait] < order[append] <= order[ends] < order[offload] < order[prefetch])
        ):
            raise GraphError(
                f"transfers of layer {site[1]} are out of order",
                expected="wait, append, attention, selection, offload, prefetch",
            )


def _check_recomputation(nodes: list[fx.Node], order: dict[fx.Node, int]) -> None:
    appends = {_site(n): n for n in nodes if is_op(n, *APPENDS)}
    saves = [n for n in nodes if is_op(n, ops.hidden_append.default)]
    for node in saves:
        append = appends.pop(_site(node), None)
        if append is None or order[node] > order[append]:
            raise GraphError(f"{node.name} does not come once before an append to layer {_site(node)[1]}")
    saved = {_site(n) for n in saves}
    for node in [n for n in nodes if is_op(n, ops.kv_offload.recomputing)]:
        if _site(node) not in saved:
            raise GraphError(f"{node.name} deletes rows of layer {_site(node)[1]} whose inputs are not saved")
    offloads = [n for n in nodes if is_op(n, ops.kv_offload.recomputing)]
    deleting: set[object] = {n.args[15] for n in nodes if is_op(n, ops.kv_read.recomputing)}
    deleting |= {n.args[4] for n in offloads}
    for node in [n for n in nodes if is_op(n, ops.kv_offload.default)]:
        if node.args[4] in deleting:
            raise GraphError(f"{node.name} deletes rows without comparing the first with what is rebuilt")
    every = {(n.args[6], n.args[7]): n for n in nodes if is_op(n, ops.kv_prefetch.default)}
    prefetches = {key: node for key, node in every.items() if key[0] in deleting}
    found = [n for n in nodes if is_op(n, ops.kv_recompute.default)]
    recomputes = {(n.args[2], n.args[3]): n for n in found}
    if len(recomputes) != len(found) or recomputes.keys() != prefetches.keys():
        raise GraphError(
            "kv_recompute does not come once for each layer that prefetches", got=len(found), expected=len(prefetches)
        )
    for key, node in recomputes.items():
        if order[node] < order[prefetches[key]]:
            raise GraphError(f"rows of layer {key[1]} are rebuilt before others are fetched")
