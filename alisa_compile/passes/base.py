"""What a pass is, and small helpers to read Dynamo's graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import fx

from ..config import AlisaConfig
from ..runtime.report import SkipRow


@dataclasses.dataclass
class PassResult:
    """What a pass did to a graph."""

    name: str
    rewritten: int = 0
    skipped: list[SkipRow] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


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
    return (
        isinstance(node, fx.Node)
        and node.op in ("call_function", "call_method")
        and target_name(node) in names
    )


def is_op(node: object, *ops: Any) -> TypeGuard[fx.Node]:
    """Whether a node calls one of these operator overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in ops


def attention_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls of `F.scaled_dot_product_attention`, in graph order."""
    return [n for n in gm.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]


def kv_origins(node: fx.Node) -> list[fx.Node]:
    """What an attention's K and V are read from, looking through getitem."""
    operands = [argument for argument in node.args[1:3] if isinstance(argument, fx.Node)]
    return [operand.all_input_nodes[0] if is_call(operand, "getitem") else operand for operand in operands]


def insert_call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """Insert a call at the graph's insertion point, with a fake value and the origin of the node it stands for."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, example)
    fake_mode = _fake_mode(like)
    if fake_mode is not None:
        with fake_mode:
            node.meta["example_value"] = node.meta["val"] = target(*values)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def _fake_mode(node: fx.Node) -> Any:
    value = example(node)
    return getattr(value, "fake_mode", None)
