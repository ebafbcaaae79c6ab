"""Phase III beside what else could be done within the same budgets: rows that are deleted and rebuilt, or on disk."""

from __future__ import annotations

from typing import Any

import torch

import alisa_compile
from alisa_compile.backend import alisa
from alisa_compile.kernels import native
from benchmarks.contenders import quiet_transformers
from benchmarks.outcome import GateFailed, Measure, Outcome, Verdict
from benchmarks.rows.paper import opt
from benchmarks.timing import Times

_POLICIES: dict[str, dict[str, Any]] = {"swa": {}, "churn": {"policy": "churn"}}
_ALL, _OFF = "all on the device", "recompute off, the rest on disk"


def within_equal_budgets(
    policy: str, batch: int, prompt: int, new: int, layers: int, hidden: int, heads: int, rounds: int = 3
) -> Outcome:
    """Decode steps of an OPT, float32, one thread: device for 40 % of K and V with its tables, host for 45 %.

    K and V of as many heads as queries are twice the layer input, so `auto` can keep the rest as layer inputs, while
    `off` needs a disk for it: a file that the page cache of this machine holds.
    """
    quiet_transformers()
    native.register_native()
    torch.set_num_threads(1)
    model = opt(layers, hidden, heads, prompt + new)
    ids = torch.randint(2, 2048, (batch, prompt), generator=torch.Generator().manual_seed(0))
    kv = 2 * hidden * 4 * layers * (prompt + new) * batch
    device = {"device_kv_budget": int(0.4 * kv)}
    equal = {**device, "host_kv_budget": int(0.45 * kv)}
    settings: dict[str, dict[str, Any]] = {
        "recompute auto": equal,
        _OFF: {**equal, "recompute": "off", "disk_kv_budget": kv},
        "recompute off, twice the host": {**device, "recompute": "off", "host_kv_budget": int(0.9 * kv)},
        _ALL: {},
    }
    runners = {
        who: torch.compile(model, backend=alisa, options={**_POLICIES[policy], **options})
        for who, options in settings.items()
    }
    steps: dict[str, list[float]] = {who: [] for who in runners}
    outputs: dict[str, torch.Tensor] = {}
    for turn in range(rounds + 1):  # the first compiles
        for who, compiled in runners.items():
            outputs[who] = compiled.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            if turn:
                steps[who] += [ms / 1e3 for ms in alisa_compile.report(compiled).decode_ms]
    for who, found in outputs.items():
        if not torch.equal(found, outputs[_ALL]):
            raise GateFailed(f"{who}: other tokens than with everything on the device")
    measures = [_measure(who, runners[who], steps[who], batch, new) for who in runners]
    means = {measure.who: measure.times.mean for measure in measures if measure.times is not None}
    gain = means[_OFF] / means["recompute auto"]
    text = f"recompute auto is {gain:.2f} x as fast as off within the same device and host budgets (paper: 1.2 to 1.3)"
    return Outcome(measures, [Verdict(text, gain >= 1.2)])


def _measure(who: str, compiled: Any, seconds: list[float], batch: int, new: int) -> Measure:
    report = alisa_compile.report(compiled).to_dict()
    moved = report["bytes_moved"]
    parts = ["phases " + "+".join(phase["phase"] for phase in report["phases"])]
    parts += [f"{moved[name] / new / 1024:.0f} KiB {text}" for name, text in _MOVED.items() if moved[name]]
    if report["rows_recomputed"]:
        rows, spent = (report[name] / new for name in ("rows_recomputed", "recompute_ms"))
        parts.append(f"{rows:.0f} rows rebuilt in {spent:.1f} ms")
    times, sizes = Times.of(seconds), report["peak_bytes"]
    return Measure(
        who,
        times,
        f"{', '.join(parts)} a step; host {sizes['host'] / 2**20:.0f} MiB, disk {sizes['disk'] / 2**20:.0f} MiB",
        kv_bytes=sizes["device"],
        tokens_per_s=batch * 1e3 / times.mean,
    )


_MOVED = {"host_to_device": "up", "disk_read": "from disk"}
