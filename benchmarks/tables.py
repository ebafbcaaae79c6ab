"""Results for people: a table for each group, as text or Markdown, and all of it as CSV or as a plot."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.registry import TITLES

_MIB = 1 << 20
_WIDE = 100  # columns of a terminal from which names need not wrap
COLUMNS = ("case", "who", "ms", "p20-p80", "x alisa", "x floor", "KV MiB", "peak MiB", "tokens /s")


def by_group(rows: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """In the order of `TITLES`."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in TITLES}
    for row in rows.values():
        groups.setdefault(row["group"], []).append(row)
    return {name: found for name, found in groups.items() if found}


def group_table(rows: Iterable[dict[str, Any]], *, markdown: bool = False, width: int = _WIDE) -> str:
    """A line for each contender; a row without numbers says why. Columns that nobody fills are left out.

    width: of the terminal. Remarks stand below the table, by number.
    """
    lines: list[list[str]] = []
    remarks: dict[str, int] = {}

    def marked(name: str, remark: str) -> str:
        return f"{name} [{remarks.setdefault(remark, len(remarks) + 1)}]" if remark else name

    for row in rows:
        if row["status"] != "ok":
            reason = f"{_REASONS[row['status']]}: {row['reason']}"
            lines.append([row["name"], marked("no number", reason), *[""] * (len(COLUMNS) - 2)])
            continue
        for place, measure in enumerate(row["measures"]):
            case, who = row["name"] if not place or markdown else "", marked(measure["who"], measure["note"])
            lines.append([case, who, *_cells(measure, row["measures"][0])])
    used = [place for place in range(len(COLUMNS)) if place < 2 or any(line[place] for line in lines)]
    names = [14, 28] if width >= _WIDE else [9, 16]
    table = tabulate(
        [[line[place] for place in used] for line in lines],
        headers=[COLUMNS[place] if markdown else COLUMNS[place].replace(" ", "\n") for place in used],
        tablefmt="github" if markdown else "simple",
        maxcolwidths=None if markdown else [*names, *[None] * (len(used) - 2)],
        colalign=["left" if place < 2 else "right" for place in used],
        disable_numparse=True,
    )
    notes = [f"[{number}] {remark}" for remark, number in remarks.items()]
    if markdown:
        return "\n".join([str(table), *(["", "; ".join(notes) + "."] if notes else [])])
    return "\n".join([str(table), *(textwrap.fill(note, width, subsequent_indent="    ") for note in notes)])


_REASONS = {"gate": "gate failed", "time": "time limit", "died": "its process died", "error": "error"}


def _cells(measure: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """All but the first two columns."""
    times = measure["times"]
    sizes = [_size(measure["kv_bytes"]), _size(measure["peak_bytes"])]
    if times is None:
        return ["", "", "", "", *sizes, ""]
    ours = None if first["times"] is None or measure is first else first["times"]["p50"]
    floor = measure["floor_ms"]
    return [
        number(times["p50"]),
        "" if times["calls"] == 1 else f"{number(times['p20'])}-{number(times['p80'])}",
        "" if ours is None else f"{times['p50'] / ours:.2f}",
        "" if floor is None else f"{times['p50'] / floor:.2f}",
        *sizes,
        "" if measure["tokens_per_s"] is None else number(measure["tokens_per_s"]),
    ]


def number(value: float) -> str:
    """Three digits that matter, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(nbytes: int | None) -> str:
    return "" if not nbytes else number(nbytes / _MIB)


def verdicts(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each aim."""
    return [
        f"{row['name']}: {found['text']}: {'met' if found['met'] else 'NOT met'}"
        for row in rows
        if row["status"] == "ok"
        for found in row["verdicts"]
    ]


def machines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Each machine line once."""
    return list(dict.fromkeys(row["machine"] for row in rows if "machine" in row))


def text(rows: Mapping[str, dict[str, Any]], width: int) -> str:
    """All of it, for a terminal of this width."""
    parts = machines(rows.values())
    for name, found in by_group(rows).items():
        lines = [f"[{name}] {TITLES.get(name, '')}", group_table(found, width=width), *verdicts(found)]
        parts += ["", *(line if "\n" in line else textwrap.fill(line, width) for line in lines)]
    return "\n".join(parts)


def write_csv(rows: Mapping[str, dict[str, Any]], path: Path) -> None:
    """A line for each contender; raw numbers in milliseconds and bytes."""
    names = ["group", "case", "status", "who", "p50_ms", "p20_ms", "p80_ms", "mean_ms", "calls", "bytes", "floor_ms"]
    names += ["kv_bytes", "peak_bytes", "tokens_per_s", "note", "machine"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows.values():
            about = {"group": row["group"], "case": row["name"], "status": row["status"], "machine": row.get("machine")}
            for measure in row.get("measures") or [{"note": row.get("reason", "")}]:
                times = measure.get("times") or {}
                found = {f"{name}_ms": times[name] for name in ("p50", "p20", "p80", "mean") if name in times}
                writer.writerow({**about, **measure, **found, "calls": times.get("calls", "")})


def plot(rows: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Bars of median milliseconds with their 20th to 80th percentiles, a panel for each group."""
    from matplotlib.figure import Figure

    groups = {
        name: [(row["name"], m) for row in found if row["status"] == "ok" for m in row["measures"] if m["times"]]
        for name, found in by_group(rows).items()
    }
    groups = {name: bars for name, bars in groups.items() if bars}
    if not groups:
        return
    heights = [1 + 0.2 * len(bars) for bars in groups.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, bars) in zip(panels, groups.items(), strict=True):
        middle = [measure["times"]["p50"] for _, measure in bars]
        spread = [
            [measure["times"]["p50"] - measure["times"]["p20"] for _, measure in bars],
            [measure["times"]["p80"] - measure["times"]["p50"] for _, measure in bars],
        ]
        colors = ["tab:blue" if "alisa" in measure["who"] else "tab:gray" for _, measure in bars]
        places = range(len(bars))
        axes.barh(places, middle, xerr=spread, color=colors, height=0.7)
        axes.set_yticks(places, [f"{case}: {measure['who']}" for case, measure in bars], fontsize=6)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(f"{name}, ms", fontsize=8, loc="left")
        axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
