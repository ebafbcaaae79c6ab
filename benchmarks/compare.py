"""Two results files side by side: what became faster, slower, or stayed within the noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.results_file import read
from benchmarks.tables import number


def compare(before: Path, after: Path) -> str:
    """A line for each contender that has a number in both; those outside each other's 20-80 % band are marked."""
    old, new = read(before), read(after)
    lines, one_sided = [], []
    for row_id in dict.fromkeys([*old, *new]):
        first, second = _times(old.get(row_id)), _times(new.get(row_id))
        for who in dict.fromkeys([*first, *second]):
            if who not in first or who not in second:
                one_sided.append(f"{row_id}, {who}: only in {after if who in second else before}")
                continue
            a, b = first[who], second[who]
            change = b["p50"] / a["p50"] if a["p50"] else float("nan")
            lines.append([row_id, who, number(a["p50"]), number(b["p50"]), f"{change:.2f}", verdict(a, b)])
    machines = [f"{path.name}: {line}" for path, rows in ((before, old), (after, new)) for line in _machines(rows)]
    headers = ["row", "who", f"{before.stem} ms", f"{after.stem} ms", "ratio", ""]
    table = tabulate(lines, headers, disable_numparse=True, maxcolwidths=[28, 26, None, None, None, None])
    return "\n".join([*machines, "", str(table), *one_sided])


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    """Empty where each median is inside the other's band."""
    if after["p20"] > before["p80"]:
        return "slower"
    return "faster" if after["p80"] < before["p20"] else ""


def _times(row: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    if row is None or row["status"] != "ok":
        return {}
    return {measure["who"]: measure["times"] for measure in row["measures"] if measure["times"]}


def _machines(rows: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["machine"] for row in rows.values() if "machine" in row))
