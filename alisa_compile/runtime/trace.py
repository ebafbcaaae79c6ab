"""A recorder of what happened when: steps, storage, transfers. Off unless somebody traces."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

from ..errors import AlisaError
from ..kernels.tiers import Interval, record_intervals, take_intervals


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that took time. begin, end: as `time.perf_counter_ns()`. details: for a person who looks at it.

    lane: `compute` (forward passes), `validate` (their dense twins), `planner` (storage made) or `compile`.
    """

    lane: str
    name: str
    begin: int
    end: int
    details: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Bytes of rows by tier in a store at the end of a step; store: its `id`."""

    time: int
    store: int
    row_bytes: dict[str, int]


class Recording:
    """What is recorded from `start` to `stop`; transfers come in at the end."""

    def __init__(self) -> None:
        self.began = time.perf_counter_ns()
        self.ended = self.began
        self.spans: list[Span] = []
        self.samples: list[Sample] = []
        self.transfers: list[Interval] = []

    def span(self, lane: str, name: str, begin: int, end: int, **details: Any) -> None:
        """Note that something ran from `begin` to `end`."""
        self.spans.append(Span(lane, name, begin, end, details))


_lock = threading.Lock()
#: The recording that runs, of the whole process; None = nobody traces. Read at each step.
active: Recording | None = None


def start() -> Recording:
    """Begin to record; one recording at a time."""
    global active
    with _lock:
        if active is not None:
            raise AlisaError("a trace is being recorded already", fix="end it before another one begins")
        active = Recording()
        record_intervals()
        return active


def stop() -> Recording:
    """End the recording: waits for the transfers that run."""
    global active
    with _lock:
        assert active is not None
        recording, active = active, None
        recording.transfers = take_intervals()
        recording.ended = time.perf_counter_ns()
        return recording
