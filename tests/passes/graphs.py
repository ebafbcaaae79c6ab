"""Graphs for the tests of the passes: captured by Dynamo from real models, or built by hand."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from alisa_compile import backend as alisa_backend
from alisa_compile import compat
from alisa_compile.passes.base import attention_nodes, attention_option, example, is_op
from alisa_compile.passes.pipeline import PipelineResult
from alisa_compile.passes.rewrite_attention import site_of

ops = torch.ops.alisa


@dataclasses.dataclass(frozen=True)
class Capture:
    """One graph that reached the backend: as Dynamo made it, as the passes left it, and what they report."""

    before: fx.GraphModule
    after: fx.GraphModule
    outcome: PipelineResult

    @property
    def masks(self) -> list[fx.Node]:
        """The masks of the attention calls before any rewrite, each once."""
        masks = (attention_option(node, "attn_mask") for node in attention_nodes(self.before))
        return list(dict.fromkeys(mask for mask in masks if mask is not None))

    def calls(self, *targets: Any) -> list[fx.Node]:
        """Calls of these ops after the passes."""
        return [node for node in self.after.graph.nodes if is_op(node, *targets)]

    @property
    def stage(self) -> str:
        """prefill, decode or extend, as the cache marked it."""
        return next(site_of(node).stage for node in self.before.graph.nodes if is_op(node, ops.kv_read.default))


@contextlib.contextmanager
def captures() -> Iterator[list[Capture]]:
    """The graphs that go through the pipeline inside the block."""
    found: list[Capture] = []
    original = alisa_backend.run_pipeline

    def recording(gm: fx.GraphModule, config: Any) -> PipelineResult:
        before = compat.copy_graph(gm)
        outcome = original(gm, config)
        found.append(Capture(before, compat.copy_graph(gm), outcome))
        return outcome

    alisa_backend.run_pipeline = recording
    try:
        yield found
    finally:
        alisa_backend.run_pipeline = original


def dynamo_graph(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """What Dynamo makes of a function, with every size of its inputs symbolic."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(compat.copy_graph(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=True)(*inputs)
    (graph,) = graphs
    return graph


def returned(gm: fx.GraphModule) -> fx.Node:
    """The first value that a graph returns."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return output.args[0][0]


def mask_of(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> fx.Node:
    """The node of the mask that a function builds."""
    return returned(dynamo_graph(function, *inputs))


def hint(size: Any) -> int:
    """The size that a symbolic one had while tracing."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def evaluated(node: fx.Node, inputs: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """Run the part of a graph that `node` depends on; `inputs` are the tensors among its placeholders."""
    graph, copies = fx.Graph(), {}
    arguments: list[Any] = []
    for source in _ancestors(node):
        copies[source] = graph.node_copy(source, lambda n: copies[n])
        if source.op == "placeholder":
            arguments.append(inputs[source] if source in inputs else hint(example(source)))
    graph.output(copies[node])
    return fx.GraphModule({}, graph)(*arguments)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor placeholders that a node depends on."""
    inputs = (source for source in _ancestors(node) if source.op == "placeholder")
    return [source for source in inputs if isinstance(example(source), torch.Tensor)]


def _ancestors(node: fx.Node) -> list[fx.Node]:
    wanted = {node}
    for candidate in reversed(list(node.graph.nodes)):
        if candidate in wanted:
            wanted.update(candidate.all_input_nodes)
    return [candidate for candidate in node.graph.nodes if candidate in wanted]
