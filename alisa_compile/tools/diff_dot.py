"""A diff for Graphviz: the changed nodes and their neighbours, by layer of the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .diff_text import short
from .graph_diff import GraphDiff, by_name


def dot(graph: GraphDiff) -> str:
    """As `GraphDiff.to_dot`."""
    return "".join(_lines(graph))


def _lines(graph: GraphDiff) -> Iterator[str]:
    kinds = {change.node.name: change for change in graph.changes}
    nodes = {**by_name(graph.before), **by_name(graph.after)}
    edges = {
        (source, node.name) for stage in (graph.before, graph.after) for node in stage.nodes for source in node.inputs
    }
    shown_edges = sorted(edge for edge in edges if edge[0] in kinds or edge[1] in kinds)
    shown = dict.fromkeys([*kinds, *(name for edge in shown_edges for name in edge)])
    colors = {"removed": "#c62828", "added": "#2e7d32", "changed": "#b26a00"}
    yield f"digraph {_quoted(graph.title)} {{\n  rankdir=TB; node [shape=box, fontname=monospace, fontsize=10];\n"

    def layer(name: str) -> int:
        found = nodes[name].layer
        return -1 if found is None else found

    for number, names in itertools.groupby(sorted(shown, key=layer), layer):
        if number >= 0:
            yield f"  subgraph cluster_{number} {{ label={_quoted(f'layer {number}')};\n"
        for name in names:
            node = nodes[name]
            color = colors[kinds[name].kind] if name in kinds else "#9e9e9e"
            style = "dashed" if name in kinds and kinds[name].kind == "removed" else "solid"
            text = f"{node.label}\n{short(node.target) if node.op != 'placeholder' else 'input'} {node.value}"
            yield f"    {_quoted(name)} [label={_quoted(text)}, color={_quoted(color)}, style={style}];\n"
        if number >= 0:
            yield "  }\n"
    for source, target in shown_edges:
        yield f"  {_quoted(source)} -> {_quoted(target)};\n"
    yield "}\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
