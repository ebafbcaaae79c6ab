"""Phase III beside what else could be done within the same budgets: rows that are deleted and rebuilt, or on disk."""

from __future__ import annotations

from typing import Any

import torch

import alisa_compile
from benchmarks.outcome import Measure, Outcome, Verdict
from benchmarks.rows.paper import Workload
from benchmarks.rows.phases import decode_steps
from benchmarks.timing import Times

_ALL, _OFF = "all on the device", "recompute off, the rest on disk"


def within_equal_budgets(
    batch: int, prompt: int, new: int, layers: int, hidden: int, heads: int, rounds: int = 3
) -> Outcome:
    """Decode steps of an OPT, float32, one thread: device for 40 % of K and V with its tables, host for 45 %.

    K and V of as many heads as queries are twice the layer input, so `auto` can keep the rest as layer inputs, while
    `off` needs a disk for it: a file that the page cache of this machine holds.
    """
    torch.set_num_threads(1)
    work = Workload.of(batch, prompt, new, layers, hidden, heads)
    kv = work.kv_bytes
    device = {"device_kv_budget": int(0.4 * kv)}
    equal = {**device, "host_kv_budget": int(0.45 * kv)}
    settings: dict[str, dict[str, Any]] = {
        "recompute auto": equal,
        _OFF: {**equal, "recompute": "off", "disk_kv_budget": kv},
        "recompute off, twice the host": {**device, "recompute": "off", "host_kv_budget": int(0.9 * kv)},
        _ALL: {},
    }
    runners = {who: work.compiled(**options) for who, options in settings.items()}
    times = decode_steps(work, runners, _ALL, rounds)
    measures = [_measure(who, runners[who], times[who], batch, new) for who in runners]
    gain = times[_OFF].mean / times["recompute auto"].mean
    text = f"recompute auto is {gain:.2f} x as fast as off within the same device and host budgets (paper: 1.2 to 1.3)"
    return Outcome(measures, [Verdict(text, gain >= 1.2)])


def _measure(who: str, compiled: Any, times: Times, batch: int, new: int) -> Measure:
    report = alisa_compile.report(compiled).to_dict()
    moved = report["bytes_moved"]
    parts = ["phases " + "+".join(phase["phase"] for phase in report["phases"])]
    parts += [f"{moved[name] / new / 1024:.0f} KiB {text}" for name, text in _MOVED.items() if moved[name]]
    if report["rows_recomputed"]:
        rows, spent = (report[name] / new for name in ("rows_recomputed", "recompute_ms"))
        parts.append(f"{rows:.0f} rows rebuilt in {spent:.1f} ms")
    sizes = report["peak_bytes"]
    return Measure(
        who,
        times,
        f"{', '.join(parts)} a step; host {sizes['host'] / 2**20:.0f} MiB, disk {sizes['disk'] / 2**20:.0f} MiB",
        kv_bytes=sizes["device"],
        tokens_per_s=batch * 1e3 / times.mean,
    )


_MOVED = {"host_to_device": "up", "disk_read": "from disk"}
