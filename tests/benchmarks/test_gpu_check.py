"""The GPU script without a GPU: every row's code runs, a row that fails or takes too long is a row with its reason."""

from __future__ import annotations

import json
import sys
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


_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from benchmarks import gpu_check

def dies(_): os.kill(os.getpid(), signal.SIGKILL)

def hangs(_):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as in a call that never comes back to Python
    time.sleep(60)

def breaks(_):
    gpu_check._context_is_dead = lambda _: True
    raise RuntimeError("an illegal memory access was encountered")

rows = [
    gpu_check.Row("first", 5, lambda _: {"process": os.getpid()}), gpu_check.Row("dies", 5, dies),
    gpu_check.Row("hangs", 0.2, hangs), gpu_check.Row("breaks", 5, breaks),
    gpu_check.Row("last", 5, lambda _: {"process": os.getpid()}),
]
sys.exit(0 if gpu_check.run_rows(rows, gpu_check.DRY, Path(sys.argv[1]), time.time() + 60) else gpu_check.RESTART)
"""


@pytest.mark.slow
def test_rows_that_end_their_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that kills it, one that cannot be interrupted, one that leaves a dead context: the others run, each once."""
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    (tmp_path / "rows.py").write_text(_SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(gpu_check._ROOT))
    path = tmp_path / "record.json"
    gpu_check.supervise([sys.executable, str(tmp_path / "rows.py"), str(path)], path)
    record = json.loads(path.read_text())
    assert [row["row"] for row in record["rows"]] == ["first", "dies", "hangs", "breaks", "last"]
    first, dies, hangs, breaks, last = record["rows"]
    assert dies["reason"] == "the process ended with status -9"
    assert hangs["reason"] == "hung, and was killed"
    assert breaks["reason"] == "RuntimeError: an illegal memory access was encountered"
    assert first["status"] == last["status"] == "ok" and first["values"] != last["values"]
    assert record["versions"]["torch"] and "running" not in record


def test_a_command_that_runs_nothing_is_not_repeated(tmp_path: Path) -> None:
    """It would end as it did."""
    with pytest.raises(SystemExit, match="status 3"):
        gpu_check.supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "record.json")


def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole run keeps to its minutes."""
    monkeypatch.setattr(gpu_check, "rows", lambda _: [gpu_check.Row("right", 5, lambda _: {})])
    gpu_check.main(["--dry", "--minutes", "0", "--json", str(tmp_path / "dry.json")])
    assert _rows(tmp_path / "dry.json")["right"]["status"] == "skipped"
