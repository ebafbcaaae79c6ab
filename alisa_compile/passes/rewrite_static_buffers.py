"""Sparse decode for plain modules that keep K and V in static buffers of their own.

Before: the module writes its new row into a `[B, Hkv, N, D]` buffer and calls `scaled_dot_product_attention` on the
whole buffer with a boolean mask. After: `alisa::buffer_attention` on the same buffer. This saves compute, not memory:
the buffer is the module's. Scores need a home that outlives the call, so they become extra inputs of the graph, which
the step wrapper supplies (`BufferSite`); AOTAutograd would reject buffers added to the module.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from .. import compat
from ..config import AlisaConfig
from ..kernels.swa_attention.reference import score_dtype
from ..runtime.policies import head_groups, selection_spec
from ..runtime.report import SkipRow
from .base import (
    PassResult,
    Refusal,
    attention_nodes,
    drop_unused,
    example,
    insert_call,
    is_call,
    is_op,
    kv_origins,
    model_layer,
)
from .rewrite_attention import READS

_WRITES = ("setitem", "index_copy_", "copy_", "index_put_", "scatter_", "slice_scatter")
_META = "alisa_buffer_sites"


@dataclasses.dataclass(frozen=True)
class BufferSite:
    """A K buffer whose scores the step wrapper keeps.

    buffer: argument index of K. scores_shape: `[B, G, R, N]`, or None in a graph that fills the buffer with a prompt,
    which makes scores of an earlier prompt void.
    """

    buffer: int
    scores_shape: tuple[int, ...] | None
    dtype: torch.dtype


def sites(gm: fx.GraphModule) -> list[BufferSite]:
    """The sites that `run` found, in the order of their extra inputs (scores, then observed, for each)."""
    found: list[BufferSite] = gm.meta.get(_META, [])
    return found


def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    """Rewrite what applies. Attention over an AlisaCache was rewritten or refused before."""
    result = PassResult("alisa_static_buffers")
    spec = selection_spec(config)
    found: list[BufferSite] = []
    for node in attention_nodes(gm):
        if any(is_op(source, *READS) for source in kv_origins(node)):
            continue
        try:
            if is_op(node, torch.ops.alisa.capped_attention.default):
                raise Refusal("its scores are soft-capped, which is not available over a static buffer")
            key, value = _buffers(node)
            if spec is None:
                raise Refusal("sparsity is 0, and its own dense attention is exact")
            if example(node.args[0]).shape[2] != 1:
                found.append(BufferSite(_argument_index(gm, key), None, score_dtype(example(key).dtype)))
                raise Refusal("it fills a static buffer with several tokens, which is dense at any sparsity")
            mask = _mask(node)
            with result.rewrite(gm.graph, "static buffer", model_layer(node, None)):
                found.append(_rewrite(gm, node, key, value, mask, config, len(found)))
        except Refusal as refusal:
            result.skipped.append(SkipRow(node.name, None, str(refusal)))
    gm.meta[_META] = found
    drop_unused(gm)
    return result


def _buffers(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """K and V as inputs of the graph that the graph itself writes to."""
    if len(node.args) < 3:
        raise Refusal("query, key and value are not positional arguments")
    found = []
    for name, operand in zip(("K", "V"), node.args[1:3], strict=True):
        if not isinstance(operand, fx.Node) or operand.op != "placeholder":
            raise Refusal(f"its {name} is neither an AlisaCache nor a static buffer")
        shape = example(operand).shape
        if len(shape) != 4 or not all(isinstance(size, int) for size in shape):
            raise Refusal(f"its {name} buffer is not of a fixed [B, H, N, D] shape")
        if not any(is_call(user, *_WRITES) and user.args[0] is operand for user in operand.users):
            raise Refusal(f"its {name} is an input that this graph does not write to")
        found.append(operand)
    return found[0], found[1]


def _mask(node: fx.Node) -> fx.Node | None:
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if node.kwargs.get("dropout_p", 0.0) != 0.0:
        raise Refusal("it uses dropout (training mode)")
    if torch.is_grad_enabled() and example(node).requires_grad:
        raise Refusal("gradients are enabled; call it under torch.no_grad() or torch.inference_mode()")
    if node.kwargs.get("is_causal", False):
        raise Refusal("is_causal on a single query attends to the first position only")
    if mask is None:
        return None
    value = example(mask)
    if value.dtype != torch.bool:
        raise Refusal(f"its mask is additive ({value.dtype}), so which positions it leaves out is not known")
    if value.dim() != 4 or value.shape[1] != 1 or value.shape[2] != 1:
        raise Refusal(f"its mask has shape {tuple(value.shape)}, not [B, 1, 1, N]")
    assert isinstance(mask, fx.Node)
    return mask


def _rewrite(
    gm: fx.GraphModule,
    node: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    config: AlisaConfig,
    index: int,
) -> BufferSite:
    spec = selection_spec(config)
    assert spec is not None
    query = node.args[0]
    batch_size, kv_heads, capacity, _ = example(key).shape
    dtype = score_dtype(example(key).dtype)
    shape = (batch_size, head_groups(config, kv_heads), spec.score_rows(capacity), capacity)
    scores = _add_input(gm, f"alisa_scores_{index}", example(key).new_empty(shape, dtype=dtype))
    observed = _add_input(gm, f"alisa_observed_{index}", example(key).new_empty((1,), dtype=torch.int64))
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(example(query).shape[3]) if scale is None else scale
    with gm.graph.inserting_before(node):
        out = insert_call(
            gm.graph,
            torch.ops.alisa.buffer_attention.default,
            (query, key, value, mask, scores, observed, index, spec.encode(), scale),
            node,
        )
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
    return BufferSite(_argument_index(gm, key), shape, dtype)


def _add_input(gm: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """A new input after all others."""
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node.meta["example_value"] = node.meta["val"] = value
    compat.name_input_source(node)
    return node


def _argument_index(gm: fx.GraphModule, node: fx.Node) -> int:
    return [n for n in gm.graph.nodes if n.op == "placeholder"].index(node)
