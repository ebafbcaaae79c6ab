"""Prove that an attention mask is causal plus padding, by evaluating its graph over index expressions.

Each node of a mask's subgraph gets a symbolic value: an index along one of its dimensions plus scalar offsets, a 2-D
padding mask, or a conjunction of conditions, which may be written as numbers to add to the scores. An operation that is
not listed here ends the proof with a reason; nothing is guessed from names or from example values.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..compat import BUILTIN_PAD, symbolic_expression
from .base import Refusal, Writes, example, target_name

PREPARED_OUTSIDE = "its mask was prepared outside the graph (a 4-D input), so nothing can be proved about it"

Size = Any  # an int, or the sympy expression of a symbolic size


@dataclasses.dataclass(frozen=True)
class Index:
    """An integer tensor: the element's position along dimension `axis` (counted from the right) plus offsets.

    size: positions counted. A dimension of size 1 may be broadcast later, and then no longer counts anything, so every
    size is compared with the finished mask's.
    """

    axis: int
    size: Size
    constant: int = 0
    scalars: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A 0-d integer tensor read from the graph, such as a layer's length."""

    node: fx.Node


@dataclasses.dataclass(frozen=True)
class Padding:
    """A `[B, T]` mask of real tokens, given to the graph; positions past T are False."""

    source: fx.Node


@dataclasses.dataclass(frozen=True)
class PaddingAt:
    """`Padding` looked up at (sequence, key position): `[B, 1, 1, K]`."""

    source: fx.Node
    sequences: Size
    keys: Size


@dataclasses.dataclass(frozen=True)
class Causal:
    """key position <= query position, the query standing `constant` + `scalars` after its row index."""

    constant: int
    scalars: tuple[fx.Node, ...]
    queries: Size
    keys: Size


Condition = Causal | PaddingAt


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A tensor of zeros."""


@dataclasses.dataclass(frozen=True)
class Additive:
    """0 where the conditions hold, elsewhere a number so low that nothing is left of the weight."""

    conditions: frozenset[Condition]


Value = Index | Scalar | Padding | Zeros | Additive | frozenset[Condition] | int


@dataclasses.dataclass(frozen=True)
class CausalMask:
    """The result of a proof: attention to all key positions up to `offset` + row, minus padding.

    The values of `offset` and `padding` are those at the start of the graph.
    """

    offset: tuple[fx.Node, ...]
    constant: int
    padding: fx.Node | None


def prove_causal(mask: fx.Node) -> CausalMask:
    """The structure of a `[B, 1, Q, K]` mask; raises `Refusal` with the reason if it is not causal plus padding.

    The mask is boolean (True = attend), or is added to the scores as `eager_mask` of transformers is.
    """
    known: dict[fx.Node, Value] = {}
    conditions = _evaluate(mask, known)
    if isinstance(conditions, Additive):
        conditions = conditions.conditions
    elif not isinstance(conditions, frozenset) or example(mask).dtype != torch.bool:
        raise Refusal(f"its mask '{mask.name}' is not boolean")
    causal = [c for c in conditions if isinstance(c, Causal)]
    padding = [c for c in conditions if isinstance(c, PaddingAt)]
    if len(causal) != 1 or len(padding) > 1:
        raise Refusal(f"its mask '{mask.name}' is not causal plus padding (found {_describe(conditions)})")
    shape = [symbolic_expression(size) for size in example(mask).shape]
    counted = [(causal[0].queries, -2), (causal[0].keys, -1)]
    counted += [pair for c in padding for pair in ((c.sequences, -4), (c.keys, -1))]
    if len(shape) != 4 or any(shape[axis] != size for size, axis in counted):
        raise Refusal("its mask repeats one position along a dimension")
    source = padding[0].source if padding else None
    _refuse_writes(mask, known, source)
    return CausalMask(causal[0].scalars, causal[0].constant, source)


def _refuse_writes(mask: fx.Node, known: dict[fx.Node, Value], padding: fx.Node | None) -> None:
    """The evaluation above takes every value to be what it was when it was made; in-place writes would break that."""
    writes = Writes(mask.graph)
    for node in known:
        for read in node.all_input_nodes:
            if writes.between(read, None, node):
                raise Refusal(f"its mask reads '{read.name}' after the graph has written to it")
    for node in (mask, *([] if padding is None else [padding])):
        if writes.between(node, None, None):
            raise Refusal(f"the graph writes to '{node.name}', which its mask is made of")


def _evaluate(node: Any, known: dict[fx.Node, Value]) -> Value:
    if isinstance(node, (int, torch.SymInt)):
        return int(node) if isinstance(node, int) else _unknown_size()
    if not isinstance(node, fx.Node):
        raise Refusal(f"its mask uses the constant {node!r}")
    if node not in known:
        known[node] = _apply(node, known)
    return known[node]


def _unknown_size() -> int:
    raise Refusal("its mask adds a symbolic size to a position")


def _apply(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    if node.op == "placeholder":
        return _input(node)
    rule = None
    if node.op in ("call_function", "call_method"):
        rule = (_FUNCTIONS if node.op == "call_function" else _METHODS).get(node.target)
    if rule is None:
        raise Refusal(f"its mask uses '{target_name(node)}', which is not part of a causal or padding mask")
    known_call = rule.fewest <= len(node.args) <= rule.most and node.kwargs.keys() <= rule.keywords
    if not known_call or not isinstance(example(node), torch.Tensor):
        raise Refusal(f"its mask calls '{target_name(node)}' with arguments that are not understood")
    return rule.handler(node, known)


def _input(node: fx.Node) -> Value:
    value = example(node)
    if isinstance(value, torch.Tensor) and value.dim() == 2:
        return Padding(node)
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        raise Refusal(PREPARED_OUTSIDE)
    raise Refusal(f"its mask depends on the input '{node.name}'")


def _counts(dtype: torch.dtype) -> bool:
    """Whether positions keep their values in this dtype."""
    return dtype in (torch.int32, torch.int64)


def _arange(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    if not _counts(example(node).dtype):
        raise Refusal(f"its mask counts positions in {example(node).dtype}")
    return Index(-1, symbolic_expression(example(node).shape[0]))


def _same(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """expand, contiguous, clone: the values stay where they are, counted from the right."""
    value = _evaluate(node.args[0], known)
    if isinstance(value, Padding) and target_name(node) == "expand":
        raise Refusal("its mask repeats the padding mask")
    return value


def _cast(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    value = _evaluate(node.args[0], known)
    before, after = example(node.args[0]).dtype, example(node).dtype
    if isinstance(value, (Index, Scalar)) and not _counts(after):
        raise Refusal(f"its mask converts positions to {after}")
    if isinstance(value, frozenset) and after != torch.bool:
        raise Refusal(f"its mask is made of numbers ({after}) that are not known to hide anything")
    if isinstance(value, (Additive, Zeros)) and after != before:
        raise Refusal(f"its mask is converted to {after}, where its lowest number may not be the lowest")
    if isinstance(value, Padding) and after not in (torch.bool, before):
        raise Refusal(f"its mask converts the padding mask to {after}")
    return value


def _add(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    left, right = (_evaluate(arg, known) for arg in node.args)
    if not isinstance(left, Index):
        left, right = right, left
    if not isinstance(left, Index) or not isinstance(right, (Scalar, int)):
        raise Refusal("its mask adds something else than an offset to positions")
    if isinstance(right, int):
        return dataclasses.replace(left, constant=left.constant + right)
    return dataclasses.replace(left, scalars=(*left.scalars, right.node))


def _compare(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    left, right = (_evaluate(arg, known) for arg in node.args)
    if target_name(node) in ("ge", "gt"):
        left, right = right, left
    strict = target_name(node) in ("lt", "gt")
    if not (isinstance(left, Index) and isinstance(right, Index) and (left.axis, right.axis) == (-1, -2)):
        raise Refusal("its mask compares something else than key positions with query positions")
    if left.scalars or left.constant:
        raise Refusal("its mask shifts the key positions")
    return frozenset({Causal(right.constant - int(strict), right.scalars, right.size, left.size)})


def _and(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    left, right = (_evaluate(arg, known) for arg in node.args)
    if not (isinstance(left, frozenset) and isinstance(right, frozenset)):
        raise Refusal("its mask combines something else than conditions")
    if any(example(arg).dtype != torch.bool for arg in node.args):
        raise Refusal("its mask combines the bits of numbers, not conditions")
    return left | right


def _all_true(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    if example(node).dtype != torch.bool:
        raise Refusal(f"its mask starts from ones of {example(node).dtype}")
    return frozenset()


def _zeros(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    return Zeros()


def _number(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """`torch.tensor(0.0)`, as transformers 5.17 writes the 0 of `_where`."""
    if node.args[0] != 0:
        raise Refusal(f"its mask uses the constant {node.args[0]!r}")
    return Zeros()


def _where(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """`where(condition, 0, lowest)`: the condition in the form that is added to the scores."""
    condition, zero, lowest = node.args
    value, dtype = _evaluate(condition, known), example(node).dtype
    if not isinstance(value, frozenset) or example(condition).dtype != torch.bool:
        raise Refusal("its mask chooses numbers by something else than a condition")
    zero_there = zero == 0 if isinstance(zero, (int, float)) else isinstance(_evaluate(zero, known), Zeros)
    if not (zero_there and isinstance(lowest, (int, float)) and dtype.is_floating_point):
        raise Refusal("its mask is not 0 where it lets attend and a plain number elsewhere")
    if lowest > torch.finfo(dtype).min:
        raise Refusal(f"its mask only adds {lowest} to what it hides")
    return Additive(value)


def _pad(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    value = _evaluate(node.args[0], known)
    widths = node.args[1]
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    fill = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    at_the_end = isinstance(widths, (tuple, list)) and len(widths) == 2 and widths[0] == 0
    if not (isinstance(value, Padding) and at_the_end and mode == "constant" and not fill):
        raise Refusal("its mask pads something else than the end of the padding mask with False")
    return value


def _getitem(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    source, key = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and source.op == "placeholder" and type(key) is int:
        value = example(source)
        if isinstance(value, torch.Tensor) and value.dim() == 1 and _counts(value.dtype):
            return Scalar(node)
        raise Refusal(f"its mask reads an element of '{source.name}'")
    value = _evaluate(source, known)
    if isinstance(value, Index):
        return _reshape_index(value, key, example(source).dim())
    if isinstance(value, Padding):
        return _look_up(value, source, key, known)
    raise Refusal("its mask slices a condition")


def _reshape_index(value: Index, key: Any, dims: int) -> Index:
    """Indexing with `None` and full slices moves the counted dimension."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(k is not None and k != slice(None) for k in keys) or sum(k is not None for k in keys) != dims:
        raise Refusal("its mask takes part of the positions")
    wanted = dims + value.axis  # from the left, among the source's dimensions
    place = [i for i, k in enumerate(keys) if k is not None][wanted]
    return dataclasses.replace(value, axis=place - len(keys))


def _look_up(value: Padding, source: Any, key: Any, known: dict[fx.Node, Value]) -> Value:
    """`mask[batch_index, key_index]`, and the same with the mask's own dimensions unsqueezed."""
    if not (isinstance(key, tuple) and len(key) == 2):
        keys = key if isinstance(key, tuple) else (key,)
        if keys == (slice(None), None, None, slice(None)):
            sequences, positions = (symbolic_expression(size) for size in example(source).shape)
            return frozenset({PaddingAt(value.source, sequences, positions)})
        raise Refusal("its mask indexes the padding mask in an unknown way")
    batch, position = (_evaluate(part, known) for part in key)
    if not (_is_plain(batch, -4) and _is_plain(position, -1)):
        raise Refusal("its mask looks up padding at other positions than the keys'")
    assert isinstance(batch, Index) and isinstance(position, Index)
    return frozenset({PaddingAt(value.source, batch.size, position.size)})


def _is_plain(value: Value, axis: int) -> bool:
    return isinstance(value, Index) and (value.axis, value.constant, value.scalars) == (axis, 0, ())


def _describe(conditions: frozenset[Condition]) -> str:
    names = sorted("causal" if isinstance(c, Causal) else "padding" for c in conditions)
    return " and ".join(names) or "no condition"


def _view(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """A view of the padding mask in its own shape (GPT-2 flattens a mask that may have had more dimensions)."""
    value = _evaluate(node.args[0], known)
    before, after = ([symbolic_expression(size) for size in example(n).shape] for n in (node.args[0], node))
    if not isinstance(value, Padding) or before != after:
        raise Refusal("its mask is reshaped")
    return value


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How to evaluate a call, and the calls it understands: any other argument may change the meaning."""

    handler: Callable[[fx.Node, dict[fx.Node, Value]], Value]
    fewest: int = 1
    most: int = 1
    keywords: frozenset[str] = frozenset()


_ANY = 99
_FACTORY = frozenset({"dtype", "device", "layout", "pin_memory", "requires_grad"})
_LAYOUT = frozenset({"memory_format"})
_COMPARE, _BOTH, _SUM = _Rule(_compare, 2, 2), _Rule(_and, 2, 2), _Rule(_add, 2, 2)
_FUNCTIONS: dict[Any, _Rule] = {
    torch.arange: _Rule(_arange, keywords=_FACTORY),
    torch.clone: _Rule(_same, keywords=_LAYOUT),
    torch.zeros: _Rule(_zeros, 1, _ANY, _FACTORY),
    torch.tensor: _Rule(_number, keywords=_FACTORY),
    torch.where: _Rule(_where, 3, 3),
    torch.nn.functional.pad: _Rule(_pad, 2, 4, frozenset({"mode", "value"})),
    BUILTIN_PAD: _Rule(_pad, 2, 4, frozenset({"mode", "value"})),
    operator.getitem: _Rule(_getitem, 2, 2),
    operator.add: _SUM,
    torch.add: _SUM,
    operator.and_: _BOTH,
    torch.logical_and: _BOTH,
    torch.bitwise_and: _BOTH,
    **{getattr(module, name): _COMPARE for module in (operator, torch) for name in ("le", "lt", "ge", "gt")},
}
_METHODS: dict[Any, _Rule] = {
    "to": _Rule(_cast, 1, _ANY, frozenset({"dtype", "device", "non_blocking", "copy"}) | _LAYOUT),
    "bool": _Rule(_cast, keywords=_LAYOUT),
    "expand": _Rule(_same, 1, _ANY),
    "view": _Rule(_view, 2, _ANY),
    "reshape": _Rule(_view, 2, _ANY),
    "contiguous": _Rule(_same, keywords=_LAYOUT),
    "clone": _Rule(_same, keywords=_LAYOUT),
    "add": _SUM,
    "logical_and": _BOTH,
    "new_ones": _Rule(_all_true, 1, _ANY, _FACTORY | {"size"}),
    **dict.fromkeys(("le", "lt", "ge", "gt"), _COMPARE),
}
