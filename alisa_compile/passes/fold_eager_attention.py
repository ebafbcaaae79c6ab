"""Fold attention that a model spells out into one `scaled_dot_product_attention`, for the passes that follow.

transformers writes eager attention as `matmul(q, k.transpose(-1, -2)) -> * scale -> + mask -> softmax -> dropout ->
matmul(., v)`, with casts between. Soft-capped scores, `/ cap -> tanh -> * cap` before the mask, make it one
`alisa::capped_attention`. Each step is checked; any other step keeps the attention as it is, with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..config import AlisaConfig
from ..runtime.report import SkipRow
from .base import (
    PassResult,
    Refusal,
    Writes,
    attention_nodes,
    drop_unused,
    example,
    insert_call,
    is_call,
    is_op,
    model_layer,
    target_name,
)
from .rewrite_attention import READS, site_of

NAME = "alisa_fold_eager_attention"

_PRODUCT = ("matmul", "bmm", "baddbmm")
_SCALE = ("mul", "imul", "multiply", "div", "truediv", "itruediv")
_ADD = ("add", "iadd")
_CAST = ("to", "type", "type_as", "float")
_SECOND_SUM = "more than a mask is added to its scores (a position bias?)"
_VIEW = ("getitem", "view", "reshape", "expand", "contiguous", "transpose", "permute", "unsqueeze", "flatten")


@dataclasses.dataclass
class _Match:
    """One attention: its operands, and the steps between its two products, from the last to the first."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    soft_cap: float  # 0 = none
    steps: list[fx.Node]


def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    """Fold every attention over an AlisaCache that can be proved equal; say why for each that cannot."""
    result = PassResult(NAME)
    writes = Writes(gm.graph)
    reached = {source for node in attention_nodes(gm) for source in _sources(node.args[1:3])}
    for node in list(gm.graph.nodes):
        weights = _weights(node)
        if weights is None:
            continue
        read = next(iter(_sources([*_upstream(node.args[0]), node.args[1]])), None)
        reached.update(() if read is None else (read,))
        try:
            match = _match(node, writes)
            if read is None:
                raise Refusal("its K and V do not come from an AlisaCache")
            with result.rewrite(gm.graph, "eager attention", model_layer(node, site_of(read).layer)):
                _replace(gm.graph, node, match)
        except Refusal as refusal:
            layer = None if read is None else model_layer(node, site_of(read).layer)
            result.skipped.append(SkipRow(node.name, layer, str(refusal)))
    for read in gm.graph.nodes:
        if is_op(read, *READS) and read.users and read not in reached:
            layer = model_layer(read, site_of(read).layer)
            result.skipped.append(SkipRow(read.name, layer, "what the model does with its K and V is not recognised"))
    drop_unused(gm)
    return result


def _weights(node: fx.Node) -> fx.Node | None:
    """The softmax whose result a product multiplies, looking through casts, dropout and views."""
    if not is_call(node, *_PRODUCT) or len(node.args) < 2:
        return None
    for source in _upstream(node.args[0]):
        if is_call(source, "softmax"):
            return source
        if not is_call(source, "dropout", *_CAST, *_VIEW):
            return None
    return None


def _upstream(node: Any) -> Iterator[fx.Node]:
    """A value and what its first operand is made of, step by step."""
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0] if node.args else None


def _sources(values: Any) -> Iterator[fx.Node]:
    """The `kv_read` calls that values are views of, or that scores are computed with."""
    for value in values:
        operands = [value]
        if is_call(value, *_PRODUCT):
            operands = [*value.args[1:], *value.kwargs.values()]
        for operand in operands:
            for node in _upstream(operand):
                if is_op(node, *READS):
                    yield node
                if not is_call(node, *_VIEW, *_CAST):
                    break


def _match(product: fx.Node, writes: Writes) -> _Match:
    """Read an attention backwards from its last product; raises `Refusal` at the first step that is not proved."""
    steps = _steps_after_softmax(product)
    softmax = steps[-1]
    _check_softmax(softmax)
    scores, mask, scale, cap = softmax.args[0], None, 1.0, 0.0
    while True:
        node = _only_used_by(scores, steps[-1])
        steps.append(node)
        if is_call(node, *_CAST):
            scores = _widened(node)
        elif is_call(node, *_SCALE):
            scores, factor = _scaled(node)
            scale *= factor
        elif is_call(node, *_ADD):
            if mask is not None:
                raise Refusal(_SECOND_SUM)
            if scale != 1.0 or cap:
                raise Refusal("its mask is scaled together with its scores")
            scores, mask = _masked(node)
        elif is_call(node, "tanh"):
            if cap:
                raise Refusal("its scores are soft-capped twice")
            scores, cap, scale = node.args[0], scale, 1.0
        elif is_call(node, "matmul"):
            break
        else:
            raise Refusal(_obstacle(product))
    query, key = _operands(node)
    value = product.args[1]
    assert isinstance(value, fx.Node)
    _check_shapes(product, query, key, value)
    for operand in (query, key, value, mask):
        if operand is not None and writes.between(operand, operand, product):
            raise Refusal(f"the graph writes to '{operand.name}', which it attends with")
    # cap * tanh(scale * scores): with the cap taken out of the scale, and positive, as tanh is odd.
    return _Match(query, key, value, mask, scale * cap if cap else scale, abs(cap), steps)


def _only_used_by(node: Any, user: fx.Node) -> fx.Node:
    if not isinstance(node, fx.Node):
        raise Refusal("its scores are not a tensor of the graph")
    if list(node.users) != [user]:
        raise Refusal("its scores or weights are used elsewhere too (output_attentions)")
    return node


def _steps_after_softmax(product: fx.Node) -> list[fx.Node]:
    """From the product back to the softmax: casts and a dropout that does nothing."""
    if not is_call(product, "matmul") or len(product.args) != 2 or product.kwargs:
        raise Refusal(_obstacle(product))
    steps: list[fx.Node] = []
    while not steps or not is_call(steps[-1], "softmax"):
        last = steps[-1] if steps else product
        node = _only_used_by(last.args[0], last)
        if is_call(node, "dropout"):
            if not _is_off(node):
                raise Refusal("it uses dropout (training mode)")
        elif not is_call(node, "softmax", *_CAST) or not example(node).dtype.is_floating_point:
            raise Refusal(_obstacle(product))
        steps.append(node)
    return steps


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def _is_off(dropout: fx.Node) -> bool:
    return _argument(dropout, 1, "p", 0.5) == 0.0 or _argument(dropout, 2, "training", True) is False


def _check_softmax(node: fx.Node) -> None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dim not in (-1, 3) or example(node).dim() != 4:
        raise Refusal("its softmax is not over the last of four dimensions")
    if torch.finfo(example(node).dtype).bits < torch.finfo(example(node.args[0]).dtype).bits:
        raise Refusal(f"its softmax is taken in {example(node).dtype}")


def _widened(node: fx.Node) -> Any:
    """What a cast was given, if the cast lost nothing."""
    source = node.args[0]
    before, after = example(source).dtype, example(node).dtype
    if not (before.is_floating_point and after.is_floating_point):
        raise Refusal(f"it converts {before} to {after}")
    if before != after and torch.promote_types(before, after) != after:
        raise Refusal(f"it rounds {before} to {after} on the way to its scores")
    return source


def _scaled(node: fx.Node) -> tuple[Any, float]:
    left, right = node.args
    divided = "div" in target_name(node)
    if isinstance(left, (int, float)) and not divided:
        left, right = right, left
    if not isinstance(right, (int, float)) or node.kwargs:
        raise Refusal("its scale is computed in the graph")
    if right == 0:
        raise Refusal("its scores are scaled by 0")
    return left, 1.0 / right if divided else float(right)


def _masked(node: fx.Node) -> tuple[Any, fx.Node]:
    """The scores and what is added to them."""
    left, right = node.args
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or node.kwargs:
        raise Refusal("something else than one mask is added to its scores")
    if example(left).shape != example(node).shape or any(is_call(n, "matmul") for n in _upstream(right)):
        left, right = right, left
    return left, right


def _operands(scores: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Query and key of `matmul(query, key.transpose(-1, -2))`, without the casts that both went through."""
    if len(scores.args) != 2 or scores.kwargs:
        raise Refusal("its scores are not one matrix product")
    query, transposed = scores.args
    if not isinstance(query, fx.Node) or not isinstance(transposed, fx.Node) or not _swaps_last(transposed):
        raise Refusal("its scores are not the product of queries and transposed keys")
    key = transposed.args[0]
    while is_call(key, *_CAST):
        key = _widened(key)
    assert isinstance(key, fx.Node)
    while is_call(query, *_CAST) and example(query).dtype != example(key).dtype:
        query = _widened(query)
    assert isinstance(query, fx.Node)
    return query, key


def _swaps_last(node: fx.Node) -> bool:
    if is_call(node, "transpose") and example(node.args[0]).dim() == 4:
        return {place % 4 for place in node.args[1:]} == {2, 3}  # type: ignore[operator]
    order = node.args[1] if len(node.args) == 2 else node.args[1:]
    return is_call(node, "permute") and tuple(order) == (0, 1, 3, 2)  # type: ignore[arg-type]


def _check_shapes(product: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node) -> None:
    shapes = [example(node).shape for node in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise Refusal("its query, K and V differ in batch size")
    heads = [shape[1] for shape in shapes]
    if heads[1] != heads[2] or heads[1] not in (1, heads[0]):
        raise Refusal("its query, K and V differ in their number of heads")
    dtypes = {example(node).dtype for node in (query, key, value, product)}
    if len(dtypes) != 1:
        raise Refusal(f"its query, K, V and output have several dtypes ({', '.join(sorted(map(str, dtypes)))})")


def _obstacle(product: fx.Node) -> str:
    """Why an attention is not the usual one: what stands between its softmax and its queries."""
    names = []
    for node in _upstream(product.args[0]):
        if is_call(node, "cat"):
            return "attention sinks: its scores have columns that are no keys"
        if is_call(node, "baddbmm"):
            return "a bias is added to the scores (ALiBi)"
        if is_call(node, *_PRODUCT) or node.op not in ("call_function", "call_method"):
            break
        names.append(target_name(node))
    if sum(name in _ADD for name in names) > 1:
        return _SECOND_SUM
    known = ("softmax", "dropout", "tanh", *_SCALE, *_ADD, *_CAST, *_VIEW)
    unknown = [name for name in names if name not in known]
    return f"its scores go through '{unknown[0]}'" if unknown else "its products are not understood"


def _replace(graph: fx.Graph, product: fx.Node, match: _Match) -> None:
    operands = (match.query, match.key, match.value)
    named = {"attn_mask": match.mask, "scale": match.scale}
    with graph.inserting_before(product):
        if match.soft_cap:
            capped = torch.ops.alisa.capped_attention.default
            node = insert_call(graph, capped, operands, product, **named, soft_cap=match.soft_cap)
        else:
            attention = torch.nn.functional.scaled_dot_product_attention
            node = insert_call(graph, attention, operands, product, **named, dropout_p=0.0)
    product.replace_all_uses_with(node)
    for step in (product, *match.steps):  # some write in place, to what only the next step uses
        graph.erase_node(step)
