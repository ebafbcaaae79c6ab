"""Rewrite attention over an AlisaCache into `alisa::` attention, scoring and selection.

Before: kv_append -> kv_read -> scaled_dot_product_attention, or capped_attention, with a mask. After, by the stage that
`kv_read` carries: decode: kv_append -> swa_attention -> kv_select; prefill: kv_append -> prefill_attention -> kv_seed;
extend (several tokens on a history): kv_append -> extend_attention -> kv_seed. Without sparsity nothing is scored or
selected. Where the rows of a store do not all fit the device: kv_wait before the append, kv_offload -> kv_prefetch at
the end; where it deletes rows, kv_offload -> kv_prefetch -> kv_recompute. The mask and the dense read are left without
users and disappear.
"""

from __future__ import annotations

import dataclasses
import math
from operator import getitem as _getitem
from typing import Any, cast

import torch
from torch import fx

from ..compat import symbolic_expression
from ..config import AlisaConfig
from ..runtime.report import SkipRow
from .base import (
    PassResult,
    Refusal,
    Writes,
    attention_nodes,
    attention_option,
    drop_unused,
    example,
    insert_call,
    is_call,
    is_op,
    kv_origins,
    model_layer,
)
from .causal_mask import CausalMask, prove_causal

ops = torch.ops.alisa

READS = (ops.kv_read.default, ops.kv_read.tiered, ops.kv_read.recomputing)
APPENDS = (ops.kv_append.default, ops.kv_append.tiered)
DECODES = (ops.swa_attention.default, ops.swa_attention.tiered, ops.swa_attention.recomputing)
EXTENDS = (ops.extend_attention.default, ops.extend_attention.tiered)

# Position of each argument in the schemas of kv_append and kv_read (see kernels/).
_APPEND_VALID, _APPEND_MASK, _APPEND_LAYER = 4, 9, 10


@dataclasses.dataclass(frozen=True)
class ReadSite:
    """The arguments of a `kv_read` node, by name."""

    pool: fx.Node
    scales: fx.Node | None
    table: fx.Node
    length: fx.Node
    valid: fx.Node
    scores: fx.Node | None
    rows: fx.Node | None
    counts: fx.Node | None
    origin: fx.Node | None
    key: fx.Node
    value: fx.Node
    layer: int
    stage: str
    spec: str
    padded: bool
    ticket: fx.Node | None = None  # of a store whose rows do not all fit the device
    hidden_size: int = 0  # of a store that deletes rows


def site_of(read: fx.Node) -> ReadSite:
    """What a `kv_read` reads."""
    return ReadSite(*cast("tuple[Any, ...]", read.args))


def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    """Rewrite each attention that can be proved equal; say why for each that cannot."""
    result = PassResult("alisa_rewrite_attention")
    writes = Writes(gm.graph)
    selected: set[fx.Node] = set()  # of these the working set is already that of the coming step
    paddings: dict[fx.Node, fx.Node | None] = {}  # of each store with padding, by its `valid`
    for node in attention_nodes(gm):
        reads = [origin for origin in kv_origins(node) if is_op(origin, *READS)]
        if not reads:
            continue  # another pass knows what its K and V are
        layer = model_layer(node, site_of(reads[0]).layer)
        try:
            read = _read_behind(node)
            site = site_of(read)
            if read in selected:
                raise Refusal("another layer attends to its rows of the cache first, and selects the coming step's")
            append = _append_of(gm, site)
            padding = _check(node, site, append, writes)
            if site.padded and paddings.setdefault(site.valid, padding) is not padding:
                raise Refusal("its mask has another padding mask than that of the layers before")
            with result.rewrite(gm.graph, f"{site.stage} attention", layer):
                _replace(gm, node, site, append, padding)
            if site.spec or site.ticket is not None:
                selected.add(read)
        except Refusal as refusal:
            result.skipped.append(SkipRow(node.name, layer, str(refusal)))
    drop_unused(gm)
    return result


def _read_behind(node: fx.Node) -> fx.Node:
    """The `kv_read` whose two results are this attention's K and V."""
    if len(node.args) < 3:
        raise Refusal("query, key and value are not positional arguments")
    sources: list[fx.Node] = []
    for place, argument in enumerate(node.args[1:3]):
        if not (is_call(argument, "getitem") and is_op(argument.args[0], *READS)):
            raise Refusal("its K and V do not come from an AlisaCache")
        if argument.args[1] != place:
            raise Refusal("its K and V are swapped")
        sources.append(argument.all_input_nodes[0])
    if sources[0] is not sources[1]:
        raise Refusal("its K and V come from different layers of the cache")
    return sources[0]


def _appends(gm: fx.GraphModule, valid: fx.Node) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_op(n, *APPENDS) and n.args[_APPEND_VALID] is valid]


def _append_of(gm: fx.GraphModule, site: ReadSite) -> fx.Node:
    found = [n for n in _appends(gm, site.valid) if n.args[_APPEND_LAYER] == site.layer]
    if not found:
        raise Refusal("nothing appends to its layer of the cache")
    if len(found) > 1:
        raise Refusal("its layer of the cache is appended to more than once in a step")
    return found[0]


def _check(node: fx.Node, site: ReadSite, append: fx.Node, writes: Writes) -> fx.Node | None:
    """Everything that must hold for the rewrite; returns the padding mask to apply, if any."""
    query, key = example(node.args[0]), example(site.key)
    if query.dim() != 4 or query.shape[2] != key.shape[2]:
        raise Refusal("its query is not the new tokens' alone (cross attention)")
    if query.shape[0] != key.shape[0]:
        raise Refusal("its query has another batch size than its K and V")
    if attention_option(node, "dropout_p", 0.0) != 0.0:
        raise Refusal("it uses dropout (training mode)")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise Refusal("gradients are enabled; call it under torch.no_grad() or torch.inference_mode()")
    if _scale_of(node) is None:
        raise Refusal("its scale is computed in the graph")
    operands = [o for o in node.args[1:3] if isinstance(o, fx.Node)]
    if any(writes.between(value, append, node) for value in (*operands, site.key, site.value)):
        raise Refusal("its K or V is written to after it was stored")
    mask = attention_option(node, "attn_mask")
    is_causal = attention_option(node, "is_causal", False)
    if mask is None:
        if site.stage == "prefill" and is_causal is not True:
            raise Refusal("it is not causal (bidirectional attention over the prompt)")
        if site.stage == "decode" and is_causal is not False:
            raise Refusal("is_causal on a single query attends to the first position only")
        if site.stage == "extend":
            raise Refusal("it has no mask although new tokens follow a history")
        return None
    if is_causal is not False:
        raise Refusal("it combines a mask with is_causal")
    if not isinstance(mask, fx.Node):
        raise Refusal("its mask is not a tensor of the graph")
    if example(mask).dim() != 4:
        raise Refusal(f"its mask has {example(mask).dim()} dimensions instead of 4")
    if example(mask).shape[1] != 1:
        raise Refusal("its mask differs between heads")
    proved = prove_causal(mask)
    _check_sizes(mask, proved, query, example(node.args[1]))
    _check_offset(proved, site)
    return proved.padding if site.padded else None


def _scale_of(node: fx.Node) -> float | None:
    """The softmax scale as a number; None where the graph computes it.

    A model's own scale that Dynamo made an unknown, because another model had another one, becomes a guard.
    """
    scale = node.kwargs.get("scale")
    if scale is None:
        return 1 / math.sqrt(int(example(node.args[0]).shape[3]))
    value = example(scale) if isinstance(scale, fx.Node) else scale
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None


def _check_sizes(mask: fx.Node, proved: CausalMask, query: torch.Tensor, key: torch.Tensor) -> None:
    """A mask whose only row or column is broadcast over all queries or keys is another mask than was proved."""
    queries, keys = (symbolic_expression(size) for size in example(mask).shape[2:])
    if (queries, keys) != (symbolic_expression(query.shape[2]), symbolic_expression(key.shape[2])):
        raise Refusal("its mask repeats one position along a dimension")
    if proved.padding is None:
        return
    # Where a size is an unknown, asking makes the answer a guard of the graph: after a second batch size Dynamo lets
    # those of the inputs vary, each by itself.
    if any(bool(size != query.shape[0]) for size in (example(mask).shape[0], example(proved.padding).shape[0])):
        raise Refusal("its padding mask is for another batch size")


def _check_offset(proved: CausalMask, site: ReadSite) -> None:
    """The first query must stand right after the history: at 0 in a prefill, else at the layer's length.

    All layers of a store have one length between steps, so an offset may come from any of them.
    """
    if proved.constant != 0:
        raise Refusal(f"its mask is causal with a shift of {proved.constant}")
    if not proved.offset:
        if site.stage == "prefill":
            return
        raise Refusal("its mask does not count the history")
    if len(proved.offset) != 1 or proved.offset[0].args[0] is not site.length:
        raise Refusal("its mask counts positions from something else than the cache's length")


def _replace(gm: fx.GraphModule, node: fx.Node, site: ReadSite, append: fx.Node, padding: fx.Node | None) -> None:
    if padding is not None and not any(a.args[_APPEND_MASK] for a in _appends(gm, site.valid)):
        append.update_arg(_APPEND_MASK, padding)
    if site.ticket is not None:
        with gm.graph.inserting_before(append):
            insert_call(gm.graph, ops.kv_wait.default, (site.pool, site.ticket, site.key, site.layer), node)
    with gm.graph.inserting_before(node):
        out = _emit(gm.graph, node, site, padding)
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)


def _emit(graph: fx.Graph, node: fx.Node, site: ReadSite, padding: fx.Node | None) -> fx.Node:
    query = node.args[0]
    assert isinstance(query, fx.Node)
    scale = _scale_of(node)
    valid = site.valid if site.padded else None
    groups = example(site.table).shape[2]

    def call(op: Any, *args: Any) -> fx.Node:
        return insert_call(graph, op, args, node)

    stored = (
        query, site.pool, site.scales, site.table, site.length, valid, site.rows, site.counts, site.layer,
    )  # fmt: skip
    tiered = site.ticket is not None
    ticket = (site.ticket,) if tiered else ()
    cap = (node.kwargs["soft_cap"],) if is_op(node, ops.capped_attention.default) else ()
    if site.stage == "decode":
        decode = ops.swa_attention.tiered if tiered else ops.swa_attention.default
        decode = ops.swa_attention.recomputing if site.hidden_size else decode
        both = call(decode, *stored, scale, *ticket, *cap)
    elif site.stage == "prefill":
        block = (query, site.key, site.value, padding, groups, site.spec)
        both = call(ops.prefill_attention.default, *block, scale, *cap)
    else:
        extend = ops.extend_attention.tiered if tiered else ops.extend_attention.default
        both = call(extend, *stored, site.spec, scale, *ticket, *cap)
    out = call(_getitem, both, 0)
    if site.spec:
        mass = call(_getitem, both, 1)
        state = (site.scores, site.rows, site.counts, mass, site.length, site.origin, valid)
        if site.stage == "decode":
            call(ops.kv_select.default, *state, site.layer, site.spec)
        else:
            new_tokens = example(query).shape[2]
            if isinstance(new_tokens, torch.SymInt):
                new_tokens = call(torch.ops.aten.sym_size.int, query, 2)
            call(ops.kv_seed.default, *state, new_tokens, site.layer, site.spec)
    if tiered:
        rows = (site.pool, site.scales, site.table, site.length)
        offload = ops.kv_offload.recomputing if site.hidden_size else ops.kv_offload.default
        call(offload, *rows, site.ticket, site.layer, site.spec)
        call(ops.kv_prefetch.default, *rows, site.rows, site.counts, site.ticket, site.layer)
        if site.hidden_size:
            call(ops.kv_recompute.default, site.pool, site.scales, site.ticket, site.layer)
    return out
