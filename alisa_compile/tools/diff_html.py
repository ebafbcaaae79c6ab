"""`alisa diff --html`: the diff as one page that needs nothing else. The page itself is `diff.html`, beside this."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..passes.record import NodeRecord
from .graph_diff import MOVEMENT, GraphDiff

_TEMPLATE = Path(__file__).with_name("diff.html")


def page(diffs: Sequence[GraphDiff], title: str = "") -> str:
    """One HTML file with these diffs to choose from."""
    data = json.dumps([_graph(diff) for diff in diffs], separators=(",", ":"))
    shown = " - ".join(part for part in ("alisa diff", title) if part)
    filled = _TEMPLATE.read_text(encoding="utf-8").replace("@TITLE@", html.escape(shown))
    # Inside a script element only "<" could end it.
    return filled.replace("@DATA@", data.replace("<", "\\u003c"))


def _graph(diff: GraphDiff) -> dict[str, Any]:
    skipped = {row.node: row for each in diff.passes for row in reversed(each.skipped)}
    passes = []
    for each in diff.passes:
        # What a pass changed may be gone after a later one, so each has states of its own.
        alone = dataclasses.replace(diff, before=each.before, after=each.after, passes=(each,))
        sections = _sections(alone, changed_only=True)
        changes = sum(len(section["rows"]) for section in sections)
        passes.append({"name": each.name, "off": each.off, "changes": changes, "sections": sections})
    return {
        "title": diff.title,
        "counts": diff.counts,
        "passes": passes,
        "skipped": [{"node": row.node, "layer": row.layer, "reason": row.reason} for row in skipped.values()],
        "sections": _sections(diff),
    }


def _sections(diff: GraphDiff, *, changed_only: bool = False) -> list[dict[str, Any]]:
    """The nodes side by side, by layer of the model."""
    changes = {change.node.name: change for change in diff.changes}
    sections: dict[str, list[dict[str, Any]]] = {}
    for before, after in diff.aligned():
        node = after or before
        assert node is not None
        change = changes.get(node.name)
        if diff.layer not in (None, node.layer) or (changed_only and change is None):
            continue
        row = {
            "kind": "" if change is None else change.kind,
            "pass": "" if change is None else change.pass_name,
            "moves": after is not None and after.target.rsplit(".", 1)[0] in MOVEMENT,
            "before": _side(before),
            "after": _side(after),
        }
        sections.setdefault(_section(node), []).append(row)
    return [{"name": name, "rows": rows} for name, rows in sections.items()]


def _section(node: NodeRecord) -> str:
    if node.op == "placeholder":
        return "inputs"
    return "outside the layers" if node.layer is None else f"layer {node.layer}"


def _side(node: NodeRecord | None) -> dict[str, Any] | None:
    if node is None:
        return None
    source = "" if node.source is None else f"{node.source.place}  {node.source.code}"
    return {
        "line": node.line,
        "value": node.value,
        "nbytes": node.nbytes,
        "module": node.module,
        "source": source,
    }
