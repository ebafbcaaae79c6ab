"""`alisa_compile.trace`: a Chrome trace that says the same as the report."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoTokenizer

import alisa_compile
from alisa_compile import AlisaCache, AlisaConfig, AlisaError
from alisa_compile.kernels.tiers import (
    INTERVAL_KINDS,
    TRAFFIC_PLACES,
    Interval,
    _take_native,
    record_intervals,
    take_intervals,
)
from alisa_compile.runtime import trace as runtime_trace
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes
from alisa_compile.runtime.trace import Recording
from alisa_compile.tools import cli, timeline
from tests.support import NOVEL, compiled, tiny_model

NEW = 24
#: Of a 2-layer model whose rows take 384 bytes (2 KV heads of 24): some on every tier.
TIERS = {"device_kv_budget": 64000, "host_kv_budget": 24000, "disk_kv_budget": "1MiB", "policy": "churn"}
MOVED = ("device_to_host", "host_to_device", "disk_write", "disk_read")


def ids(length: int) -> torch.Tensor:
    return torch.randint(2, 120, (1, length), generator=torch.Generator().manual_seed(0))


def run(model: Any, length: int = 100) -> torch.Tensor:
    prompt = ids(length)
    tokens: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return tokens


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trace and the report of the same generation, with rows on every tier."""
    path = tmp_path_factory.mktemp("trace") / "out.json"
    model = compiled(tiny_model("qwen3"), inner="eager", **TIERS)
    with alisa_compile.trace(path):
        run(model)
        report = alisa_compile.report(model).to_dict()
    return json.loads(path.read_text(encoding="utf-8")), report


def complete(content: dict[str, Any], category: str | None = None) -> list[dict[str, Any]]:
    events = (event for event in content["traceEvents"] if event["ph"] == "X")
    return [event for event in events if category in (None, event["cat"])]


def moved(content: dict[str, Any]) -> dict[str, int]:
    total: Counter[str] = Counter(dict.fromkeys(MOVED, 0))
    for event in complete(content):
        total.update({name: event["args"][name] for name in MOVED if name in event["args"]})
    return dict(total)


def check_format(content: dict[str, Any]) -> None:
    """The trace event format as Perfetto reads it: phases, numbers, names of threads, no overlap in a lane."""
    assert set(content) == {"traceEvents", "displayTimeUnit", "otherData"} and content["displayTimeUnit"] == "ms"
    named = set()
    for event in content["traceEvents"]:
        assert event["ph"] in ("M", "X", "C")
        assert isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            named |= {event["tid"]} if event["name"] == "thread_name" else set()
            continue
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "X":
            assert isinstance(event["dur"], (int, float)) and event["dur"] >= 0
        else:
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
    events = complete(content)
    assert {event["tid"] for event in events} == named
    for tid in named:
        lane = [event for event in events if event["tid"] == tid]
        assert len({event["cat"] for event in lane}) == 1
        for before, after in itertools.pairwise(lane):
            assert after["ts"] >= before["ts"] + before["dur"] - 0.002  # of floats with nanoseconds behind the point


def test_format(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    check_format(traced[0])


def test_steps_are_those_of_the_report(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content, report = traced
    steps = complete(content, "compute")
    assert [step["name"] for step in steps] == ["alisa prefill"] + ["alisa decode"] * (NEW - 1)
    assert steps[0]["dur"] / 1e3 == pytest.approx(report["prefill_ms"][0], abs=1e-5)
    decode = sorted(step["dur"] / 1e3 for step in steps[1:])
    assert decode[(NEW - 1) // 2] == pytest.approx(report["step_ms"]["p50"], abs=1e-5)
    assert decode[-1] == pytest.approx(report["step_ms"]["p99"], abs=1e-5) or report["step_ms"]["p99"] <= decode[-1]
    assert [step["args"]["tokens"] for step in steps] == list(range(100, 100 + NEW))


def test_bytes_are_those_of_the_report(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content, report = traced
    assert all(report["bytes_moved"][name] > 0 for name in MOVED), "the tiers are not exercised"
    assert moved(content) == report["bytes_moved"]


def test_waits_are_those_of_the_report(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content, report = traced
    waits = complete(content, "waits")
    on_disk = [wait for wait in waits if wait["name"].endswith("disk")]
    assert sum(wait["dur"] for wait in waits) / 1e3 == pytest.approx(report["stall_ms"], abs=1e-5)
    assert sum(wait["dur"] for wait in on_disk) / 1e3 == pytest.approx(report["disk_stall_ms"], abs=1e-5)


def test_transfers_lie_in_the_generation(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The worker thread's clock is Python's: nothing moves before the prefill, and the last job ends soon after it."""
    content, _ = traced
    steps = complete(content, "compute")
    for lane in ("host to device", "device to host", "disk"):
        transfers = complete(content, lane)
        assert transfers, lane
        assert transfers[0]["ts"] >= steps[0]["ts"]
        assert transfers[-1]["ts"] + transfers[-1]["dur"] <= steps[-1]["ts"] + steps[-1]["dur"] + 1e6
        assert {transfer["args"]["layer"] for transfer in transfers} == {0, 1}


def test_planner_and_compile_lanes(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    content, report = traced
    planner = {event["name"]: event for event in complete(content, "planner")}
    steps = complete(content, "compute")
    phase = planner["phase II"]
    assert (phase["ts"], phase["ts"] + phase["dur"]) == (
        pytest.approx(steps[0]["ts"]),
        pytest.approx(steps[-1]["ts"] + steps[-1]["dur"]),
    )
    assert planner["make the KV store"]["args"]["device_positions"] > 0
    names = [event["name"] for event in complete(content, "compile")]
    assert names == [f"compile {stage}" for stage in report["rewritten"]]


def test_counters(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Every token's row is somewhere; what left the host is on disk."""
    content, _ = traced
    samples = [event for event in content["traceEvents"] if event["ph"] == "C"]
    assert len(samples) == NEW and len({sample["name"] for sample in samples}) == 1
    row, layers, tokens = 2 * 2 * 24 * 4, 2, 100 + NEW - 1
    last = samples[-1]["args"]
    assert all(last[tier] > 0 and last[tier] % row == 0 for tier in ("device", "host", "disk"))
    assert last["device"] + last["host"] + last["disk"] >= row * layers * tokens
    assert last["host"] <= TIERS["host_kv_budget"]  # type: ignore[operator]
    assert all(a["ts"] < b["ts"] and a["args"]["disk"] <= b["args"]["disk"] for a, b in itertools.pairwise(samples))


def test_no_tiers(tmp_path: Path) -> None:
    """Nothing moves, and everything stays in phase I on the device. torch.profiler shows the same names of steps."""
    model = compiled(tiny_model("qwen3"), inner="eager")
    with alisa_compile.trace(tmp_path / "out.json"):
        run(model)
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    check_format(content)
    assert {event["cat"] for event in complete(content)} == {"planner", "compile", "compute"}
    samples = [event["args"] for event in content["traceEvents"] if event["ph"] == "C"]
    assert samples[-1] == {"device": 2 * 2 * 24 * 4 * 2 * (100 + NEW - 1)}
    phases = [event["name"] for event in complete(content, "planner") if event["name"].startswith("phase")]
    assert phases == ["phase I"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(model)
    counts = {row.key: row.count for row in profiler.key_averages()}
    assert (counts["alisa prefill"], counts["alisa decode"]) == (1, NEW - 1)


def test_copies_made_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without native kernels the same intervals are kept, with the bytes that are counted."""
    monkeypatch.setattr("alisa_compile.kernels.tiers.register_native", lambda: False)
    shape = StoreShape(2, 1, 2, 8, torch.float32, torch.device("cpu"))
    config = AlisaConfig(disk_kv_budget="1MiB")
    for host in (16, 0):  # with 0 rows go to the disk without the host
        store = TokenStore(shape, config, 64, lambda *_, host=host: TierSizes(24, host, 64, 8))
        assert store.tiers is not None and not store.tiers.is_open
        record_intervals()
        for layer in range(2):
            store.write(layer, 0, torch.randn(1, 1, 60, 2, 2, 8), None)
            store.read(layer, 0, 60)
        total, seen = [0] * TRAFFIC_PLACES, set()
        for interval in take_intervals():
            assert 0 < interval.begin <= interval.end and interval.store == store.tiers.number
            seen.add((interval.kind, interval.layer))
            for place in INTERVAL_KINDS[interval.kind]:
                total[place] += interval.nbytes
        kinds = {kind for kind, _ in seen}
        assert kinds == ({"down", "lost", "up", "fetch"} if host else {"through", "fetch"})
        assert seen == {(kind, layer) for kind in kinds for layer in range(2)}
        assert total == store.tiers.traffic.tolist()


def test_eager(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.set_attn_implementation("alisa")
    cache = AlisaCache(model.config, batch_size=1, max_length=130, **TIERS)
    with alisa_compile.trace(tmp_path / "out.json"), torch.no_grad():
        model.generate(ids(100), past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    check_format(content)
    report = alisa_compile.report(cache).to_dict()
    assert all(report["bytes_moved"][name] > 0 for name in MOVED)
    assert moved(content) == report["bytes_moved"]
    assert len(complete(content, "compute")) == 8


def test_recompute(tmp_path: Path) -> None:
    """Rows rebuilt from layer inputs have a lane of their own, and their bytes count as well."""
    model = compiled(tiny_model("qwen3"), inner="eager", policy="churn", device_kv_budget=64000, recompute="always")
    with alisa_compile.trace(tmp_path / "out.json"):
        run(model)
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    check_format(content)
    report = alisa_compile.report(model).to_dict()
    rebuilt = complete(content, "recompute")
    assert report["rows_recomputed"] > 0 and {event["args"]["layer"] for event in rebuilt} == {0, 1}
    assert sum(event["dur"] for event in rebuilt) / 1e3 >= report["recompute_ms"]
    assert moved(content) == report["bytes_moved"]
    samples = [event["args"] for event in content["traceEvents"] if event["ph"] == "C"]
    assert samples[-1]["host"] > 0 and not any(sample["disk"] for sample in samples)


def test_ends_with_an_error_too(tmp_path: Path) -> None:
    """What came before it is written; afterwards nothing is kept until somebody records again, by Python's clock."""
    model = compiled(tiny_model("qwen3"), inner="eager", **TIERS)
    with pytest.raises(KeyError), alisa_compile.trace(tmp_path / "out.json"):
        run(model)
        raise KeyError("of the user")
    check_format(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")))
    assert runtime_trace.active is None and not timeline.compile_listeners
    run(model)
    begin = time.perf_counter_ns()
    record_intervals()
    run(model)
    kept = take_intervals()
    end = time.perf_counter_ns()
    assert kept and all(begin <= interval.begin <= interval.end <= end for interval in kept)
    run(model)
    assert _take_native() == [], "recording goes on"


def test_one_trace_at_a_time(tmp_path: Path) -> None:
    with (
        alisa_compile.trace(tmp_path / "a.json"),
        pytest.raises(AlisaError, match="already"),
        alisa_compile.trace(tmp_path / "b.json"),
    ):
        pytest.fail("must not come here")
    assert (tmp_path / "a.json").exists() and not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("path", ("missing/out.json", "."))
def test_path_is_checked_before_anything_runs(path: str, tmp_path: Path) -> None:
    with pytest.raises(AlisaError, match="cannot write a trace there"), alisa_compile.trace(tmp_path / path):
        pytest.fail("must not come here")


def test_overlaps_get_rows_of_their_own() -> None:
    """Two threads of a dense step copy at the same time."""
    recording = Recording()
    start = recording.began
    for begin, end in ((0, 10), (5, 20), (10, 15), (21, 30)):
        recording.transfers.append(Interval(start + begin, start + end, "up", 8, 0, 1))
    content = timeline.to_chrome(recording)
    check_format(content)
    names = [event["args"]["name"] for event in content["traceEvents"] if event["name"] == "thread_name"]
    assert names == ["host to device", "host to device (2)"]
    assert moved(content)["host_to_device"] == 32


def test_command(tmp_path: Path) -> None:
    folder, path = str(tmp_path / "model"), tmp_path / "out.json"
    tiny_model("qwen3", layers=1, vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NOVEL).save_pretrained(folder)
    flags = ["--prompt", "Call me Ishmael.", "--max-new-tokens", "4", "--inner-compiler", "eager", "--quiet"]
    assert cli.main(["generate", "--model", folder, *flags, "--trace", str(path)]) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    check_format(content)
    assert len(complete(content, "compute")) == 4
    assert cli.main(["generate", "--model", folder, *flags, "--trace", str(tmp_path / "no" / "out.json")]) == 2
