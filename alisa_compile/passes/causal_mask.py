"""Prove that an attention mask is causal plus padding, by evaluating its graph over index expressions.

Each node of a mask's subgraph gets a symbolic value: an index along one of its dimensions plus scalar offsets, a 2-D
padding mask, or a conjunction of conditions. An operation that is not listed here ends the proof with a reason; nothing
is guessed from names or from example values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from .base import Refusal, example, target_name


@dataclasses.dataclass(frozen=True)
class Index:
    """An integer tensor: the element's position along dimension `axis` (counted from the right) plus offsets."""

    axis: int
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


@dataclasses.dataclass(frozen=True)
class Causal:
    """key position <= query position, the query standing `constant` + `scalars` after its row index."""

    constant: int
    scalars: tuple[fx.Node, ...]


Condition = Causal | PaddingAt
Value = Index | Scalar | Padding | frozenset[Condition] | int


@dataclasses.dataclass(frozen=True)
class CausalMask:
    """The result of a proof: attention to all key positions up to `offset` + row, minus padding."""

    offset: tuple[fx.Node, ...]
    constant: int
    padding: fx.Node | None


def prove_causal(mask: fx.Node) -> CausalMask:
    """The structure of a `[B, 1, Q, K]` mask; raises `Refusal` with the reason if it is not causal plus padding."""
    conditions = _evaluate(mask, {})
    if not isinstance(conditions, frozenset):
        raise Refusal(f"its mask '{mask.name}' is not boolean")
    causal = [c for c in conditions if isinstance(c, Causal)]
    padding = [c for c in conditions if isinstance(c, PaddingAt)]
    if len(causal) != 1 or len(padding) > 1:
        raise Refusal(f"its mask '{mask.name}' is not causal plus padding (found {_describe(conditions)})")
    return CausalMask(causal[0].scalars, causal[0].constant, padding[0].source if padding else None)


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
    name = target_name(node)
    handler = _HANDLERS.get(name)
    if handler is None or node.op not in ("call_function", "call_method"):
        raise Refusal(f"its mask uses '{name}', which is not part of a causal or padding mask")
    return handler(node, known)


def _input(node: fx.Node) -> Value:
    value = example(node)
    if isinstance(value, torch.Tensor) and value.dim() == 2:
        return Padding(node)
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        raise Refusal(
            "its mask was prepared outside the graph (a 4-D input), so nothing can be proved about it"
        )
    raise Refusal(f"its mask depends on the input '{node.name}'")


def _arange(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    ends = [a for a in node.args if a is not None]
    if len(ends) != 1 or node.kwargs.get("start", 0) != 0 or node.kwargs.get("step", 1) != 1:
        raise Refusal("its mask counts positions from elsewhere than 0")
    return Index(axis=-1)


def _same(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """to, expand, contiguous, clone: the values stay where they are, counted from the right."""
    return _evaluate(node.args[0], known)


def _cast(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    value = _evaluate(node.args[0], known)
    result = example(node)
    if isinstance(value, (Index, Scalar)) and (result.dtype == torch.bool or result.dtype.is_floating_point):
        raise Refusal(f"its mask converts positions to {result.dtype}")
    if isinstance(value, frozenset) and result.dtype != torch.bool:
        raise Refusal(f"its mask is additive ({result.dtype}), not boolean")
    return value


def _add(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    left, right = (_evaluate(arg, known) for arg in node.args[:2])
    if not isinstance(left, Index):
        left, right = right, left
    if not isinstance(left, Index) or not isinstance(right, (Scalar, int)):
        raise Refusal("its mask adds something else than an offset to positions")
    if isinstance(right, int):
        return dataclasses.replace(left, constant=left.constant + right)
    return dataclasses.replace(left, scalars=(*left.scalars, right.node))


def _compare(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    left, right = (_evaluate(arg, known) for arg in node.args[:2])
    if target_name(node) in ("ge", "gt"):
        left, right = right, left
    strict = target_name(node) in ("lt", "gt")
    if not (isinstance(left, Index) and isinstance(right, Index) and (left.axis, right.axis) == (-1, -2)):
        raise Refusal("its mask compares something else than key positions with query positions")
    if left.scalars or left.constant:
        raise Refusal("its mask shifts the key positions")
    return frozenset({Causal(right.constant - int(strict), right.scalars)})


def _and(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    left, right = (_evaluate(arg, known) for arg in node.args[:2])
    if not (isinstance(left, frozenset) and isinstance(right, frozenset)):
        raise Refusal("its mask combines something else than conditions")
    return left | right


def _all_true(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    if example(node).dtype != torch.bool:
        raise Refusal(f"its mask starts from ones of {example(node).dtype}")
    return frozenset()


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
    if isinstance(source, fx.Node) and source.op == "placeholder" and isinstance(key, int):
        if example(source).dim() == 1 and not example(source).dtype.is_floating_point:
            return Scalar(node)
        raise Refusal(f"its mask reads an element of '{source.name}'")
    value = _evaluate(source, known)
    if isinstance(value, Index):
        return _reshape_index(value, key, example(source).dim())
    if isinstance(value, Padding):
        return _look_up(value, key, known)
    raise Refusal("its mask slices a condition")


def _reshape_index(value: Index, key: Any, dims: int) -> Index:
    """Indexing with `None` and full slices moves the counted dimension."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(k is not None and k != slice(None) for k in keys) or sum(k is not None for k in keys) != dims:
        raise Refusal("its mask takes part of the positions")
    wanted = dims + value.axis  # from the left, among the source's dimensions
    place = [i for i, k in enumerate(keys) if k is not None][wanted]
    return dataclasses.replace(value, axis=place - len(keys))


def _look_up(value: Padding, key: Any, known: dict[fx.Node, Value]) -> Value:
    """`mask[batch_index, key_index]`, and the same with the mask's own dimensions unsqueezed."""
    if not (isinstance(key, tuple) and len(key) == 2):
        keys = key if isinstance(key, tuple) else (key,)
        if keys == (slice(None), None, None, slice(None)):
            return frozenset({PaddingAt(value.source)})
        raise Refusal("its mask indexes the padding mask in an unknown way")
    batch, position = (_evaluate(part, known) for part in key)
    if batch != Index(axis=-4) or position != Index(axis=-1):
        raise Refusal("its mask looks up padding at other positions than the keys'")
    return frozenset({PaddingAt(value.source)})


def _describe(conditions: frozenset[Condition]) -> str:
    names = sorted("causal" if isinstance(c, Causal) else "padding" for c in conditions)
    return " and ".join(names) or "no condition"


_HANDLERS = {
    "arange": _arange,
    "to": _cast,
    "bool": _cast,
    "expand": _same,
    "contiguous": _same,
    "clone": _same,
    "add": _add,
    "le": _compare,
    "lt": _compare,
    "ge": _compare,
    "gt": _compare,
    "and_": _and,
    "logical_and": _and,
    "new_ones": _all_true,
    "pad": _pad,
    "getitem": _getitem,
}
