"""What a pass is, and small helpers to read Dynamo's graphs."""

from __future__ import annotations

import dataclasses
import operator
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeGuard, TypeVar

import torch
from torch import fx

from .. import compat
from ..config import AlisaConfig
from ..runtime.report import SkipRow
from . import fuel, record


@dataclasses.dataclass
class PassResult:
    """What a pass did to a graph."""

    name: str
    rewritten: int = 0
    skipped: list[SkipRow] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    rewrites: list[record.Rewrite] = dataclasses.field(default_factory=list)  # none where nobody asks for records
    is_recorded: bool = dataclasses.field(default_factory=record.is_wanted)

    def rewrite(self, graph: fx.Graph, rule: str, layer: int | None) -> RewriteScope:
        """`with result.rewrite(...):` around the edits of one rewrite, which has been checked before.

        Raises `Refusal` when the fuel is used up. The graph must be whole again at the end of the block.
        """
        number = fuel.take()
        if number is None:
            raise Refusal(fuel.OUT_OF_FUEL)
        return RewriteScope(self, graph, number, rule, layer)


class RewriteScope:
    """Counts one rewrite, and records it if somebody asks for records."""

    def __init__(self, result: PassResult, graph: fx.Graph, number: int, rule: str, layer: int | None) -> None:
        self._result, self._number, self._rule, self._layer = result, number, rule, layer
        self._watch = record.Watch(graph) if result.is_recorded else None

    def __enter__(self) -> None:
        if self._watch is not None:
            self._source = record.rule_source(sys._getframe(1))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            return
        self._result.rewritten += 1
        if self._watch is not None:
            matched, replaced = self._watch.changes()
            rewrite = record.Rewrite(self._number, self._rule, self._layer, self._source, matched, replaced)
            self._result.rewrites.append(rewrite)


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """A named rewrite. Names must not contain each other: torch's off switch matches by substring."""

    name: str
    run: Callable[[fx.GraphModule, AlisaConfig], PassResult]


class Refusal(Exception):
    """A rewrite does not apply; the message is the reason in the skip list. Never leaves a pass."""


def example(node: Any) -> Any:
    """The fake value that Dynamo recorded for a node."""
    return node.meta.get("example_value", node.meta.get("val"))


def target_name(node: fx.Node) -> str:
    """The plain name of what a node calls: `le`, `expand`, `scaled_dot_product_attention`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_call(node: object, *names: str) -> TypeGuard[fx.Node]:
    """Whether a node calls a function or method of one of these names."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and target_name(node) in names


def is_op(node: object, *ops: Any) -> TypeGuard[fx.Node]:
    """Whether a node calls one of these operator overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in ops


def attention_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls of `F.scaled_dot_product_attention` and its soft-capped form, in graph order."""
    targets = (torch.nn.functional.scaled_dot_product_attention, torch.ops.alisa.capped_attention.default)
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets]


def kv_origins(node: fx.Node) -> list[fx.Node]:
    """What an attention's K and V are read from, looking through getitem."""
    operands = [argument for argument in node.args[1:3] if isinstance(argument, fx.Node)]
    return [operand.all_input_nodes[0] if is_call(operand, "getitem") else operand for operand in operands]


T = TypeVar("T")


def model_layer(node: fx.Node, otherwise: T) -> int | T:
    """The number of the model's layer that a node was traced in, by its module's name (`model.layers.3.self_attn`)."""
    for name, _ in reversed(list(node.meta.get("nn_module_stack", {}).values())):
        numbers = re.findall(r"\.(\d+)(?=\.|$)", name)
        if numbers:
            return int(numbers[0])
    return otherwise


_OPTIONAL_PLACES = {"attn_mask": 3, "dropout_p": 4, "is_causal": 5}


def attention_option(node: fx.Node, name: str, default: Any = None) -> Any:
    """An optional argument of an attention node, given by name or by position."""
    place = _OPTIONAL_PLACES.get(name, len(node.args))
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        "setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor"
    ).split()
)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The values that a call may write to; Dynamo's graphs are not functional. Names rather too many than too few."""
    if node.op not in ("call_function", "call_method"):
        return []
    schemas = compat.schemas_of(node.target)
    if schemas:
        places = {p for schema in schemas for p, a in enumerate(schema.arguments) if compat.is_written(a)}
        names = {a.name for schema in schemas for a in schema.arguments if compat.is_written(a)}
        given = [node.args[place] for place in places if place < len(node.args)]
        return _nodes_in([*given, *(node.kwargs[name] for name in names if name in node.kwargs)])
    if compat.is_higher_order(node.target):
        return list(node.all_input_nodes)
    name = target_name(node)
    module = getattr(node.target, "__module__", None)
    in_place = node.target in _IN_PLACE_OPERATORS or name.startswith("__i") or name == "__setitem__"
    in_place = in_place or (name.endswith("_") and not name.endswith("__") and module != "_operator")  # not and_, or_
    in_place = in_place or node.kwargs.get("inplace", False) is not False
    if module == "torch.nn.functional":
        in_place = in_place or any(argument is True for argument in node.args)  # F.relu(x, True)
    return _nodes_in([*(node.args[:1] if in_place else ()), node.kwargs.get("out")])


def _nodes_in(arguments: list[Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


class Writes:
    """Where a graph writes to memory, views included: two values share memory if their fake tensors share storage."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self._places: defaultdict[int, list[int]] = defaultdict(list)
        for node, place in self.order.items():
            for value in written_by(node):
                for memory in _memory_of(value):
                    self._places[memory].append(place)

    def between(self, value: fx.Node, start: fx.Node | None, end: fx.Node | None) -> bool:
        """Whether the memory of `value` is written to after `start` (None: from the beginning) and before `end`."""
        first = -1 if start is None else self.order[start]
        last = len(self.order) if end is None else self.order[end]
        return any(first < place < last for memory in _memory_of(value) for place in self._places[memory])


def _memory_of(node: fx.Node) -> Iterator[int]:
    value = example(node)
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(part, torch.Tensor):
            yield compat.storage_id(part)


def drop_unused(gm: fx.GraphModule) -> None:
    """Remove values without users. `eliminate_dead_code` alone would also remove statements such as `x.add_(1)`."""
    gm.graph.eliminate_dead_code(lambda node: node.is_impure() or bool(written_by(node)))
    gm.recompile()


def insert_call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call at the graph's insertion point, with a fake value and the origin of the node it stands for."""
    node = graph.call_function(target, args, kwargs)
    values, named = fx.map_arg((args, kwargs), example)
    fake_mode = _fake_mode(like)
    if fake_mode is not None:
        with fake_mode:
            node.meta["example_value"] = node.meta["val"] = target(*values, **named)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def _fake_mode(node: fx.Node) -> Any:
    value = example(node)
    return getattr(value, "fake_mode", None)
