"""The suite: every kind of row runs at a tiny size, gates stop wrong results, interrupted runs go on, files compare."""

from __future__ import annotations

import csv
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from alisa_compile.tools import bench as command
from alisa_compile.tools.cli import main as alisa
from benchmarks import compare, isolated, memory, run, tables
from benchmarks.contenders import Alisa
from benchmarks.models import History, llama
from benchmarks.outcome import GateFailed
from benchmarks.registry import TITLES, Row, all_rows
from benchmarks.results_file import BadResults, ResultsFile, read
from benchmarks.rows import decode, moving, selection
from benchmarks.timing import Times


def a_row(work: str, limit_s: int = 60, **parameters: Any) -> Row:
    return Row("attention", "a case", work, parameters, "none", limit_s=limit_s)


def test_rows_are_named_once_and_their_work_exists() -> None:
    """The quick parameters are parameters, too."""
    rows = all_rows()
    assert len({row.id for row in rows}) == len(rows) > 40
    for row in rows:
        module, function = row.work.split(":")
        work = getattr(__import__(f"benchmarks.rows.{module}", fromlist=[function]), function)
        assert set(row.arguments(quick=True)) <= set(inspect.signature(work).parameters), row.id
        assert row.group in TITLES and row.gate
    assert set(TITLES) == {row.group for row in rows}


def test_a_run_is_kept_resumed_printed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of the command; the second call measures nothing, and another machine's numbers are not taken."""
    monkeypatch.setenv("COLUMNS", "200")  # a narrower table breaks names
    out = tmp_path / "results.json"
    arguments = ["--quick", "--out", str(out), "--only", "move: gather, 256", "--only", "select: 4k", "--quiet"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = read(out)
    assert list(rows) == ["select: 4k, batch 1", "move: gather, 256 B"]
    for row in rows.values():
        assert row["status"] == "ok" and len(row["measures"]) == 2 and row["process_bytes"] > 1 << 20
        for measure in row["measures"]:
            times = measure["times"]
            assert 0 < times["p20"] <= times["p50"] <= times["p80"] and times["calls"] >= 10
            assert measure["floor_ms"] > 0 and measure["who"] in printed
    with out.with_suffix(".csv").open() as file:
        assert [line["who"] for line in csv.DictReader(file)] == [
            m["who"] for r in rows.values() for m in r["measures"]
        ]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = out.read_bytes()
    assert run.main(arguments) == 0
    assert out.read_bytes() == before
    content = json.loads(before)
    content["rows"]["move: gather, 256 B"]["host"] = "another machine"
    content["rows"]["move: gather, 256 B"]["seconds"] = -1
    out.write_text(json.dumps(content))
    assert run.main(arguments) == 0
    again = read(out)
    assert again["move: gather, 256 B"]["seconds"] > 0
    assert again["select: 4k, batch 1"] == rows["select: 4k, batch 1"]


def test_a_row_without_a_number_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error and a time limit: the others still run, and the failed ones are tried again."""
    slow = {"prompt": 200, "new": 50, "fraction": 0.25, "seconds": 1000}
    rows = [
        Row("select", "error", "selection:select", {"tokens": -1, "batch": 1, "sparsity": 0.8}, ""),
        Row("planner", "time", "planning:plan", slow, "", limit_s=4),
        Row("select", "fine", "selection:select", {"tokens": 512, "batch": 1, "sparsity": 0.8, "seconds": 0.05}, ""),
    ]
    monkeypatch.setattr(run, "all_rows", lambda: rows)
    out = tmp_path / "results.json"
    assert run.main(["--out", str(out), "--quiet"]) == 1
    found = read(out)
    assert [found[row.id]["status"] for row in rows] == ["error", "time", "ok"]
    results, host = ResultsFile(out), found[rows[2].id]["host"]
    assert [results.finished(row.id, row.definition(False), host) for row in rows] == [False, False, True]
    printed = tables.text(found, 100)
    assert "time limit: not done after 4 s" in printed and "error: " in printed
    assert max(map(len, tables.text(found, 80).splitlines()[1:])) <= 80


def test_a_process_that_dies_is_a_row() -> None:
    """As the system ends one that takes too much memory."""

    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    threading.Thread(target=kill).start()
    found = isolated.run(a_row("planning:plan", prompt=200, new=50, fraction=0.25, seconds=1000), quick=False)
    assert found["status"] == "died" and "killed" in found["reason"]


def test_a_failed_gate_prints_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong index, one wrong byte."""
    state = selection._State(512, 2, 0.8)
    op = torch.ops.alisa.kv_select.default
    selection._check(state, op)

    def wrong(scores: Any, rows: torch.Tensor, *args: Any) -> None:
        op(scores, rows, *args)
        rows[0, 1, 0, 3] += 1

    with pytest.raises(GateFailed, match="sequence 1 keeps other rows"):
        selection._check(state, wrong)
    monkeypatch.setattr(moving, "quantize_row", lambda rows: ((rows * 0).to(torch.int8), rows.float().abs().amax(-1)))
    with pytest.raises(GateFailed, match="steps off"):
        moving.quantise(4, 2, 16, seconds=0.01)
    failed = {"r": {"group": "move", "name": "case", "status": "gate", "reason": "a byte differs"}}
    for printed in (tables.text(failed, 100), tables.group_table(failed.values(), markdown=True)):
        assert "no number [1]" in printed and "[1] gate failed: a byte differs" in printed


@torch.no_grad()
def test_the_gate_of_decode_sees_other_rows() -> None:
    """A working set with a few rows exchanged after it was told, and K that is off by a hundredth."""
    model = llama("tiny", torch.float32, 400)
    history = History(2, 256, 2, 16, torch.float32)
    ours = Alisa(model, history, 64, sparsity=0.8, inner_compiler="eager")
    ours.fill()
    decode.check(ours)
    ours.fill()
    kept = ours.kept()
    rows = ours.store.rows
    assert rows is not None
    rows[:, :, :, :10] = (rows[:, :, :, :10] + 1) % 200
    ours.kept = lambda: kept  # type: ignore[method-assign]
    with pytest.raises(GateFailed, match="off those of stock transformers"):
        decode.check(ours)
    del ours.kept
    ours.fill()
    ours.store.pool[:, 0] *= 1.01
    with pytest.raises(GateFailed, match="off those of stock transformers"):
        decode.check(ours)


@torch.no_grad()
def test_the_gate_of_decode_looks_at_both_ends_of_a_batch() -> None:
    """It compares some sequences of many: the last one is among them."""
    model = llama("tiny", torch.float32, 400)
    ours = Alisa(model, History(8, 128, 2, 16, torch.float32), 64, sparsity=0.8, inner_compiler="eager")
    for sequence in (None, 0, 7):
        ours.fill()
        if sequence is None:
            decode.check(ours)
            continue
        ours.store.pool[ours.store.table[0, sequence, 0, :128].long(), 0] *= 1.5
        with pytest.raises(GateFailed, match="off those of stock transformers"):
            decode.check(ours)


def test_memory_is_what_torch_allocates() -> None:
    """Held, peak, and a second stage that frees what the first one made."""
    held: list[torch.Tensor] = []

    def fill() -> None:
        held.append(torch.zeros(1 << 20))
        torch.ones(1 << 18)

    def grow() -> None:
        held[0] = torch.cat([held[0], torch.ones(256)])

    _, found = memory.allocated(fill)
    assert (found.held, found.peak) == (4 << 20, 5 << 20)
    _, found = memory.allocated(grow, grow)
    assert found.held == 1024
    assert (4 << 20) <= found.peak <= (4 << 20) + 8192


def test_percentiles() -> None:
    """Of eleven calls."""
    assert Times.of([n / 1000 for n in range(11)]) == Times(5.0, 2.0, 8.0, pytest.approx(5.0), 11)


def test_files_compare(tmp_path: Path) -> None:
    """Slower, faster, within the noise, and in one file alone."""

    def write(name: str, **middle: float) -> Path:
        measures = [{"who": who, "times": vars(Times(ms, 0.95 * ms, 1.05 * ms, ms, 9))} for who, ms in middle.items()]
        row = {"group": "move", "name": "x", "definition": "", "host": "", "status": "ok", "measures": measures}
        results = ResultsFile(tmp_path / name)
        results.add("move: x", {**row, "machine": f"machine of {name}"})
        return results.path

    before = write("old.json", a=1.0, b=1.0, c=1.0, gone=1.0)
    after = write("new.json", a=2.0, b=0.5, c=1.01)
    lines = compare.compare(before, after).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("move: x ")] == ["slower", "faster", "1.01"]
    assert f"move: x, gone: only in {before}" in lines
    assert "machine of old.json" in lines[0]
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(BadResults, match="holds no results"):
        compare.compare(bad, after)
    assert run.main(["--compare", str(bad), str(after)]) == 2


def test_the_command_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a checkout it runs the suite wherever it is called; from a wheel it names the checkout."""
    monkeypatch.chdir(tmp_path)
    assert alisa(["bench", "--list", "--only", "planner"]) == 0
    assert capfd.readouterr().out.count("planner: ") == 3
    monkeypatch.setattr(command, "_ROOT", tmp_path)
    assert alisa(["bench"]) == 2
    assert "not part of the installed package" in capfd.readouterr().err


def _descendants(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in file.read_text().split()] if file.exists() else []
    return children + [pid for child in children for pid in _descendants(child)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are looked up in /proc")
def test_a_command_that_is_terminated_leaves_no_process(tmp_path: Path) -> None:
    """Neither the suite, which would go on with the next row, nor the row."""
    script = "import sys; from alisa_compile.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    rows = ["--only", "planner", "--only", "select", "--out", str(tmp_path / "out.json")]
    parent = subprocess.Popen([sys.executable, "-c", script, "bench", *rows], stderr=subprocess.DEVNULL)
    while len(started := _descendants(parent.pid)) < 4:  # suite, its forkserver and tracker, a row
        assert parent.poll() is None
        time.sleep(0.1)
    parent.terminate()
    assert parent.wait(30) == 130
    ends = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < ends
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.id)
def test_every_row_runs(row: Row) -> None:
    """At its tiny size, gates included; a compile cache makes a second run quick."""
    found = isolated.run(row, quick=True, limit_s=600)
    assert found["status"] == "ok", found["reason"]
    assert any(measure["times"] for measure in found["measures"])
