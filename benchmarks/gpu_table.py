"""What `benchmarks/gpu_check.py` has measured, as the README shows it: the newest `results/<gpu>-<date>.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

NONE = "Not yet measured on a GPU: `python -m benchmarks.gpu_check` is what measures it."
_GOAL = {True: "met", False: "missed", None: ""}


def newest(folder: Path) -> dict[str, Any] | None:
    """The record of the last run on a GPU, if there is one."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*-????-??-??.json")]
    return max(records, key=lambda record: record["date"], default=None)


def section(folder: Path) -> str:
    """Markdown: a line for each row with its values or why it has none, and on what it was measured."""
    record = newest(folder)
    if record is None:
        return NONE
    rows = [[row["row"], _values(row), _GOAL[row.get("goal met")]] for row in record["rows"]]
    table = tabulate(rows, headers=["", "", "goal"], tablefmt="github", disable_numparse=True)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{table}\n\nMeasured on {record['device']}, {record['date']}, with {versions}."


def _values(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason'].splitlines()[0]}"
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["values"].items()
    )
