"""The text of a diff: node by node, then the whole graph."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import sys
from typing import Any

from tabulate import tabulate

from ..passes.record import NodeRecord, Stage
from ..runtime.budgets import format_bytes
from .graph_diff import GraphDiff, by_name, changes_between

# Escape codes for a terminal; a library for three colours would be one more dependency.
_COLORS = {"removed": "\x1b[31m", "added": "\x1b[32m", "changed": "\x1b[33m", "place": "\x1b[36m", "title": "\x1b[1m"}
_PLAIN = "\x1b[0m"


def text(diff: GraphDiff, *, color: bool, width: int, whole_graph: bool) -> str:
    """As `GraphDiff.text`."""
    lines = [_Line(f"{diff.title}: {diff.counts}", "title"), _Line()]
    if diff.layer is None and diff.passes:
        lines += _table(diff)
    elif diff.passes:
        lines += _passes_in_detail(diff, width)
    else:
        lines += [line for change in diff.changes for line in _rows(change.before, change.after, width)]
    lines += _skips(diff)
    if whole_graph:
        lines += [_Line(), *_unified(diff)]
    return "".join(f"{line.painted() if color else line.text.rstrip()}\n" for line in lines)


def wants_color(stream: Any = None) -> bool:
    """Whether to write colours: on a terminal, unless NO_COLOR is set."""
    stream = sys.stdout if stream is None else stream
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


@dataclasses.dataclass(frozen=True)
class _Line:
    text: str = ""
    style: str = ""

    def painted(self) -> str:
        color = _COLORS.get(self.style)
        return self.text.rstrip() if color is None else f"{color}{self.text.rstrip()}{_PLAIN}"


def _table(diff: GraphDiff) -> list[_Line]:
    """One line a rewrite."""
    rows = []
    for each, rewrite in diff.rewrites:
        matched, became = _ops(rewrite.matched, each.before), _ops(rewrite.replaced, each.after)
        rows.append((rewrite.number, each.name.removeprefix("alisa_"), rewrite.layer, matched, became))
    widths = [None, None, None, None, 38]
    table = tabulate(rows, ("no", "pass", "layer", "was", "became"), "simple", maxcolwidths=widths)
    return [_Line(text) for text in str(table).splitlines()]


def _skips(diff: GraphDiff) -> list[_Line]:
    rows = {row.node: row for each in diff.passes for row in reversed(each.skipped) if diff.shows(row.layer)}
    return [_Line(f"layer {row.layer}, {row.node} stays as it is: {row.reason}") for row in rows.values()]


def _passes_in_detail(diff: GraphDiff, width: int) -> list[_Line]:
    """By pass: the rule and where it stands, the model's line, what went, what came, what was left over."""
    lines: list[_Line] = []
    for each in diff.passes:
        rewrites = [rewrite for rewrite in each.rewrites if diff.shows(rewrite.layer)]
        before, after = by_name(each.before), by_name(each.after)
        told: set[str] = set()
        for rewrite in rewrites:
            title = f"{each.name}: {rewrite.rule}, rewrite {rewrite.number}  ({rewrite.source.place})"
            lines.append(_Line(title, "title"))
            source = next((before[name].source for name in rewrite.matched if name in before), None)
            if source is not None:
                lines.append(_Line(_cut(f"  {source.place}  {source.code}", width)))
            names = dict.fromkeys([*rewrite.matched, *rewrite.replaced])
            told.update(names)
            for name in names:
                lines += _rows(before.get(name), after.get(name), width)
        left = [c for c in changes_between(each.before, each.after) if c.kind == "removed" and diff.shows(c.node.layer)]
        left = [change for change in left if change.node.name not in told]
        if left:
            lines.append(_Line(f"  {'then' if rewrites else f'{each.name}:'} left without users:"))
            lines += [line for change in left for line in _rows(change.before, None, width)]
    return lines


def _unified(diff: GraphDiff) -> list[_Line]:
    nodes = [[n for n in stage.nodes if diff.shows(n.layer)] for stage in (diff.before, diff.after)]
    first, second = ([f"{n.line}{f'  # {n.value}' if n.value else ''}" for n in side] for side in nodes)
    lines = difflib.unified_diff(first, second, diff.before.title, diff.after.title, lineterm="", n=1)
    styles = {"-": "removed", "+": "added", "@": "place"}
    return [_Line(text, styles.get(text[0], "")) for text in lines]


def _ops(names: tuple[str, ...], stage: Stage) -> str:
    """What these nodes call, without the unpacking of results."""
    nodes = by_name(stage)
    targets = [short(nodes[name].target) for name in names if name in nodes and nodes[name].target != "getitem"]
    return ", ".join(dict.fromkeys(targets))


def short(target: str) -> str:
    """An op of ours without its prefix and overload."""
    return target.removeprefix("alisa.").removesuffix(".default").removesuffix(".tiered")


def _rows(before: NodeRecord | None, after: NodeRecord | None, width: int) -> list[_Line]:
    """A node that went, came, or changed; of the last kind only what changed."""
    if before is None or after is None or before.target != after.target:
        lines = [] if before is None else [_Line(_row("-", before, width), "removed")]
        return lines if after is None else [*lines, _Line(_row("+", after, width), "added")]
    was, now = (_top_level_parts(node.arguments) for node in (before, after))
    changes = []
    for old, new in itertools.zip_longest(was, now):
        if old != new:
            changes.append(f"{old} -> {new}" if old and new else f"+ {new}" if new else f"without {old}")
    if before.value != after.value:
        changes.append(f"{before.value} -> {after.value}")
    return [_Line(_cut(f"~ {after.label}: {', '.join(changes)}", width), "changed")]


def _top_level_parts(arguments: str) -> list[str]:
    """Split an argument list at the commas that are in no bracket and no text."""
    parts, depth, quote = [""], 0, ""
    for character in arguments:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]


def _row(sign: str, node: NodeRecord, width: int) -> str:
    """`- name = target(arguments)   value  bytes`, cut to the width."""
    size = "" if node.nbytes is None else format_bytes(node.nbytes)
    value = node.value if len(node.value) <= 26 else f"{node.value[:25]}…"
    right = f"{value:26}{size:>9}"
    left = width - len(right) - 4
    return f"{sign} {_cut(node.line, left):{left}}  {right}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
