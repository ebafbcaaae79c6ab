"""What became what between two states of a graph: `alisa_compile.diff`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

from torch import fx

from ..errors import AlisaError
from ..passes.record import GraphRecord, NodeRecord, PassRecord, Rewrite, Stage

#: Nodes that move rows between tiers.
MOVEMENT = ("alisa.kv_wait", "alisa.kv_offload", "alisa.kv_prefetch")
#: Columns of a text that fits any terminal that is wide enough for code.
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Change:
    """One node that is not as before. kind: `removed`, `added` or `changed`; pass_name: empty if not known."""

    kind: str
    before: NodeRecord | None
    after: NodeRecord | None
    pass_name: str = ""

    @property
    def node(self) -> NodeRecord:
        """The node as it is now, or as it was."""
        node = self.after or self.before
        assert node is not None
        return node


@dataclasses.dataclass(frozen=True)
class GraphDiff:
    """Two states of a graph, the passes between them if known, and how they differ.

    Print it, or take `.to_dict()`, `.to_html()` or `.to_dot()`. layer: only what belongs to this layer of the model.
    """

    title: str
    before: Stage
    after: Stage
    passes: tuple[PassRecord, ...] = ()
    layer: int | None = None

    @functools.cached_property
    def changes(self) -> tuple[Change, ...]:
        """Every node that differs, in the order of the graph."""
        by_pass = self._by_pass()
        changes = (
            dataclasses.replace(change, pass_name=by_pass.get(change.node.name, ""))
            for change in changes_between(self.before, self.after)
        )
        return tuple(change for change in changes if self.shows(change.node.layer))

    @property
    def rewrites(self) -> tuple[tuple[PassRecord, Rewrite], ...]:
        """Each rewrite with its pass."""
        return tuple((p, r) for p in self.passes for r in p.rewrites if self.shows(r.layer))

    def text(self, *, color: bool = False, width: int = WIDTH, whole_graph: bool | None = None) -> str:
        """Node by node, then the whole graph as a unified diff.

        width: of the node-by-node part, in columns. whole_graph: whether with the latter; default: unless a layer was
        asked for.
        """
        from .diff_text import text

        return text(
            self, color=color, width=width, whole_graph=self.layer is None if whole_graph is None else whole_graph
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the changes with both sides in full, the rewrites, the skip list."""
        return {
            "title": self.title,
            "layer": self.layer,
            "nodes_before": len(self.before.nodes),
            "nodes_after": len(self.after.nodes),
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "passes": [
                {"name": p.name, "off": p.off, "seconds": p.seconds, "rewritten": len(p.rewrites)} for p in self.passes
            ],
            "rewrites": [{"pass": p.name, **dataclasses.asdict(r)} for p, r in self.rewrites],
            "skipped": [dataclasses.asdict(row) for p in self.passes for row in p.skipped if self.shows(row.layer)],
        }

    def to_html(self) -> str:
        """One file that needs nothing else: side by side, by layer, with a filter for passes and a search."""
        from .diff_html import page

        return page([self])

    def to_dot(self) -> str:
        """The changed nodes and their neighbours, for Graphviz: removed ones red, added ones green."""
        from .diff_dot import dot

        return dot(self)

    def aligned(self) -> Iterator[tuple[NodeRecord | None, NodeRecord | None]]:
        """All nodes side by side, in order; None opposite a node that has no counterpart."""
        return _aligned(self.before.nodes, self.after.nodes)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        # In a frame of its own, for the styles of a notebook and of the page would meet.
        page = self.to_html().replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{page}" style="width:100%;height:600px;border:0"></iframe>'

    def shows(self, layer: int | None) -> bool:
        """Whether what belongs to this layer, or to none, is to be shown."""
        return self.layer is None or layer == self.layer

    def _by_pass(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for each in self.passes:
            if each.after is not each.before:
                found.update((change.node.name, each.name) for change in changes_between(each.before, each.after))
        return found

    @property
    def counts(self) -> str:
        """How many nodes and rewrites, in words."""
        dense = len({row.node for each in self.passes for row in each.skipped if self.shows(row.layer)})
        parts = [f"{len(self.before.nodes)} -> {len(self.after.nodes)} nodes"]
        if self.passes:
            parts += [f"{len(self.rewrites)} rewrites", f"{dense} left as they are"]
        return ", ".join(parts)


def diff(
    first: fx.GraphModule | Stage | GraphRecord,
    second: fx.GraphModule | Stage | None = None,
    *,
    pass_name: str | None = None,
    layer: int | None = None,
) -> GraphDiff:
    """As `alisa_compile.diff`.

    Names of two unrelated graphs are matched by where in the model a node comes from, so that one node more does not
    rename those behind it.
    """
    if isinstance(first, GraphRecord):
        if second is not None:
            raise AlisaError(
                "a GraphRecord has both sides already",
                got=f"it and a {type(second).__name__}",
                fix="pass it alone, or two of its stages: diff(record.before, record.passes[0].after)",
            )
        found = _of_record(first, pass_name)
    else:
        if pass_name is not None:
            raise AlisaError("pass_name needs a GraphRecord", got=type(first).__name__)
        before, after = _stage(first, "first"), _stage(second, "second")
        if not before.family or before.family != after.family:
            after = _renamed_like(before, after)
        found = GraphDiff(f"{before.title} -> {after.title}", before, after)
    if layer is None:
        return found
    layers = sorted({n.layer for stage in (found.before, found.after) for n in stage.nodes if n.layer is not None})
    if layer not in layers:
        shown = f"{layers[0]} to {layers[-1]}" if layers else "none: no node was traced in a numbered layer"
        raise AlisaError("there is no such layer in the graph", got=layer, expected=shown)
    return dataclasses.replace(found, layer=layer, title=f"{found.title}, layer {layer}")


def _of_record(record: GraphRecord, pass_name: str | None) -> GraphDiff:
    title = f"{record.stage} graph"
    if pass_name is None:
        return GraphDiff(title, record.before, record.after, record.passes)
    names = [each.name for each in record.passes]
    chosen = [each for each in record.passes if pass_name in (each.name, each.name.removeprefix("alisa_"))]
    if not chosen:
        near = difflib.get_close_matches(pass_name, names, n=1, cutoff=0.4)
        raise AlisaError(
            "there is no such pass",
            got=pass_name,
            expected=f"one of {', '.join(names)}",
            fix=f"did you mean {near[0]}?" if near else "",
        )
    return GraphDiff(f"{title}, {chosen[0].name}", chosen[0].before, chosen[0].after, tuple(chosen))


def _stage(graph: object, title: str) -> Stage:
    if isinstance(graph, Stage):
        return graph
    if isinstance(graph, fx.GraphModule):
        return Stage.of(graph, title)
    raise AlisaError(
        "this is no graph", got=type(graph).__name__, expected="a torch.fx.GraphModule, or a stage of a GraphRecord"
    )


def by_name(stage: Stage) -> dict[str, NodeRecord]:
    """The nodes of a stage."""
    return {node.name: node for node in stage.nodes}


def changes_between(before: Stage, after: Stage) -> Iterator[Change]:
    """Every node that differs between two stages of one family."""
    for was, now in _aligned(before.nodes, after.nodes):
        if was is None or now is None:
            yield Change("added" if was is None else "removed", was, now)
        elif was.line != now.line or was.value != now.value:
            yield Change("changed", was, now)


def _aligned(
    first: tuple[NodeRecord, ...], second: tuple[NodeRecord, ...]
) -> Iterator[tuple[NodeRecord | None, NodeRecord | None]]:
    """Pair nodes of one name; what was removed comes before what was added in its place."""
    later = {node.name: node for node in second}
    present = {node.name for node in first} & later.keys()
    waiting = iter(second)
    for node in first:
        if node.name not in present:
            yield node, None
            continue
        # Passes keep the order of the nodes they leave; where it changed, a node shows at its old place.
        for other in waiting:
            if other.name not in present:
                yield None, other
            elif other.name == node.name:
                break
        yield node, later[node.name]
    yield from ((None, other) for other in waiting if other.name not in present)


def _renamed_like(first: Stage, second: Stage) -> Stage:
    """The second graph, with the names of the nodes of the first that they correspond to."""

    def keys(stage: Stage) -> list[tuple[str, str, str]]:
        return [
            (node.module, node.target if node.op != "placeholder" else node.label, node.value) for node in stage.nodes
        ]

    matcher = difflib.SequenceMatcher(None, keys(first), keys(second), autojunk=False)
    names = {
        second.nodes[match.b + i].name: first.nodes[match.a + i]
        for match in matcher.get_matching_blocks()
        for i in range(match.size)
    }
    taken = {node.name for node in first.nodes}
    renamed: dict[str, tuple[str, str]] = {}
    for node in second.nodes:
        if node.name in names:
            renamed[node.name] = (names[node.name].name, names[node.name].label)
        else:
            free = (f"{node.name}{mark}" for mark in itertools.chain([""], (f"_new{n}" for n in itertools.count(1))))
            name = next(name for name in free if name not in taken)
            taken.add(name)
            renamed[node.name] = (name, name if node.op != "placeholder" else node.label)
    labels = {node.label: renamed[node.name][1] for node in second.nodes}
    return Stage(second.title, tuple(_renamed(node, renamed, labels) for node in second.nodes))


def _renamed(node: NodeRecord, names: dict[str, tuple[str, str]], labels: dict[str, str]) -> NodeRecord:
    name, label = names[node.name]
    used = {labels_of: labels[labels_of] for labels_of in labels if labels_of in node.arguments}
    arguments = _replace_words(node.arguments, used)
    inputs = tuple(names[source][0] for source in node.inputs)
    return dataclasses.replace(node, name=name, label=label, arguments=arguments, inputs=inputs)


def _replace_words(text: str, replacements: dict[str, str]) -> str:
    if not replacements:
        return text
    words = "|".join(re.escape(word) for word in sorted(replacements, key=len, reverse=True))
    return re.sub(rf"(?<![\w.'])(?:{words})(?![\w'])", lambda match: replacements[match[0]], text)
