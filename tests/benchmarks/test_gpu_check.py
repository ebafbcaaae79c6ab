"""The GPU script without a GPU: every row's code runs, a row that fails or takes too long is a row with its reason."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check


def _rows(path: Path) -> dict[str, dict[str, object]]:
    return {row["row"]: row for row in json.loads(path.read_text())["rows"]}


def test_every_row_runs_on_the_cpu(tmp_path: Path) -> None:
    """All give numbers, but for one that transformers refuses and one that is of GPUs; nothing else is written."""
    before = sorted(gpu_check.RESULTS.iterdir())
    gpu_check.main(["--dry", "--json", str(tmp_path / "dry.json")])
    rows = _rows(tmp_path / "dry.json")
    assert len(rows) == len(gpu_check.rows(gpu_check.DRY))
    for name, row in rows.items():
        expected = "skipped" if "offloaded" in name or "CUDA graphs" in name else "ok"
        assert row["status"] == expected, row
    moved = [row["values"]["MiB up"] for name, row in rows.items() if "20% of KV" in name]  # type: ignore[index]
    assert moved and all(mib > 0 for mib in moved)
    assert sorted(gpu_check.RESULTS.iterdir()) == before


def test_the_real_sizes_are_listed_in_full() -> None:
    """Batches, budgets, caches and goals that the numbers are for."""
    names = [row.name for row in gpu_check.rows(gpu_check.GPU)]
    for part in (
        "batch 1: alisa, 50%",
        "batch 8: alisa, 20%",
        "batch 8: alisa, all of KV on the device, CUDA graphs",
        "static cache",
        "offloaded cache",
        "phase I",
        "batch 64",
    ):
        assert any(part in name for name in names), part
    assert len(set(names)) == len(names)


def test_a_broken_row_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that raises, one that never ends, and those behind them."""

    def endless(_: gpu_check.Setting) -> dict[str, object]:
        time.sleep(60)
        return {}

    def broken(_: gpu_check.Setting) -> dict[str, object]:
        raise ValueError("no such device")

    listed = [
        gpu_check.Row("broken", 5, broken),
        gpu_check.Row("endless", 0.2, endless),
        gpu_check.Row("right", 5, lambda _: {"value": 0.5}, ("value", lambda value: value >= 0.8)),
    ]
    monkeypatch.setattr(gpu_check, "rows", lambda _: listed)
    gpu_check.main(["--dry", "--json", str(tmp_path / "dry.json")])
    rows = _rows(tmp_path / "dry.json")
    assert rows["broken"]["reason"] == "ValueError: no such device"
    assert "not done after 0 s" in str(rows["endless"]["reason"])
    assert rows["right"]["values"] == {"value": 0.5} and rows["right"]["goal met"] is False


def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole run keeps to its minutes."""
    monkeypatch.setattr(gpu_check, "rows", lambda _: [gpu_check.Row("right", 5, lambda _: {})])
    gpu_check.main(["--dry", "--minutes", "0", "--json", str(tmp_path / "dry.json")])
    assert _rows(tmp_path / "dry.json")["right"]["status"] == "skipped"
