"""The README's table of GPU measurements: of the newest record, or the words that there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_table, readme
from benchmarks.run import RESULTS


def _record(folder: Path, date: str, *rows: dict[str, Any]) -> None:
    record = {"device": "NVIDIA H200", "date": date, "machine": "m", "versions": {"torch": "2.11"}, "rows": rows}
    (folder / f"nvidia-h200-{date}.json").write_text(json.dumps(record))


def test_the_newest_record(tmp_path: Path) -> None:
    """Values, goals met and missed, rows without values; older records and other results are left out."""
    (tmp_path / "bench.json").write_text("[]")
    assert gpu_table.section(tmp_path) == gpu_table.NONE
    _record(tmp_path, "2026-01-02", {"row": "old", "status": "ok", "values": {}})
    _record(
        tmp_path, "2026-11-02",
        {"row": "copy", "status": "ok", "values": {"GB/s": 4012.345, "calls": 3}, "goal met": True},
        {"row": "gather", "status": "ok", "values": {"share of copy": 0.5}, "goal met": False},
        {"row": "model", "status": "failed", "reason": "OutOfMemoryError: too much\nmore"},
    )  # fmt: skip
    lines = gpu_table.section(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    assert cells == [
        ["copy", "GB/s 4012, calls 3", "met"],
        ["gather", "share of copy 0.5", "missed"],
        ["model", "failed: OutOfMemoryError: too much", ""],
    ]
    assert lines[-1] == "Measured on NVIDIA H200, 2026-11-02, with torch 2.11."


def test_it_stands_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second time changes nothing; what is around stays."""
    monkeypatch.setattr(gpu_table, "section", lambda folder: f"found in {folder.name}")
    once = readme.rewritten("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n", {})
    assert once == f"before\n<!-- gpu -->\n\nfound in {RESULTS.parent.name}\n\n<!-- /gpu -->\nafter\n"
    assert readme.rewritten(once, {}) == once
