"""What torch's own CPU allocator handed out, as its profiler saw it: nobody's bookkeeping, compiled code included."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclasses.dataclass(frozen=True)
class Allocated:
    """Bytes. held: still there at the end, of what was allocated inside. peak: the most at one time."""

    held: int
    peak: int


def allocated(*stages: Callable[[], Any]) -> tuple[Any, Allocated]:
    """Run the stages in order; the result of the first, and what the last one allocated beyond what stood before it.

    Only what is allocated inside is known to be freed inside, which is why a stage may need one before it.
    """
    names = [f"allocated: stage {number}" for number in range(len(stages))]
    results = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for name, stage in zip(names, stages, strict=True):
            with record_function(name):
                results.append(stage())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    spans = {event["name"]: event for event in events if event.get("name") in names and event.get("ph") == "X"}
    begins = spans[names[-1]]["ts"]
    ends = begins + spans[names[-1]]["dur"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0 and begins <= event["ts"] <= ends
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return results[0], Allocated(held, peak)


def limit_process(nbytes: int) -> None:
    """Let allocations beyond so many bytes fail in this process, instead of the system ending some process."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def available_bytes() -> int:
    """What the system says could be allocated without swapping; all memory where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return torch.iinfo(torch.int64).max
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
