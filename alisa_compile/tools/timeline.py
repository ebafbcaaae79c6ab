"""A recording as a Chrome trace: JSON that ui.perfetto.dev and chrome://tracing draw as lanes over time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backend import compile_listeners
from ..errors import AlisaError
from ..kernels.tiers import INTERVAL_KINDS, Interval
from ..runtime import trace
from ..runtime.report import COUNTERS, CompileRow

#: From top to bottom.
LANES = ("planner", "compile", "validate", "compute", "waits", "host to device", "device to host", "disk", "recompute")
#: Of an interval's kind: its lane and what a person reads.
_TRANSFERS = {
    "down": ("device to host", "rows to the host"),
    "up": ("host to device", "rows to the device"),
    "lost": ("disk", "rows from the host to disk"),
    "through": ("disk", "rows from the device to disk"),
    "fetch": ("disk", "rows from disk to the device"),
    "wait": ("waits", "alisa::kv_wait for the host"),
    "recompute": ("recompute", "rows from layer inputs"),
    "disk_wait": ("waits", "alisa::kv_wait for the disk"),
}


@dataclasses.dataclass(frozen=True)
class _Event:
    lane: str
    name: str
    begin: int
    end: int
    details: dict[str, Any]


@contextlib.contextmanager
def record(path: str | os.PathLike[str]) -> Iterator[None]:
    """See `alisa_compile.trace`."""
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise AlisaError("cannot write a trace there", got=path, expected="a file in a folder that exists")
    recording = trace.start()

    def compiled(row: CompileRow) -> None:
        now = time.perf_counter_ns()
        details = {"rewritten": row.rewritten, "skipped": len(row.skipped)}
        recording.span("compile", f"compile {row.stage}", now - int(row.seconds * 1e9), now, **details)

    compile_listeners.append(compiled)
    try:
        yield
    finally:
        compile_listeners.remove(compiled)
        _write(path, to_chrome(trace.stop()))


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise AlisaError(f"cannot write the trace: {error.strerror}", got=path) from error


def to_chrome(recording: trace.Recording) -> dict[str, Any]:
    """The trace event format, JSON object form: times in microseconds since the recording began."""
    process = os.getpid()

    def micros(moment: int) -> float:
        return (moment - recording.began) / 1000

    lanes: dict[str, list[_Event]] = {name: [] for name in LANES}
    for event in _events(recording):
        lanes[event.lane].append(event)
    chrome: list[dict[str, Any]] = [_label("process_name", process, 0, name="alisa")]
    thread = 0
    for lane, events in lanes.items():
        for number, row in enumerate(_rows(events)):
            thread += 1
            name = lane if number == 0 else f"{lane} ({number + 1})"
            chrome.append(_label("thread_name", process, thread, name=name))
            chrome.append(_label("thread_sort_index", process, thread, sort_index=thread))
            chrome.extend(
                {
                    "ph": "X",
                    "name": event.name,
                    "cat": lane,
                    "pid": process,
                    "tid": thread,
                    "ts": micros(event.begin),
                    "dur": (event.end - event.begin) / 1000,
                    "args": event.details,
                }
                for event in row
            )
    chrome.extend(_counters(recording, process, micros))
    about = {
        "alisa": __version__,
        "torch": torch.__version__,
        "clock": "time.perf_counter_ns",
        "start": recording.began,
    }
    return {"traceEvents": chrome, "displayTimeUnit": "ms", "otherData": about}


def _events(recording: trace.Recording) -> Iterable[_Event]:
    for span in recording.spans:
        yield _Event(span.lane, span.name, span.begin, span.end, span.details)
    yield from _phases([span for span in recording.spans if span.lane == "compute"])
    for interval in recording.transfers:
        lane, name = _TRANSFERS[interval.kind]
        yield _Event(lane, name, interval.begin, interval.end, _details(interval))


def _details(interval: Interval) -> dict[str, Any]:
    """The layer, and the bytes under the names of `report(model).to_dict()["bytes_moved"]`."""
    moved = {COUNTERS[place]: interval.nbytes for place in INTERVAL_KINDS[interval.kind] if interval.nbytes}
    return {"layer": interval.layer, **moved}


def _phases(steps: list[trace.Span]) -> Iterable[_Event]:
    """From the first step of a phase to its last one; another generation begins another."""
    begun: trace.Span | None = None
    last: trace.Span | None = None
    for step in sorted(steps, key=lambda span: span.begin):
        if begun is None or last is None:
            begun = step
        elif step.details["phase"] != begun.details["phase"] or step.details["tokens"] <= last.details["tokens"]:
            yield _Event("planner", f"phase {begun.details['phase']}", begun.begin, last.end, {})
            begun = step
        last = step
    if begun is not None and last is not None:
        yield _Event("planner", f"phase {begun.details['phase']}", begun.begin, last.end, {})


def _rows(events: list[_Event]) -> list[list[_Event]]:
    """Events by begin, in as few rows as it takes that none of a row overlap: threads may copy at the same time."""
    rows: list[list[_Event]] = []
    for event in sorted(events, key=lambda event: (event.begin, event.end)):
        free = next((row for row in rows if row[-1].end <= event.begin), None)
        if free is None:
            rows.append([event])
        else:
            free.append(event)
    return rows


def _counters(recording: trace.Recording, process: int, micros: Any) -> Iterable[dict[str, Any]]:
    """Bytes of rows by tier after each step, of all stores together."""
    latest: dict[int, dict[str, int]] = {}
    for sample in sorted(recording.samples, key=lambda sample: sample.time):
        latest[sample.store] = sample.row_bytes
        total: dict[str, int] = {}
        for row_bytes in latest.values():
            for tier, nbytes in row_bytes.items():
                total[tier] = total.get(tier, 0) + nbytes
        yield {
            "ph": "C",
            "name": "bytes of KV rows",
            "pid": process,
            "tid": 0,
            "ts": micros(sample.time),
            "args": total,
        }


def _label(kind: str, process: int, thread: int, **value: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": value}
